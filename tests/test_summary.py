import dataclasses

import pytest
import torch

from ewc._summary import Curvature, Summary, fold, measure, together

SUMMARY = Summary(
    n_tasks=2,
    samples=60,
    parameters={
        "0.weight": Curvature(1200, 9.0, 0.25),
        "0.bias": Curvature(30, 3.0, 0.125),
        "scale": Curvature(1, 0.125, 0.125),
        "rnn": Curvature(40, 0.375, 0.0625),
        "x": Curvature(5, 0.0, 0.0),
    },
    paths={"0.weight": "rule", "0.bias": "rule", "scale": "vmap", "rnn": "loop"},
    reasons={"rnn": "it is used out of sight"},
)
LAYERS = {f"h.{i}.{name}": Curvature(4, float(i), 1.0) for i in range(9) for name in ("w", "b")}


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SUMMARY.samples = 3


def test_trace_and_largest_are_those_of_all_parameters():
    assert SUMMARY.trace == 12.5
    assert SUMMARY.largest == 0.25


def test_repr_says_all():
    summary = dataclasses.replace(SUMMARY, paths={**SUMMARY.paths, "x": "unused"})
    assert repr(summary).splitlines() == [
        "Task 2: 60 samples, trace 12.5, largest entry 0.25",
        "  stable steps: lr * strength < 8",
        "  rule (closed form): 0.weight, 0.bias",
        "  vmap (per-sample gradients): scale",
        "  loop (one sample at a time, slow): rnn",
        "    because it is used out of sight",
        "  unused (no gradient): x",
    ]


def test_repr_shortens_long_lists():
    summary = dataclasses.replace(SUMMARY, paths={f"{i}.weight": "rule" for i in range(50)})
    assert "0.weight, 1.weight" in repr(summary)
    assert "(50 in all)" in repr(summary)
    assert "49.weight" not in repr(summary)


def test_print_shows_a_row_for_each_parameter():
    assert str(SUMMARY).splitlines() == [
        "Task 2: 60 samples, trace 12.5, largest entry 0.25",
        "  stable steps: lr * strength < 8",
        "            entries   trace     mean  largest  path",
        "  0.weight    1,200   72.0%   0.0075     0.25  rule",
        "  0.bias         30   24.0%      0.1    0.125  rule",
        "  scale           1    1.0%    0.125    0.125  vmap",
        "  rnn            40    3.0%  0.00937   0.0625  loop",
        "  x               5    0.0%        0        0  earlier",
        "  all         1,276  100.0%   0.0098     0.25",
        "  loop because it is used out of sight",
    ]


def test_table_folds_by_layer_and_then_drops_the_least():
    summary = dataclasses.replace(
        SUMMARY, parameters=LAYERS, paths=dict.fromkeys(LAYERS, "rule"), reasons={}
    )
    labels = [line.split()[0] for line in summary.table(rows=18).splitlines()[1:]]
    assert labels == [*LAYERS, "all"]
    labels = [line.split()[0] for line in summary.table(rows=17).splitlines()[1:]]
    assert labels == [*(f"h.{i}" for i in range(9)), "all"]
    assert summary.table(rows=1).splitlines()[1].split()[:2] == ["h", "72"]
    assert "rule" in summary.table(rows=1)
    with pytest.raises(ValueError, match="rows"):
        summary.table(rows=0)


def test_table_of_nothing():
    summary = dataclasses.replace(SUMMARY, parameters={}, paths={}, reasons={})
    assert summary.table().split()[-5:-1] == ["all", "0", "0.0%", "0"]


def test_fold_keeps_the_groups_with_the_most_curvature():
    flat = {f"{i}.weight": Curvature(1, float(i % 3), 1.0) for i in range(6)}
    assert fold(flat, 3) == {
        "2": ["2.weight"],
        "5": ["5.weight"],
        "4 others": ["0.weight", "1.weight", "3.weight", "4.weight"],
    }
    assert sum(map(len, fold(flat, 1).values())) == len(flat)


def test_measure():
    tensors = {
        "a": torch.tensor([1.0, 3.0]),
        "none": torch.zeros(0),
        "b": torch.tensor([[2.0, 0.5]], dtype=torch.float64),
    }
    assert measure(tensors) == {
        "a": Curvature(2, 4.0, 3.0),
        "none": Curvature(0, 0.0, 0.0),
        "b": Curvature(2, 2.5, 2.0),
    }
    assert measure({}) == {}
    assert together(measure(tensors).values()) == Curvature(4, 6.5, 3.0)
    assert Curvature(0, 0.0, 0.0).mean == 0.0


def test_bound():
    assert SUMMARY.bound == 8.0
    flat = dataclasses.replace(SUMMARY, parameters={"x": Curvature(1, 0.0, 0.0)})
    assert flat.bound == float("inf")
