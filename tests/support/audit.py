"""The page of the audit as tables, and a small task with the gradients of all its labels."""

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ewc import Classification, diagonal_fisher
from ewc.likelihoods import Likelihood

PAGE = (Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")


class Row(NamedTuple):
    repository: str
    strength: str
    penalty: str
    labels: str
    mode: str
    then: str
    commit: str
    link: str


def rows(section: str) -> dict[str, Row]:
    """The table of a section, by repository."""
    text = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (part,) = [each for each in text if each.startswith(f"{section}\n")]
    table = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| [")]
    table = [row if len(row) == 8 else [*row[:2], "none", *row[2:]] for row in table]
    found = [Row(re.findall(r"\[(.*?)\]", code)[0], *rest) for code, *rest in table]
    assert len({row.repository for row in found}) == len(found)
    return {row.repository: row for row in found}


class Task(NamedTuple):
    """A small network and data, and the gradients of all log-probabilities."""

    model: nn.Module
    x: Tensor  # [N, inputs]
    y: Tensor  # [N]
    batch: int
    scores: Tensor  # [N, K, P], gradients of log p_k
    p: Tensor  # [N, K]

    @property
    def most_probable(self) -> Tensor:
        return self.p.argmax(1)

    @property
    def sampled(self) -> Tensor:
        return torch.multinomial(self.p, 1, generator=torch.Generator().manual_seed(3))[:, 0]

    @property
    def parameters(self) -> int:
        return self.scores.shape[2]

    def gradients(self, labels: Tensor) -> Tensor:
        """Of each sample's negative log-likelihood, `[N, P]`."""
        return -self.scores[torch.arange(len(labels)), labels]

    def here(
        self,
        labels: Tensor | None = None,
        likelihood: Likelihood | None = None,
        fisher_type: str = "empirical",
        chosen: Tensor | slice = slice(None),
    ) -> Tensor:
        """The Fisher of this library, `[P]`."""
        labels = self.y if labels is None else labels
        fisher = diagonal_fisher(
            self.model,
            [(self.x[chosen], labels[chosen])],
            likelihood or Classification(),
            fisher_type=fisher_type,
        )
        return flat(list(fisher.values()))


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    return flat(list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)))


def make(samples: int, batch: int) -> Task:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (samples,), generator=generator)
    log_p = model(x).log_softmax(1)
    scores = [torch.stack([gradient(model, one) for one in sample]) for sample in log_p]
    return Task(model, x, y, batch, torch.stack(scores), log_p.detach().exp())


def value(expression: str, task: Task, **names: float) -> float:
    """What a code span of the page is, for this task."""
    names = {"c": 7.0, "N": len(task.x), "B": task.batch, "K": 3, "P": task.parameters, **names}
    return eval(expression.strip("`"), {}, names)
