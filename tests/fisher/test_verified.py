"""What was verified is not verified again, unless something has changed that it rests on."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ewc.fisher.collection as collection
from ewc import EWC, Classification, Custom, InvalidBatch, Likelihood, OnlineEWC
from ewc.fisher.paths import vectorised
from tests import oracle
from tests.support.tasks import CLASSES, INPUTS, make_model, make_task, shift


class Environment:
    """What a model reads where no search looks: attributes of a class."""

    tanh = draws = fails = copies = False


class Model(nn.Module):
    """Its behaviour depends on much that may change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(INPUTS, 6), nn.Linear(6, CLASSES)
        self.register_buffer("scale", torch.ones(6))
        self.config = SimpleNamespace(mixes=False)
        self.options = {"mixes": False}
        self.mixes = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale * self.body(x)
        if self.mixes or self.config.mixes or self.options["mixes"]:
            h = h - h.mean(0)
        h = torch.tanh(h) if Environment.tanh else torch.relu(h)
        outputs: Tensor = self.head(h)
        return outputs


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each verification."""
    found: list[str] = []
    original = collection.verify

    def verify(*args: Any) -> Any:
        found.append("verified")
        return original(*args)

    monkeypatch.setattr(collection, "verify", verify)
    return found


def make(kind: type[EWC] = EWC, **options: Any) -> tuple[Model, EWC]:
    model = Model()
    return model, kind(model, options.pop("likelihood", Classification()), **options)


def expected(model: nn.Module, batches: Any) -> dict[str, Tensor]:
    x, y = (torch.cat(each) for each in zip(*batches, strict=True))
    model = copy.deepcopy(model).double()
    found = oracle.squares(
        model, lambda m, n: oracle.nll(m(x[n : n + 1].double()), y[n : n + 1]), len(x)
    )
    return {name: each / len(x) for name, each in found.items()}


@pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
def test_a_second_consolidation_does_not_verify(verified: list[str], fisher_type: Any) -> None:
    model, regularizer = make(OnlineEWC, decay=0.5, fisher_type=fisher_type)
    for task in range(3):
        regularizer.consolidate(make_task(task))
        shift(model, task)
    regularizer.consolidate(make_task(3, size=9))  # another number of samples
    assert len(verified) == 1


def test_the_fisher_is_right_without_a_verification(verified: list[str]) -> None:
    model, regularizer = make(OnlineEWC, decay=0.0, prior_precision=1.0)
    regularizer.consolidate(make_task(0))
    shift(model)
    regularizer.consolidate(make_task(1, size=7))
    assert len(verified) == 1
    for name, right in expected(model, make_task(1, size=7)).items():
        torch.testing.assert_close(regularizer.fisher[name].double(), right, rtol=1e-5, atol=1e-9)


def test_what_is_drawn_does_not_depend_on_a_verification() -> None:
    found = []
    for consolidations in (1, 2):
        model, regularizer = make(OnlineEWC, decay=0.0, prior_precision=1.0, fisher_type="mc")
        for _ in range(consolidations):
            generator = torch.Generator().manual_seed(1)
            regularizer.consolidate(make_task(1), generator=generator)
        found.append(regularizer.fisher)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def add_hook(model: Model) -> None:
    model.body.register_forward_hook(lambda module, args, output: output * 2)


def replace_head(model: Model) -> None:
    model.head = nn.Linear(6, CLASSES)


def use_other_calls(model: Model) -> None:
    Environment.tanh = True


def set_forward(model: Model) -> None:
    body = model.body
    model.body.forward = lambda x: F.linear(x, body.weight, body.bias)  # type: ignore[method-assign]


def share(model: Model) -> None:
    model.other = model.body


def freeze(model: Model) -> None:
    model.body.bias.requires_grad_(False)


def widen(model: Model) -> None:
    model.scale = model.scale.expand(1, 6)


def set_attribute(model: Model) -> None:
    model.head.anything = "else"


CHANGES = [
    *(add_hook, replace_head, use_other_calls, set_forward, share, freeze, widen, set_attribute)
]


@pytest.mark.filterwarnings("ignore::ewc.ReplacedParameterWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_verified(
    verified: list[str], change: Callable[[Model], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Environment, "tanh", False)
    model, regularizer = make()
    regularizer.consolidate(make_task())
    change(model)
    regularizer.consolidate(make_task())
    assert len(verified) == 2
    regularizer.consolidate(make_task())
    assert len(verified) == 2


@pytest.mark.parametrize("where", ["attribute", "object", "container"])
def test_a_model_that_begins_to_mix_samples_is_refused(where: str) -> None:
    model, regularizer = make()
    regularizer.consolidate(make_task())
    if where == "attribute":
        model.mixes = True
    elif where == "object":
        model.config.mixes = True
    else:
        model.options["mixes"] = True
    with pytest.raises(ValueError, match="mixes them"):
        regularizer.consolidate(make_task())


def closing_over(kind: dict[str, bool]) -> Callable[[nn.Module, Any], Tensor]:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        outputs: Tensor = model(batch[0])
        return outputs - outputs.mean(0) if kind["mixes"] else outputs

    return forward


def test_a_change_in_what_a_forward_closes_over_is_noticed() -> None:
    kind = {"mixes": False}
    _, regularizer = make(forward=closing_over(kind))
    regularizer.consolidate(make_task())
    kind["mixes"] = True
    with pytest.raises(ValueError, match="mixes them"):
        regularizer.consolidate(make_task())


def test_a_likelihood_that_begins_to_compare_samples_is_refused() -> None:
    kind = {"compares": False}

    def nll(outputs: Tensor, targets: Tensor) -> Tensor:
        values = oracle.nll(outputs, targets)
        return values - values.mean() if kind["compares"] else values

    _, regularizer = make(likelihood=Custom(nll))
    regularizer.consolidate(make_task())
    kind["compares"] = True
    with pytest.raises(ValueError, match="compare"):
        regularizer.consolidate(make_task())


class Gated(nn.Module):
    """Mixes samples as much as a value says: a parameter, a buffer or an attribute of a class."""

    share = 0.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(INPUTS, 6), nn.Linear(6, CLASSES)
        self.gate = nn.Parameter(torch.zeros(()))
        self.register_buffer("scale", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        outputs: Tensor = self.head(h - (self.gate + self.scale + self.share) * h.mean(0))
        return outputs


@pytest.mark.parametrize("where", ["gate", "scale", "share"])
def test_a_value_by_which_a_model_begins_to_mix_samples(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Gated()
    regularizer = EWC(model, Classification())
    regularizer.consolidate(make_task())
    if where == "share":
        monkeypatch.setattr(Gated, "share", 0.5)
    else:
        getattr(model, where).data.fill_(0.5)
    with pytest.raises(ValueError, match="mixes them"):
        regularizer.consolidate(make_task())


def test_a_value_by_which_a_likelihood_begins_to_compare_samples() -> None:
    share = torch.zeros(())

    def nll(outputs: Tensor, targets: Tensor) -> Tensor:
        values = oracle.nll(outputs, targets)
        return values - share * values.mean()

    _, regularizer = make(likelihood=Custom(nll))
    regularizer.consolidate(make_task())
    share.fill_(0.5)
    with pytest.raises(ValueError, match="compare"):
        regularizer.consolidate(make_task())


def test_a_task_of_one_class_does_not_show_that_classes_are_compared() -> None:
    def nll(outputs: Tensor, targets: Tensor) -> Tensor:
        weights = 1 / torch.bincount(targets, minlength=CLASSES)
        return oracle.nll(outputs, targets) * weights[targets]

    _, regularizer = make(likelihood=Custom(nll))
    regularizer.consolidate([(x, torch.zeros_like(y)) for x, y in make_task()])
    with pytest.raises(ValueError, match="compare"):
        regularizer.consolidate(make_task())


@pytest.mark.parametrize("kept_bytes", [1000, 2**26])
@pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
def test_the_first_run_that_counts_shows_other_calls(
    fisher_type: Any, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it holds a part of a batch or several batches; its squares are added once."""
    monkeypatch.setitem(vectorised.KEPT_BYTES, "cpu", kept_bytes)
    found = []
    for began_with_tanh in (False, True):
        model, regularizer = make(
            OnlineEWC, decay=0.0, prior_precision=1.0, fisher_type=fisher_type
        )
        monkeypatch.setattr(Environment, "tanh", began_with_tanh)
        regularizer.consolidate(make_task(0))
        shift(model)
        monkeypatch.setattr(Environment, "tanh", True)
        generator = torch.Generator().manual_seed(1)
        regularizer.consolidate(make_task(1, size=20), generator=generator)
        found.append(regularizer.fisher)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("row", [0, 5])
def test_an_error_in_a_recalled_run_names_its_batch(row: int) -> None:
    _, regularizer = make()
    regularizer.consolidate(make_task())
    before = regularizer.fisher
    batches = make_task(1, size=9)
    batches[-1][1][row] = CLASSES
    with pytest.raises(InvalidBatch, match=f"batch {len(batches) - 1}"):
        regularizer.consolidate(batches)
    torch.testing.assert_close(regularizer.fisher, before, rtol=0, atol=0)
    regularizer.consolidate(make_task())


class Dropping(Model):
    """Draws as soon as it is told to, by the same calls."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.body(x), 1e-6, training=Environment.draws)
        outputs: Tensor = self.head(h)
        return outputs


def test_a_model_that_begins_to_draw_is_verified(
    verified: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    regularizer = EWC(Dropping(), Classification())
    regularizer.consolidate(make_task())
    monkeypatch.setattr(Environment, "draws", True)
    regularizer.consolidate(make_task())
    assert len(verified) == 2


def test_draws_are_seen_beside_another_thread_in_batches_of_one_sample(
    verified: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Environment, "draws", False)
    regularizer = EWC(Dropping(), Classification())
    regularizer.consolidate(make_task())
    monkeypatch.setattr(Environment, "draws", True)
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        before = torch.get_rng_state()
        regularizer.consolidate(make_task(batches=3, size=1))
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        stop.set()
        other.join()
    assert len(verified) == 2


def test_drawn_targets_have_terms_of_their_own(verified: list[str]) -> None:
    def nll(outputs: Tensor, targets: Tensor) -> Tensor:
        assert bool(outputs.isfinite().all())
        return oracle.nll(outputs, targets)

    class Reading(Likelihood):
        def nll(self, outputs: Tensor, targets: Tensor, *_: Any) -> Tensor:
            return nll(outputs, targets)

        def sample(self, outputs: Tensor) -> Tensor:
            return torch.distributions.Categorical(logits=outputs).sample()

    _, regularizer = make(likelihood=Reading(), fisher_type="mc")
    regularizer.consolidate(make_task())
    regularizer.consolidate(make_task())
    assert len(verified) == 1


class Failing(Model):
    """Fails once, when it is told to."""

    def forward(self, x: Tensor) -> Tensor:
        if torch._C._functorch.maybe_current_level() and Environment.fails:
            Environment.fails = False
            raise OSError("no connection")
        outputs: Tensor = super().forward(x)
        return outputs


def test_an_error_that_is_raised_once_is_no_change_of_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Environment, "fails", False)
    regularizer = EWC(Failing(), Classification())
    regularizer.consolidate(make_task())
    Environment.fails = True
    with pytest.raises(OSError, match="no connection"):
        regularizer.consolidate(make_task())


class Copying(Model):
    """Has a rule for its head, or a copy per sample."""

    def forward(self, x: Tensor) -> Tensor:
        if Environment.copies:
            h = torch.maximum(self.body(x).unsqueeze(1), self.head.weight).sum(2)
            return h + self.head.bias
        outputs: Tensor = super().forward(x)
        return outputs


def test_the_parts_of_a_batch_fit_the_methods_that_are_verified_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Environment, "copies", False)
    model = Copying()
    regularizer = OnlineEWC(model, Classification(), decay=0.0, prior_precision=1.0)
    regularizer.consolidate(make_task())
    monkeypatch.setattr(Environment, "copies", True)
    monkeypatch.setattr(vectorised, "WRITTEN_BYTES", 5 * model.head.weight.nbytes)
    sizes: list[int] = []
    forward = vectorised.Vectorised.forward

    def logged(self: Any, batch: Any, sums: Any) -> Any:
        sizes.append(batch.size)
        return forward(self, batch, sums)

    monkeypatch.setattr(vectorised.Vectorised, "forward", logged)
    regularizer.consolidate(make_task(1, batches=2, size=40))
    dropped, verification, *counted = sizes
    assert (dropped, verification) == (80, 2)
    assert max(counted) <= 5
    assert sum(counted) == 80
    right = expected(model, make_task(1, batches=2, size=40))
    torch.testing.assert_close(
        regularizer.fisher["head.weight"].double(), right["head.weight"], rtol=1e-5, atol=1e-9
    )


def test_other_calls_of_a_likelihood_are_verified(verified: list[str]) -> None:
    kind = {"tanh": False}
    look = kind.get  # no search looks behind a C function

    def nll(outputs: Tensor, targets: Tensor) -> Tensor:
        return oracle.nll(outputs.tanh() if look("tanh") else outputs, targets)

    _, regularizer = make(likelihood=Custom(nll))
    regularizer.consolidate(make_task())
    kind["tanh"] = True
    regularizer.consolidate(make_task())
    assert len(verified) == 2


class Product(nn.Module):
    """At first, every entry of `inner` reaches one entry of the effective weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Parameter(torch.randn(INPUTS, INPUTS))
        self.outer, self.head = nn.Parameter(torch.eye(INPUTS)), nn.Linear(INPUTS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(F.linear(x, self.outer @ self.inner).tanh())
        return outputs


def test_the_structure_of_effective_weights_may_change_with_their_values(
    verified: list[str],
) -> None:
    model = Product()
    regularizer = OnlineEWC(
        model, Classification(), decay=0.0, prior_precision=1.0, parameters=["inner"]
    )
    regularizer.consolidate(make_task(0))
    shift(model)
    regularizer.consolidate(make_task(1))
    assert len(verified) == 1
    right = expected(model, make_task(1))["inner"]
    torch.testing.assert_close(regularizer.fisher["inner"].double(), right, rtol=1e-5, atol=1e-9)


def test_other_arguments_are_verified(verified: list[str]) -> None:
    _, regularizer = make()
    regularizer.consolidate(make_task())
    regularizer.consolidate(make_task(), likelihood=Classification(allowed_outputs=[0, 1, 2]))
    regularizer.consolidate(make_task(), forward=lambda model, batch: model(batch[0]))
    regularizer.consolidate([{"x": x, "labels": y} for x, y in make_task()])
    with torch.autocast("cpu", torch.bfloat16):
        regularizer.consolidate(make_task())
    assert len(verified) == 5


def test_equal_arguments_are_not_verified(verified: list[str]) -> None:
    _, regularizer = make()
    for _ in range(2):
        regularizer.consolidate(
            make_task(),
            likelihood=Classification(allowed_outputs=[0, 1, 2]),
            forward=closing_over({"mixes": False}),
        )
    assert len(verified) == 1


class Reading(nn.Module):
    """Takes a branch by a value, which no other verification covers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.inner(x)
        return outputs if x.isfinite().all() else outputs * 0


class Noisy(Reading):
    """Draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.inner(x + 0.1 * torch.randn_like(x))
        return outputs


class Zero(Reading):
    """The gradient of a parameter is zero at first, so that nothing can be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(INPUTS, 2), nn.Linear(2, INPUTS)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.inner(x + self.down(self.up(x)))
        return outputs


@pytest.mark.filterwarnings("ignore::ewc.SlowPathWarning", "ignore::ewc.ZeroFisherWarning")
@pytest.mark.parametrize("kind", [Reading, Noisy, Zero])
def test_what_cannot_be_relied_on_is_verified_every_time(
    verified: list[str], kind: type[nn.Module]
) -> None:
    regularizer = EWC(kind(), Classification())
    for _ in range(2):
        regularizer.consolidate(make_task())
    assert len(verified) == 2


def test_one_sample_shows_too_little(verified: list[str]) -> None:
    _, regularizer = make()
    for _ in range(2):
        regularizer.consolidate(make_task(size=1))
    assert len(verified) == 2


def test_a_copy_remembers_nothing(verified: list[str]) -> None:
    _, regularizer = make()
    regularizer.consolidate(make_task())
    assert pickle.loads(pickle.dumps(regularizer._verification)).verified is None
    copy.deepcopy(regularizer).consolidate(make_task())
    assert len(verified) == 2


def test_nothing_of_the_model_is_kept_alive() -> None:
    model, regularizer = make()
    regularizer.consolidate(make_task())
    head = weakref.ref(model.head)
    replace_head(model)
    regularizer._binding = None
    gc.collect()
    assert head() is None
