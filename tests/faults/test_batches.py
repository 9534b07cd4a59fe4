"""Rows 9 to 14: invalid batches and invalid negative log-likelihoods."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ewc import Classification, Custom, Regression
from tests import oracle
from tests.support.asserts import assert_close, raises, unchanged
from tests.support.tasks import CLASSES, INPUTS, make, make_model, make_task


def refused(kind, batches, *parts, error=ValueError, options=None, **arguments):
    """A first and a later consolidation refuse the batches, and change nothing."""
    for n_tasks in (0, 1):
        model, ewc = make(kind, n_tasks=n_tasks, **(options or {}))
        with unchanged(ewc, model), raises(error, *parts):
            ewc.consolidate(batches() if callable(batches) else batches, **arguments)


def exhausted():
    batches = iter(make_task())
    assert list(batches)
    return batches


@pytest.mark.parametrize(
    "batches",
    [
        list,
        lambda: iter(()),
        exhausted,
        lambda: [(torch.zeros(0, INPUTS), torch.zeros(0, dtype=torch.long))],
        lambda: DataLoader(TensorDataset(torch.zeros(2, INPUTS)), batch_size=3, drop_last=True),
    ],
    ids=["list", "iterator", "exhausted generator", "empty batch", "drop_last"],
)
def test_row_09_no_samples(kind, batches):
    refused(kind, batches, "at least one sample", "found none", "generator", "pass a fresh one")


def test_row_09a_number_of_samples_unknown(kind):
    options = {"reduction": "sum", "max_samples": 3}
    model = make_model()
    ewc = kind(model, Classification(), **options)
    with (
        unchanged(ewc, model),
        raises(ValueError, 'known for reduction="sum"', "max_samples has", "pass dataset_size"),
    ):
        ewc.consolidate(make_task())
    ewc.consolidate(make_task(), dataset_size=8)
    assert ewc.n_tasks == 1


def test_row_10_empty_batches_are_skipped(kind):
    empty = (torch.zeros(0, INPUTS), torch.zeros(0, dtype=torch.long))
    first, second = make_task()
    model, ewc = make(kind, n_tasks=0)
    summary = ewc.consolidate([empty, first, empty, second, empty])
    assert summary.samples == 8
    assert_close(ewc.fisher, oracle.fisher(model, [first, second]))


def test_row_10_a_smaller_last_batch_weighs_less(kind):
    (x, y), *_ = make_task(size=7)
    model, ewc = make(kind, n_tasks=0)
    ewc.consolidate(DataLoader(TensorDataset(x, y), batch_size=3))
    assert_close(ewc.fisher, oracle.fisher(model, [(x, y)]))


def test_row_10a_max_samples_where_a_loader_has_no_length(kind):
    (x, y), *_ = make_task(size=6)

    class Stream(IterableDataset):
        def __iter__(self):
            return zip(x, y, strict=True)

    model, ewc = make(kind, n_tasks=0, max_samples=6)
    assert ewc.consolidate(DataLoader(Stream(), batch_size=3)).samples == 6
    assert_close(ewc.fisher, oracle.fisher(model, [(x, y)]))


def test_row_10a_max_samples_within_a_batch(kind):
    (x, y), *_ = make_task(size=7)
    model, ewc = make(kind, n_tasks=0, max_samples=5)
    summary = ewc.consolidate(DataLoader(TensorDataset(x, y), batch_size=3))
    assert summary.samples == 5
    assert_close(ewc.fisher, oracle.fisher(model, [(x[:5], y[:5])]))


@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
def test_row_11_any_batch_size_gives_the_same(kind, fisher_type):
    (x, y), *_ = make_task(size=70)
    x = x.double()
    found = []
    for size in (70, 1, 7, 64):
        _, ewc = make(kind, make_model(dtype=torch.float64), 0, fisher_type=fisher_type)
        ewc.consolidate(list(zip(x.split(size), y.split(size), strict=True)))
        found.append(ewc.fisher)
    for fisher in found[1:]:
        for name, one in fisher.items():
            torch.testing.assert_close(one, found[0][name], rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize(
    ("batch", "structure"),
    [
        (SimpleNamespace(x=1), "SimpleNamespace"),
        (3, "3"),
        ("text", "'text'"),
        (None, "None"),
        ((), "()"),
        ({}, "{}"),
        (({"graph": SimpleNamespace()}, torch.zeros(4)), 'SimpleNamespace at batch[0]["graph"]'),
    ],
    ids=str,
)
def test_row_12_an_unsupported_structure(kind, batch, structure):
    good, _ = make_task()
    for place, batches in enumerate(([batch], [good, batch])):
        which = f"in batch {place} (counted from 0)"
        rule = "a batch must be a list or tuple (inputs, *rest)"
        refused(kind, batches, which, rule, structure, "forward")


def test_row_12_inputs_that_do_not_match_forward(kind):
    x, y = make_task()[0]
    refused(
        kind,
        [((x, x), y)],
        "Sequential.forward(input",
        "found the batch ((Tensor[4, 5] float32, Tensor[4, 5] float32), Tensor[4] int64)",
        "def forward(model, batch):",
    )


def test_row_12a_a_packed_sequence(kind):
    packed = pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)])
    refused(
        kind,
        [(packed, torch.zeros(2))],
        "PackedSequence at batch[0]",
        "pass the padded tensor and its lengths, and pack in forward",
        "def forward(model, batch):",
    )


def test_row_12b_missing_targets(kind):
    x, _ = make_task()[0]
    refused(kind, [x], "must hold targets", "bare tensor", "Tensor[4, 5]", '"exact"')


def test_row_12c_a_mapping_without_labels(kind):
    x, y = make_task()[0]
    parts = ("found the keys 'x', 'y'", '((b["x"], b["y"]) for b in loader)', "Custom(")
    refused(kind, [{"x": x, "y": y}], "in batch 0", *parts, 'model(batch["x"]), batch["y"]')


def test_row_12d_arrays(kind):
    x, y = make_task()[0]
    expected = "((torch.as_tensor(b[0]).float(), torch.as_tensor(b[1])) for b in loader)"
    refused(kind, [(x.double().numpy(), y.numpy())], "an array, ndarray, at batch[0]", expected)


def test_row_13_inputs_and_targets_of_different_lengths(kind):
    x, y = make_task()[0]
    for place, batches in enumerate(([(x, y[:3])], [(x, y), (x, y[:3])])):
        parts = ("the same number of samples", "batch[0]: 4", "batch[1]: 3", "Fix: ")
        refused(kind, batches, f"in batch {place}", *parts)


@pytest.mark.parametrize("label", [CLASSES, -1, 10**6])
@pytest.mark.parametrize("at", [0, 1, 7])
def test_row_13_a_label_outside_the_head(kind, label, at):
    x, y = make_task(batches=1, size=8)[0]
    y[at] = label
    parts = (f"found {label}", "0 to 2", "ignore_index (-100)", "the labels, or the size")
    refused(kind, [(x, y)], "in batch 0", *parts)
    refused(kind, [*make_task(), (x, y)], "in batch 2", *parts)


def test_row_13_a_label_outside_allowed_outputs(kind):
    x, y = make_task(batches=1, size=8)[0]
    refused(
        kind,
        [(x, y.clamp(max=2))],
        "a position in allowed_outputs (0, 2), 0 to 1",
        "found 2",
        "target_transform",
        likelihood=Classification([0, 2]),
    )


def test_row_13_regression_targets_of_another_shape(kind):
    x, _ = make_task()[0]
    for wrong in (torch.zeros(4), torch.zeros(4, 1), torch.zeros(4, CLASSES + 1)):
        found = f"[4, 3]; found Tensor{list(wrong.shape)} float32"
        refused(kind, [(x, wrong)], found, "never broadcast", likelihood=Regression())


@pytest.mark.parametrize("counts", [(2, 2), (0, 3)])
def test_row_13a_one_list_of_objects_per_sample(kind, counts):
    def nll(outputs, targets):
        rows = [each["c"].double().sum() + 1 for each in targets]
        return outputs.square().sum(1) * torch.stack(rows)

    x, _ = make_task(size=2)[0]
    targets = [{"c": torch.arange(1, 1 + n)} for n in counts]
    model, ewc = make(kind, n_tasks=0)
    ewc.consolidate([(x, targets)], likelihood=Custom(nll))

    def losses(model, n):
        return nll(model(x[n : n + 1]), targets[n : n + 1])

    expected = oracle.squares(model, losses, 2)
    assert_close(ewc.fisher, {name: each / 2 for name, each in expected.items()})
    parts = ("batch[0]: 2", "batch[1]: 3 in [{'c'", "as many entries")
    refused(kind, [(x, [*targets, {"c": torch.ones(4)}])], *parts, likelihood=Custom(nll))


def test_row_13b_a_mask_or_weights_after_the_targets(kind):
    x, y = make_task(size=6)[0]
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    model, ewc = make(kind, n_tasks=0)
    assert ewc.consolidate([(x, torch.where(mask, y, 99), mask)]).samples == 6
    expected = oracle.fisher(model, [(x[mask], y[mask])])
    assert_close(ewc.fisher, {name: each * 4 / 6 for name, each in expected.items()})
    for extra in (torch.rand(6), torch.rand(6, 2), torch.ones(6, 2).bool()):
        parts = ("a boolean mask", "as rest[1]", "((x, extra), y)", "weights * Classification")
        refused(kind, [(x, y, extra)], "in batch 0", *parts)


@pytest.mark.parametrize(
    ("nll", "parts"),
    [
        (F.cross_entropy, ["found a tensor of shape []", "reduction='none'"]),
        (lambda o, y: F.cross_entropy(o, y).item(), ["found float"]),
        (lambda o, y: o.log_softmax(1), ["found a tensor of shape [4, 3]", "reduction='none'"]),
        (lambda o, y: torch.cat([o.sum(1)] * 2), ["found a tensor of shape [8]"]),
        (lambda o, y: o.sum(1)[:0], ["found a tensor of shape [0]"]),
        (lambda o, y: F.cross_entropy(o.detach(), y, reduction="none"), ["without a graph"]),
        (lambda o, y: None, ["found NoneType"]),
        (lambda o, y: o.sum(1).cfloat(), ["real numbers; found torch.complex64"]),
    ],
    ids=["scalar", "number", "unreduced", "too long", "too short", "detached", "none", "complex"],
)
def test_row_14_an_invalid_nll(kind, nll, parts):
    expected = "Custom must define nll(outputs, *rest) -> [4], one value per sample, not reduced"
    refused(kind, make_task(), expected, *parts, likelihood=Custom(nll))


def test_row_14a_an_nll_of_other_arguments(kind):
    parts = ("nll(outputs, *rest)", "found nll(out)", "rest = (Tensor[4] int64)")
    refused(kind, make_task(), *parts, likelihood=Custom(lambda out: out.sum(1)))


def test_row_14b_an_nll_that_compares_samples(kind):
    def contrastive(outputs, targets):
        return F.softplus((1 - 2 * torch.eye(len(outputs))) * (outputs @ outputs.t())).sum(1)

    name = "Custom.nll (test_row_14b_an_nll_that_compares_samples.<locals>.contrastive)"
    model = make_model()
    ewc = kind(model, Custom(contrastive))
    with unchanged(ewc, model), raises(ValueError, f"{name} compares them", "[1, B, d]"):
        ewc.consolidate(make_task())


def test_row_14_without_a_graph_under_no_grad(kind):
    class NoGrad(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(INPUTS, CLASSES)

        @torch.no_grad()
        def forward(self, x):
            return self.layer(x)

    model = NoGrad()
    ewc = kind(model, Classification())
    with unchanged(ewc, model), raises(ValueError, "without a graph", "do not detach", "no_grad"):
        ewc.consolidate(make_task())
