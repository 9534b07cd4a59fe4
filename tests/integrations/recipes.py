"""What every recipe of docs/recipes promises, and its page's own code to show it with.

A page is executed block by block, so that what is tested is what is read. The contract is the same
for all of them; what differs is how each library is asked to train, to save and to resume.
"""

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ewc import EWC
from ewc.model.names import find, named_parameters, unwrap
from tests.support.asserts import assert_close
from tests.support.pages import blocks
from tests.support.tasks import same

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
LOOP = re.compile(r"^for .*tasks", re.MULTILINE)  # begins the block that learns the tasks

Gradients = dict[str, Tensor]


def recipe(name: str, *, seed: int = 0, loop: bool = True) -> ModuleType:
    """Run the code of a page as a module, which can be imported, and pickled from.

    Args:
        name: Of the page.
        seed: For the weights. The data of a page have a seed of their own.
        loop: Whether to run the block that learns the tasks. Without it, the page is as in a new
            process that has learned nothing yet.
    """
    page = RECIPES / f"{name}.md"
    module = sys.modules[f"recipe_{name}"] = ModuleType(f"recipe_{name}")
    torch.manual_seed(seed)
    for line, code in blocks(page.read_text(encoding="utf-8")):
        if loop or LOOP.search(code) is None:
            exec(compile("\n" * line + code, str(page), "exec"), module.__dict__)
    return module


@contextmanager
def recorded() -> Iterator[list[dict[nn.Parameter, Tensor]]]:
    """The gradients that optimizers have found, one dict for each of their steps.

    Read after the step: Lightning runs the last backward inside of it.
    """
    steps: list[dict[nn.Parameter, Tensor]] = []

    def record(optimizer: Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        steps.append({p: p.grad.clone() for p in parameters if p.grad is not None})

    handle = register_optimizer_step_post_hook(record)
    try:
        yield steps
    finally:
        handle.remove()


def named(step: Mapping[nn.Parameter, Tensor], model: nn.Module) -> Gradients:
    """What was recorded of a step, by canonical name."""
    return {name: step[p] for name, p in named_parameters(model).items() if p in step}


def move(model: nn.Module, by: float = 0.05) -> None:
    """Take trainable parameters away from where they are, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def written_out(ewc: EWC, model: nn.Module) -> Tensor:
    """The penalty but for its constant, by plain operations on what is known."""
    total = torch.zeros(())
    for name, fisher in ewc.fisher.items():
        total = total + (fisher * (find(unwrap(model), name) - ewc.anchor[name]) ** 2).sum()
    return 0.5 * ewc.strength * total


def gradients(model: nn.Module, value: Tensor) -> Gradients:
    """By plain autograd, of the trainable parameters."""
    trainable = trained(model)
    found = torch.autograd.grad(value, list(trainable.values()), materialize_grads=True)
    return dict(zip(trainable, found, strict=True))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters, by canonical name."""
    return {n: p for n, p in named_parameters(model).items() if p.requires_grad}


def assert_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """`assert_close` in float32, in any order: an optimizer has its own."""
    assert found.keys() == expected.keys()
    assert_close({name: found[name] for name in expected}, expected, 1e-5, relative=1e-4)


class Contract(ABC):
    """What a recipe promises."""

    page: str
    dtype = torch.float32  # float64 if the rounding of gradients differs between processors
    tolerance = 1e-6  # of the gradient of a step

    @pytest.fixture(autouse=True)
    def default_dtype(self) -> Iterator[None]:
        """The page and the step run in the contract's precision."""
        torch.set_default_dtype(self.dtype)
        yield
        torch.set_default_dtype(torch.float32)

    def ready(self, space: ModuleType) -> ModuleType:
        """Give the namespace of the page a `model` and a `regularizer`, if it has none."""
        return space

    def learned(self) -> ModuleType:
        """The page after it has learned its tasks, and trained on."""
        space = self.ready(recipe(self.page))
        move(space.model)
        return space

    @abstractmethod
    def step(self, space: ModuleType, folder: Path, accumulate: int) -> None:
        """One step of the library's on 8 samples, in `accumulate` batches."""

    @abstractmethod
    def loss(self, space: ModuleType) -> Tensor:
        """The mean loss of these 8 samples, by a plain forward in train mode."""

    @abstractmethod
    def save_between(self, space: ModuleType, folder: Path) -> None:
        """Two steps, and between them what the library's own checkpoint is, in `folder`."""

    @abstractmethod
    def resume(self, space: ModuleType, folder: Path) -> ModuleType:
        """Load that checkpoint, and do the second step. Returns what the step was done with."""

    @abstractmethod
    def evaluate(self, space: ModuleType, folder: Path) -> float:
        """What the library reports as the loss of the 8 samples in evaluation."""

    @pytest.mark.parametrize("accumulate", [1, 4])
    def test_the_penalty_counts_once_for_each_step(self, tmp_path: Path, accumulate: int) -> None:
        space = self.learned()
        space.model.train()
        loss = gradients(space.model, self.loss(space))
        penalty = gradients(space.model, written_out(space.regularizer, space.model))
        norms = [torch.stack([g.norm() for g in each.values()]).norm() for each in (loss, penalty)]
        # As large as the loss, so that a wrong factor of either one shows.
        space.regularizer.strength *= float(norms[0] / norms[1])
        penalty = gradients(space.model, written_out(space.regularizer, space.model))
        with recorded() as steps:
            self.step(space, tmp_path, accumulate)
        (step,) = steps
        expected = {name: loss[name] + penalty[name] for name in loss}
        assert_close(named(step, space.model), expected, self.tolerance)

    def test_a_checkpoint_resumes_to_the_same_numbers(self, tmp_path: Path) -> None:
        whole = self.learned()
        with recorded() as steps:
            self.save_between(whole, tmp_path)
        fresh = self.ready(recipe(self.page, seed=1, loop=False))
        assert fresh.regularizer.n_tasks == 0
        with recorded() as resumed:
            fresh = self.resume(fresh, tmp_path)
        _, second = steps
        (again,) = resumed
        assert same(named(again, fresh.model), named(second, whole.model))
        assert fresh.regularizer.n_tasks == whole.regularizer.n_tasks > 0
        assert same(fresh.regularizer.fisher, whole.regularizer.fisher)
        assert same(fresh.regularizer.anchor, whole.regularizer.anchor)
        assert same(trained(fresh.model), trained(whole.model))
        assert whole.regularizer() > 0
        assert torch.equal(fresh.regularizer(), whole.regularizer())
        assert same(
            gradients(fresh.model, fresh.regularizer()), gradients(whole.model, whole.regularizer())
        )

    def test_evaluation_is_not_penalised(self, tmp_path: Path) -> None:
        space = self.learned()
        space.regularizer.strength = 1e6
        assert space.regularizer() > 1
        space.model.eval()
        with torch.no_grad():
            expected = self.loss(space)
        torch.testing.assert_close(
            self.evaluate(space, tmp_path), float(expected), rtol=1e-5, atol=0
        )
