import dataclasses

import pytest
import torch

from ewc import Curvature, Summary
from ewc._summary import combined, group_by_layer, measure

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
    strength=4.0,
    reasons={"rnn": "it is used out of sight"},
)
LAYERS = {f"h.{i}.{name}": Curvature(4, float(i), 1.0) for i in range(9) for name in ("w", "b")}


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SUMMARY.samples = 3


def test_trace_and_largest_are_those_of_all_parameters():
    assert SUMMARY.trace == 12.5
    assert SUMMARY.largest == 0.25


def test_repr_and_print_are_totals_and_table_and_reasons():
    assert str(SUMMARY) == repr(SUMMARY)
    assert repr(SUMMARY).splitlines() == [
        "Task 2: 60 samples, trace 12.5, largest entry 0.25",
        "  strength 4: SGD is stable for lr < 2, with momentum 0.9 for lr < 3.8",
        "  if earlier tasks are forgotten, try 8 (with Adam up to 80)",
        "  if the current task is hardly learned, try 1.6",
        "            entries   trace     mean  largest  path",
        "  0.weight    1,200   72.0%   0.0075     0.25  rule",
        "  0.bias         30   24.0%      0.1    0.125  rule",
        "  scale           1    1.0%    0.125    0.125  vmap",
        "  rnn            40    3.0%  0.00937   0.0625  loop",
        "  x               5    0.0%        0        0  earlier",
        "  all         1,276  100.0%   0.0098     0.25",
        "  loop: rnn, because it is used out of sight",
    ]


def test_repr_is_capped():
    names = [f"{i}.weight" for i in range(50)]
    summary = dataclasses.replace(
        SUMMARY,
        parameters={name: Curvature(1, 1.0, 1.0) for name in names},
        paths=dict.fromkeys(names, "loop"),
        reasons=dict.fromkeys(names, "it is used out of sight"),
    )
    lines = repr(summary).splitlines()
    assert len(lines) == 4 + 1 + 20 + 1 + 1  # totals, header, rows, "all", one reason
    assert lines[-3].split()[:2] == ["31", "others"]
    assert lines[-1].startswith("  loop: 0.weight, 1.weight, ")
    assert lines[-1].endswith(", 5.weight, ... (50 in all), because it is used out of sight")


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


def test_grouping_keeps_the_groups_with_the_most_curvature():
    flat = {f"{i}.weight": Curvature(1, float(i % 3), 1.0) for i in range(6)}
    assert group_by_layer(flat, 3) == {
        "2": ["2.weight"],
        "5": ["5.weight"],
        "4 others": ["0.weight", "1.weight", "3.weight", "4.weight"],
    }
    assert sum(map(len, group_by_layer(flat, 1).values())) == len(flat)


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
    assert combined(measure(tensors).values()) == Curvature(4, 6.5, 3.0)
    assert Curvature(0, 0.0, 0.0).mean == 0.0


def test_bound():
    assert SUMMARY.bound == 8.0
    flat = dataclasses.replace(SUMMARY, parameters={"x": Curvature(1, 0.0, 0.0)})
    assert flat.bound == float("inf")
