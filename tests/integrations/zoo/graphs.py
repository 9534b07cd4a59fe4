"""Graph networks of PyTorch Geometric."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.integrations.zoo.data import CLASSES, SAMPLES, classes, numbers
from tests.integrations.zoo.entry import Entry
from tests.integrations.zoo.task import CLASS

NODES, FEATURES, WIDTH = 5, 3, 4

Make = Callable[[Any, int, int], nn.Module]
"""`make(torch_geometric.nn, inputs, outputs)`, a layer."""


class Graphs(nn.Module):
    """A graph for each sample: two layers, the mean over its nodes, a head."""

    def __init__(self, make: Make) -> None:
        import torch_geometric.nn as layers

        super().__init__()
        self.first, self.second = make(layers, FEATURES, WIDTH), make(layers, WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        return torch.stack([self.one(*graph) for graph in zip(nodes, edges, strict=True)])

    def one(self, nodes: Tensor, edges: Tensor) -> Tensor:
        hidden = self.second(self.first(nodes, edges).tanh(), edges).tanh()
        out: Tensor = self.head(hidden.mean(-2))
        return out


class Signals(Graphs):
    """Signals on the nodes of one graph, that of the first sample."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.register_buffer("edges", graphs()[0][1][0])

    def forward(self, nodes: Tensor) -> Tensor:  # type: ignore[override]
        return self.one(nodes, self.edges)


def graphs() -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Nodes in a ring with three chords, other ones for each sample; a class for each."""
    ring = torch.stack([torch.arange(NODES), torch.arange(NODES).roll(1)])
    start = torch.arange(3).expand(SAMPLES, 3)
    chords = torch.stack([start, (start + 1 + classes(3, most=NODES - 1)) % NODES], 1)
    edges = torch.cat([ring.expand(SAMPLES, 2, NODES), chords], 2)
    return (numbers(NODES, FEATURES), edges), classes()


def signals() -> tuple[Tensor, Tensor]:
    return graphs()[0][0], classes()


def entry(make: Make, **fields: Any) -> Entry:
    return Entry("torch_geometric", lambda: Graphs(make), graphs, CLASS, **fields)


def on_one_graph(make: Make, **fields: Any) -> Entry:
    return Entry("torch_geometric", lambda: Signals(make), signals, CLASS, **fields)


def isomorphism(layers: Any, i: int, o: int) -> nn.Module:
    network = nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, o))
    layer: nn.Module = layers.GINConv(network, train_eps=True)
    return layer


def principal(layers: Any, i: int, o: int) -> nn.Module:
    degrees = torch.tensor([0, 2, 3, 1])
    means, scales = ["mean", "max", "std"], ["identity", "amplification"]
    layer: nn.Module = layers.PNAConv(i, o, means, scales, degrees)
    return layer


ENTRIES: dict[str, Entry] = {
    "GCN": entry(lambda g, i, o: g.GCNConv(i, o)),
    "GCN, no self-loops": entry(lambda g, i, o: g.GCNConv(i, o, add_self_loops=False)),
    "GCN, one graph": on_one_graph(lambda g, i, o: g.GCNConv(i, o)),
    "GAT": entry(lambda g, i, o: g.GATConv(i, o, heads=2, concat=False)),
    "GAT, no self-loops": entry(
        lambda g, i, o: g.GATConv(i, o, heads=2, concat=False, add_self_loops=False)
    ),
    "GATv2": entry(lambda g, i, o: g.GATv2Conv(i, o, heads=2, concat=False)),
    "GraphSAGE": entry(lambda g, i, o: g.SAGEConv(i, o)),
    "GraphSAGE, maximum": entry(lambda g, i, o: g.SAGEConv(i, o, aggr="max")),
    "GraphSAGE, one graph": on_one_graph(lambda g, i, o: g.SAGEConv(i, o)),
    "GIN": entry(isomorphism),
    "graph transformer": entry(lambda g, i, o: g.TransformerConv(i, o, heads=2, concat=False)),
    "GraphConv": entry(lambda g, i, o: g.GraphConv(i, o)),
    "gated graph": entry(lambda g, i, o: g.GatedGraphConv(o, 2)),
    "ChebNet": entry(lambda g, i, o: g.ChebConv(i, o, 2)),
    "PNA": entry(principal),
}
