"""The picture of a Fisher: what it shows, and what it refuses."""

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from ewc import EWC, Classification, OnlineEWC
from ewc._summary import measure
from ewc.plot import _histogram, plot_fisher

pyplot = pytest.importorskip("matplotlib.pyplot")
pyplot.switch_backend("Agg")


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    pyplot.close("all")


def consolidated(kind: type[EWC] = EWC, layers: int = 2) -> EWC:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), *(nn.Linear(5, 5) for _ in range(layers - 1)))
    ewc = kind(model, Classification())
    ewc.consolidate([(torch.randn(20, 6), torch.randint(5, (20,)))])
    return ewc


def labels(figure) -> list[str]:
    figure.canvas.draw()
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


@pytest.mark.parametrize("kind", [EWC, OnlineEWC])
def test_has_a_row_for_each_parameter(kind):
    figure = plot_fisher(consolidated(kind))
    assert labels(figure) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert figure.get_suptitle() == "Fisher information after 1 task"


def test_folds_many_parameters_by_layer():
    ewc = consolidated(layers=4)
    assert labels(plot_fisher(ewc, rows=5)) == ["0", "1", "2", "3"]
    assert len(plot_fisher(ewc, rows=2).axes[0].images) == 2


def test_shares_are_those_of_the_trace():
    ewc = consolidated()
    figure = plot_fisher(ewc)
    traces = [one.trace for one in measure(ewc.fisher).values()]
    widths = [bar.get_width() for bar in figure.axes[1].patches]
    assert widths == pytest.approx([100 * trace / sum(traces) for trace in traces])


def test_the_histogram_counts_every_entry_in_its_decade():
    tensors = [torch.tensor([1.0, 0.99, 1e-3]), torch.tensor([[0.0, 1e-30]], dtype=torch.float64)]
    counts = _histogram(tensors, top=0.0)
    assert counts[-1] == 2  # the top itself among them
    assert counts[:-1].sum() == 1
    assert counts.sum() == 3  # nothing of 0 and of what is nearly 0
    assert _histogram([torch.zeros(0)], top=0.0).sum() == 0


def test_an_empty_parameter_and_one_of_zeros_are_drawn():
    ewc = consolidated()
    state = ewc.state_dict()
    state["fisher"]["0.bias"].zero_()
    ewc.load_state_dict(state)
    plot_fisher(ewc).canvas.draw()


def test_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="consolidate first"):
        plot_fisher(EWC(nn.Linear(2, 2), Classification()))
    with pytest.raises(TypeError, match="found Linear"):
        plot_fisher(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rows"):
        plot_fisher(consolidated(), rows=0)


def test_says_how_to_get_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="Fix: pip install matplotlib"):
        plot_fisher(consolidated())
