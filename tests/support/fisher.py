"""The Fisher of all three types, over several batches, compared with the oracle."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc import EWC, Classification, Custom
from tests import oracle
from tests.oracle import nll
from tests.support.asserts import assert_close, unchanged

Batch = tuple[Any, Tensor]

TYPES = ["empirical", "exact", "mc"]


def likelihood(fisher_type: str) -> Custom | Classification:
    """One whose samples do not depend on chance, so that the sampled Fisher is known."""
    if fisher_type == "mc":
        return Custom(nll, sample=lambda outputs: outputs.argmin(1))
    return Classification()


def terms(fisher_type: str, outputs: Tensor, target: Tensor) -> Tensor:
    """What the oracle differentiates for one sample, `[K]`."""
    if fisher_type == "exact":
        logs = F.log_softmax(outputs, 1)
        return (-logs * logs.exp().detach().sqrt()).flatten()
    return nll(outputs, target if fisher_type == "empirical" else outputs.argmin(1).detach())


def holds(
    net: nn.Module, batches: list[Batch], fisher_type: str, *, once: bool = False
) -> dict[str, str]:
    """The Fisher equals the oracle's; nothing else has changed; which method each parameter took.

    Args:
        net: The model.
        batches: Their 0-d tensors are shared by the samples.
        fisher_type: The type.
        once: Whether the batches come from an iterator, and so are run one by one.
    """
    expected: dict[str, Tensor] = {}
    for inputs, targets in batches:
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)

        def losses(model: nn.Module, n: int, inputs: Any = inputs, given: Any = targets) -> Tensor:
            one = [each if each.dim() == 0 else each[n : n + 1] for each in inputs]
            return terms(fisher_type, model(*one), given[n : n + 1])

        for name, found in oracle.squares(net, losses, len(targets)).items():
            expected[name] = expected.get(name, 0) + found
    samples = sum(len(targets) for _, targets in batches)
    ewc = EWC(net, likelihood(fisher_type), fisher_type=fisher_type)
    generator = torch.Generator().manual_seed(0) if fisher_type == "mc" else None
    with unchanged(None, net):
        summary = ewc.consolidate(iter(batches) if once else batches, generator=generator)
    assert_close(ewc.fisher, {name: each / samples for name, each in expected.items()}, 1e-9)
    return dict(summary.paths)


def data(*shape: int, sizes: tuple[int, ...] = (1, 2, 3, 7)) -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.randn(n, *shape).double(), torch.randint(3, (n,))) for n in sizes]


def sequences(width: int) -> list[Batch]:
    """Batches of sequences whose lengths differ."""
    lengths = ((1, 3), (2, 5), (3, 1), (7, 4))
    return [data(length, width, sizes=(n,))[0] for n, length in lengths]


def double(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in float64, with values that differ from zero where it has zeros."""
    torch.manual_seed(2)
    net = make().double()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "parametrizations" not in name:
                parameter.copy_(torch.randn(parameter.shape) / 2)
    return net
