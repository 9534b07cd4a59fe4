"""Attributes are restored as deep as they go, and caches are emptied."""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewc import EWC, Classification
from ewc.model.guard import Guard
from tests import oracle
from tests.support.asserts import assert_close, unchanged

KEY = "cpu"


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 4).double(), torch.randint(3, (5,))


class Biased(nn.Module):
    """Adds biases to scores, as LeViT does; keeps them in eval mode."""

    def __init__(self, keep: str = "dict") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.keep = keep
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.biases = nn.Parameter(torch.randn(2))
        self.index = torch.tensor([0, 1, 1, 0])
        self.scale = torch.tensor(1.5).double()  # a constant
        self.cache: Any = {"list": list, "nested": lambda: {"a": [{}]}}.get(keep, dict)()
        self.constants = {"one": torch.ones(4).double()}
        self.cached: Tensor | None = None
        self.double()

    def bias(self) -> Tensor:
        if self.training:
            return self.make()
        if self.keep == "attribute":
            if self.cached is None:
                self.cached = self.make()
            return self.cached
        if self.keep == "list":
            if not self.cache:
                self.cache.append(self.make())
            found: Tensor = self.cache[0]
            return found
        inner = self.cache["a"][0] if self.keep == "nested" else self.cache
        if KEY not in inner:
            inner[KEY] = (self.make(), "text") if self.keep == "tuple" else self.make()
        found = inner[KEY][0] if self.keep == "tuple" else inner[KEY]
        return found

    def make(self) -> Tensor:
        return self.biases[self.index].exp()

    def forward(self, x: Tensor) -> Tensor:
        scores = (self.layer(x) + self.bias()) * self.constants["one"] * self.scale
        outputs: Tensor = self.head(F.softmax(scores, 1))
        return outputs


@contextmanager
def guarded(net: nn.Module) -> Iterator[Guard]:
    guard = Guard(net)
    guard.prepare()
    yield guard
    guard.leave()


def without_cache(net: Biased) -> Biased:
    plain = Biased(net.keep)
    plain.load_state_dict(net.state_dict())
    return plain


KINDS = ["dict", "list", "nested", "tuple", "attribute"]


@pytest.mark.parametrize("before", ["empty", "no_grad", "grad", "used", "old"])
@pytest.mark.parametrize("keep", KINDS)
@pytest.mark.parametrize("once", [False, True])
def test_a_cache_of_what_is_made_of_parameters(keep: str, before: str, once: bool) -> None:
    net, (x, y) = Biased(keep).eval(), data()
    if before == "no_grad":
        with torch.no_grad():
            net(x)
    elif before != "empty":
        outputs = net(x)
        if before == "used":
            outputs.sum().backward()
            net.zero_grad()
    if before == "old":
        net.biases.data += 1.0
    values = [net.cached, *(net.cache if keep == "list" else net.cache.values())]
    batches = [(x[:3], y[:3]), (x[3:4], y[3:4]), (x[4:], y[4:])]
    ewc = EWC(net, Classification())
    with unchanged(None, net):
        summary = ewc.consolidate(iter(batches) if once else batches)
    plain = without_cache(net)
    expected = {name: torch.zeros(p.shape).double() for name, p in net.named_parameters()}
    for n in range(5):
        plain.cache, plain.cached = Biased(keep).cache, None
        one = oracle.empirical(plain, (x[n : n + 1], y[n : n + 1]))
        expected = {name: each + one[name] / 5 for name, each in expected.items()}
    assert_close(ewc.fisher, expected, 1e-9)
    assert set(summary.paths.values()) == {"rule"}
    after = [net.cached, *(net.cache if keep == "list" else net.cache.values())]
    assert all(one is other for one, other in zip(values, after, strict=True))


@pytest.mark.parametrize(
    ("start", "change"),
    [
        ({1: 2}, lambda c: c.update({3: 4})),
        ({1: [2, {3: 4}]}, lambda c: c[1][1].clear()),
        ({1: 2, 3: 4}, lambda c: c.update({1: 4, 3: 2})),
        ({1: {2: 3}, 4: {}}, lambda c: c[4].update({2: c[1].pop(2)})),
        ({1: 2, 3: 4}, lambda c: c.update({1: c.pop(1)})),
        ([1, [2]], lambda c: c[1].append(3)),
        ([1, 2], lambda c: c.reverse()),
        ((1, [2]), lambda c: c[1].append(3)),
        ({1, 2}, lambda c: c.add(3)),
        (deque([1], maxlen=3), lambda c: c.append(2)),
        (OrderedDict(a=1), lambda c: c.popitem()),
        (defaultdict(list, a=[1]), lambda c: c["b"].append(1)),
        (dict.fromkeys(range(2000)), lambda c: c.update({5: 6})),
        ([torch.zeros(2)], lambda c: c[0].add_(1)),
        (
            {"state": torch.zeros(2)},
            lambda c: c["state"].copy_(torch.ones(2) * nn.Parameter(c["state"])),
        ),
    ],
)
def test_containers_are_restored(start: Any, change: Callable[[Any], object]) -> None:
    net = nn.Linear(2, 2)
    net.kept = start
    before = repr(start)
    with guarded(net) as guard:
        for _ in range(2):
            change(net.kept)
            assert repr(net.kept) != before or len(start) > 1000
            guard.restore()
            assert repr(net.kept) == before or len(start) > 1000
        change(net.kept)
    assert net.kept is start
    assert repr(net.kept) == before


def test_what_holds_itself() -> None:
    net: Any = nn.Linear(2, 2)
    net.kept = []
    net.kept.append(net.kept)
    with guarded(net):
        net.kept.append(1)
    assert len(net.kept) == 1


class Recurrent(nn.Module):
    """Goes on from the state that the last run has left."""

    def __init__(self, *, in_dict: bool) -> None:
        super().__init__()
        self.layer, self.head, self.in_dict = nn.Linear(4, 4), nn.Linear(4, 3), in_dict
        self.double()
        self.state = torch.full((4,), 0.5).double()
        self.kept = {"state": self.state}

    def forward(self, x: Tensor) -> Tensor:
        state = self.kept.get("state") if self.in_dict else self.state
        state = self.layer(x).tanh() + (0.0 if state is None else state)
        if self.in_dict:
            self.kept["state"] = state[0]
        else:
            self.state = state[0]
        outputs: Tensor = self.head(state**2)
        return outputs


@pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning")
@pytest.mark.parametrize("in_dict", [False, True])
def test_a_state_is_no_cache(in_dict: bool) -> None:
    net, (x, y) = Recurrent(in_dict=in_dict), data()
    ewc = EWC(net, Classification())
    with unchanged(None, net):
        ewc.consolidate([(x, y)])

    def losses(net: nn.Module, n: int) -> Tensor:
        net.state = torch.full((4,), 0.5).double()
        net.kept = {"state": net.state}
        return oracle.nll(net(x[n : n + 1]), y[n : n + 1])

    expected = oracle.squares(net, losses, 5)
    assert_close(ewc.fisher, {name: each / 5 for name, each in expected.items()}, 1e-9)


class Cached(nn.Linear):
    cache: dict[str, Tensor] = {}  # noqa: RUF012 - shared by all of the class

    def forward(self, x: Tensor) -> Tensor:
        if KEY not in self.cache:
            self.cache[KEY] = self.weight.exp()
        return F.linear(x, self.cache[KEY])


def test_a_cache_of_the_class() -> None:
    net, (x, y) = Cached(4, 3, bias=False).double(), data()
    with torch.no_grad():
        net(x)
    cached = Cached.cache[KEY]
    ewc = EWC(net, Classification())
    ewc.consolidate([(x, y)])
    assert Cached.cache[KEY] is cached
    assert ewc.fisher["weight"].all()
    Cached.cache.clear()


class Lasting(nn.Module):
    """Keeps what it has made of parameters in an attribute that was not there before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    @cached_property
    def weight(self) -> Tensor:
        return self.first.weight.exp()

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "bias"):
            self.bias = self.first.bias.exp()
        outputs: Tensor = self.second(F.linear(x, self.weight, self.bias).tanh())
        return outputs


@pytest.mark.parametrize("before", ["empty", "no_grad", "grad"])
def test_a_cache_in_an_attribute_that_was_not_there(before: str) -> None:
    net, (x, y) = Lasting().eval(), data()
    if before != "empty":
        with torch.set_grad_enabled(before == "grad"):
            net(x)
    kept = dict(vars(net))
    ewc = EWC(net, Classification())
    summary = ewc.consolidate([(x, y)])
    assert set(summary.paths.values()) == {"rule"}
    assert {name: id(each) for name, each in vars(net).items()} == {
        name: id(each) for name, each in kept.items()
    }

    def losses(plain: nn.Module, n: int) -> Tensor:
        for name in ("weight", "bias"):
            vars(plain).pop(name, None)
        return F.cross_entropy(plain(x[n : n + 1]), y[n : n + 1], reduction="none")

    expected = oracle.squares(Lasting(), losses, 5)
    assert_close(ewc.fisher, {name: each / 5 for name, each in expected.items()}, 1e-9)


def test_a_buffer_that_is_written_with_a_graph() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.register_buffer("memory", torch.zeros(2, 4))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            self.memory[0] = self.layer(x)[0].tanh()
            outputs: Tensor = self.head(self.memory.sum(0, keepdim=True))
            return outputs

    net, (x, y) = Memory(), data()
    ewc = EWC(net, Classification())
    with unchanged(None, net):
        ewc.consolidate(iter([(x[n : n + 1], y[n : n + 1]) for n in range(5)]))
    assert net.memory.is_leaf
    expected = {name: torch.zeros(p.shape).double() for name, p in net.named_parameters()}
    for n in range(5):
        one = oracle.empirical(net, (x[n : n + 1], y[n : n + 1]))
        expected = {name: each + one[name] / 5 for name, each in expected.items()}
    assert_close(ewc.fisher, expected, 1e-9)
