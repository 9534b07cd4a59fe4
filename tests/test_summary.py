import dataclasses

import pytest

from ewc._summary import Summary

SUMMARY = Summary(
    task=2,
    samples=60,
    trace=12.5,
    largest=0.25,
    paths={"0.weight": "rule", "0.bias": "rule", "scale": "vmap", "rnn": "loop", "x": "unused"},
    reasons={"rnn": "it is used out of sight"},
)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SUMMARY.samples = 3


def test_repr_says_all():
    assert repr(SUMMARY).splitlines() == [
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


def test_bound():
    assert SUMMARY.bound == 8.0
    assert dataclasses.replace(SUMMARY, largest=0.0).bound == float("inf")
