"""The precision of products during a collection, whatever the caller has set in whichever way."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.precision import CALLERS, HAS_SETTINGS

Observed = dict[tuple[str, bool], dict[str, Any]]


@pytest.fixture(scope="module")
def observed() -> Observed:
    """By caller, and whether it consolidates: what is in force, each in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.support.precision"],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = map(json.loads, done.stdout.splitlines())
    return {(caller, consolidates): found for caller, consolidates, found in rows}


@pytest.mark.parametrize("caller", CALLERS)
def test_settings_are_restored_with_what_they_inherit(observed: Observed, caller: str) -> None:
    assert observed[caller, True]["after"] == observed[caller, False]["after"]


@pytest.mark.parametrize("caller", CALLERS)
def test_methods_are_compared_in_full_precision(observed: Observed, caller: str) -> None:
    # In this order: two samples together, each alone, and by the fast methods; then the batch.
    *compared, last = observed[caller, True]["seen"]
    assert len(compared) == 4
    for seen in compared:
        assert not seen["cuDNN"]
        assert seen["cuda.matmul.allow_tf32"] is False
        assert seen["matmul precision"] == "highest"
        if HAS_SETTINGS:
            products = ("cuda.matmul", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
            assert {seen[product] for product in products} <= {"none", "ieee"}
    assert last == observed[caller, False]["after"][0]  # the caller's precision
