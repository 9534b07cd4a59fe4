"""Every model of the zoo: its Fisher equals one sample at a time, each parameter by its method."""

from pathlib import Path

import pytest

from tests.integrations.zoo import ZOO
from tests.integrations.zoo.entry import compare

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries', at every call

PAGE = Path(__file__).parents[3] / "docs" / "models.md"

ENTRIES = [(family, name) for family, entries in ZOO.items() for name in entries]


@pytest.mark.parametrize(("family", "name"), ENTRIES, ids=[" ".join(pair) for pair in ENTRIES])
def test_equals_one_sample_at_a_time(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = ZOO[family][name]
    pytest.importorskip(entry.library)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    compare(entry)


@pytest.mark.parametrize(("family", "name"), ENTRIES, ids=[" ".join(pair) for pair in ENTRIES])
def test_a_slow_method_has_a_reason(family: str, name: str) -> None:
    entry = ZOO[family][name]
    assert bool(entry.slow) == bool(entry.reason)


def test_the_page_has_every_model_with_its_methods() -> None:
    _, rest = PAGE.read_text(encoding="utf-8").split("<!-- zoo: begin -->")
    shown, _ = rest.split("<!-- zoo: end -->")
    rows = [line.strip("| ").split(" | ") for line in shown.splitlines() if line[:1] == "|"]
    counts = [cells for cells in rows if cells[-1].isdigit()]
    assert [cells[0].split(" (")[0] for cells in counts] == [name for _, name in ENTRIES]
    for (family, name), cells in zip(ENTRIES, counts, strict=True):
        slow = {method for method, n in zip(("vmap", "loop"), cells[2:4], strict=True) if n != "0"}
        assert slow == set(ZOO[family][name].slow.values()), name
