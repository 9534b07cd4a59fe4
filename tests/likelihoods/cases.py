"""Likelihoods with data for them: what the contract suite runs over.

A case is checked against `reference`, an NLL of one sample written with other means than the
library's (`torch.distributions`, plain Python loops), and against `outcomes`, all the targets that
the outputs give a probability to.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributions
from torch.distributions import Categorical, Normal

from ewc.likelihoods import (
    Bernoulli,
    Classification,
    Fault,
    Likelihood,
    Pointwise,
    Regression,
    Targets,
    TimeSeries,
)

Outcomes = Iterator[tuple[float, Tensor]]


@dataclass(frozen=True)
class Case:
    """One likelihood with data.

    Attributes:
        likelihood: The likelihood.
        make: `make(n) -> (outputs, *rest)` for n samples, float64.
        reference: `reference(outputs, *rest) -> scalar` for a batch of one sample.
        outcomes: `outcomes(outputs) -> (probability, targets), ...` for a batch of one sample.
            For a Gaussian: y +- its standard deviation, which has the same mean and variance, and
            gradients are linear in the targets, so their squares have the same expectation.
        drawn: `likelihood` for drawn targets: the same one without its `target_transform`.
    """

    likelihood: Likelihood
    make: Callable[[int], tuple[Tensor, ...]]
    reference: Callable[..., Tensor]
    outcomes: Callable[[Tensor], Outcomes]
    drawn: Likelihood | None = None

    def split(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tensors of a batch as batches of one."""
        return list(zip(*(tensor.split(1, self.dim(tensor)) for tensor in tensors), strict=True))

    def dim(self, tensor: Tensor) -> int:
        """The dimension of samples."""
        return self.likelihood.batch_dim if tensor.dim() > 1 else 0


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def categorical(head: Tensor, target: Tensor) -> Tensor:
    """-log p of one position: `[H]` and an index or probabilities `[H]`."""
    if target.dim() == 0:
        return -Categorical(logits=head).log_prob(target)
    return -(target * Categorical(logits=head).logits).sum()


def gaussian(y: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """-log p, without the constant that the library leaves out."""
    scale = variance.sqrt().expand_as(y)
    return -(Normal(y, scale).log_prob(target) + scale.log() + 0.5 * math.log(2 * math.pi)).sum()


def garbled(
    outputs: Tensor, targets: Tensor, garbage: float, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch whose targets are `garbage` where `mask` is False."""
    return outputs, torch.where(mask, targets, garbage).to(targets.dtype), mask


def labellings(head: Tensor, positions: list[tuple[int, ...]]) -> Outcomes:
    """All joint labels of positions with logits `head[position]`, as one flat tensor."""
    p = torch.stack([head[position].softmax(0) for position in positions])
    for labels in itertools.product(range(p.shape[1]), repeat=len(positions)):
        yield math.prod(p[i, c].item() for i, c in enumerate(labels)), torch.tensor(labels)


def two_points(y: Tensor, variance: Tensor) -> Outcomes:
    scale = variance.sqrt().expand_as(y)
    for signs in itertools.product((-1.0, 1.0), repeat=y.numel()):
        yield 0.5 ** y.numel(), y + scale * torch.tensor(signs, dtype=y.dtype).reshape(y.shape)


class Coins(Pointwise):
    """Independent 0/1 outputs: the three methods of a position, as a user defines them."""

    def position_nll(self, head: Tensor, targets: Tensor) -> Tensor:
        return F.softplus(head) - targets * head

    def position_sample(self, head: Tensor) -> Tensor:
        return head.sigmoid().bernoulli()

    def position_terms(self, head: Tensor) -> Tensor:
        # E[(p - target)^2] = p (1 - p): its root times the logit has that squared gradient.
        p = head.detach().sigmoid()
        return ((p * (1 - p)).sqrt() * head)[None]


class FewCoins(Coins):
    """The same of some outputs, with a rule of its own about targets."""

    allowed_outputs = (2, 0)

    def read_targets(self, head: Tensor, targets: Tensor, mask: Tensor | None) -> Targets:
        values, mask, faults = super().read_targets(head, targets, mask)
        rule = Fault((values != 0) & (values != 1), "targets must be 0 or 1; found others.")
        return Targets(values, mask, (*faults, rule))


def classification_cases() -> dict[str, Case]:
    def plain(outputs: Tensor) -> Outcomes:
        return labellings(outputs, [(0,)])

    def pixels(outputs: Tensor) -> Outcomes:
        moved = outputs.movedim(1, -1)
        places = list(itertools.product(*map(range, moved.shape[:-1])))
        for p, labels in labellings(moved, places):
            yield p, labels.reshape(moved.shape[:-1])

    def pixel_reference(outputs: Tensor, targets: Tensor, *ids: Tensor) -> Tensor:
        moved = outputs.movedim(1, -1)
        places = itertools.product(*map(range, targets.shape))
        terms = [categorical(moved[p], targets[p]) for p in places if targets[p] != -100]
        return torch.stack([outputs.sum() * 0, *terms]).sum()

    def ignoring(n: int) -> tuple[Tensor, Tensor]:
        targets = torch.randint(0, 3, (n, 2, 2))
        targets[: n // 2, 0] = -100
        targets[:1] = -100
        return normal(n, 3, 2, 2), targets

    def masked_pixels(outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return *garbled(outputs, targets, 99, torch.rand(targets.shape) < 0.6), torch.arange(
            len(targets)
        )

    head = [4, 1, 2]
    return {
        "indices": Case(
            Classification(),
            lambda n: (normal(n, 4), torch.randint(0, 4, (n,))),
            lambda o, t: categorical(o[0], t[0]),
            plain,
        ),
        "indices, ids and lengths": Case(
            Classification(),
            lambda n: (
                normal(n, 4),
                torch.randint(0, 4, (n,)),
                torch.arange(n),
                torch.ones(n).int(),
            ),
            lambda o, t, *_: categorical(o[0], t[0]),
            plain,
        ),
        "one-hot, int": Case(
            Classification(),
            lambda n: (normal(n, 4), torch.eye(4, dtype=torch.int32)[torch.randint(0, 4, (n,))]),
            lambda o, t: categorical(o[0], t[0].argmax()),
            plain,
        ),
        "one-hot, float": Case(
            Classification(),
            lambda n: (normal(n, 4), torch.eye(4)[torch.randint(0, 4, (n,))]),
            lambda o, t: categorical(o[0], t[0].argmax()),
            plain,
        ),
        "masked": Case(
            Classification(),
            lambda n: garbled(normal(n, 4), torch.randint(0, 4, (n,)), 99, torch.rand(n) < 0.7),
            lambda o, t, m: categorical(o[0], t[0]) if m else o.sum() * 0,
            plain,
        ),
        "pixels, masked and ignored": Case(
            Classification(),
            lambda n: masked_pixels(*ignoring(n)),
            lambda o, t, m, *_: pixel_reference(o, torch.where(m, t, -100)),
            pixels,
        ),
        "probable pixels, two masks": Case(
            Classification(),
            lambda n: (
                normal(n, 3, 2),
                torch.randn(n, 3, 2).softmax(1),
                torch.rand(n, 2) < 0.7,
                torch.arange(n),
                torch.rand(n, 2) < 0.7,
            ),
            lambda o, t, a, _, b: torch.stack(
                [o.sum() * 0]
                + [categorical(o[0, :, i], t[0, :, i]) for i in range(2) if a[0, i] and b[0, i]]
            ).sum(),
            pixels,
        ),
        "probabilities": Case(
            Classification(),
            lambda n: (normal(n, 4), normal(n, 4).softmax(1)),
            lambda o, t: categorical(o[0], t[0]),
            plain,
        ),
        "head": Case(
            Classification(allowed_outputs=head),
            lambda n: (normal(n, 5), torch.randint(0, 3, (n,), dtype=torch.uint8)),
            lambda o, t: categorical(o[0, head], t[0].long()),
            lambda o: labellings(o[:, head], [(0,)]),
        ),
        "transform": Case(
            Classification(target_transform=lambda t: t - 7),
            lambda n: (normal(n, 3), torch.randint(7, 10, (n,))),
            lambda o, t: categorical(o[0], t[0] - 7),
            plain,
            drawn=Classification(),
        ),
        "pixels, ignored": Case(Classification(), ignoring, pixel_reference, pixels),
        "ignore_index is a class": Case(
            Classification(ignore_index=0),
            lambda n: (normal(n, 3, 2), torch.randint(0, 3, (n, 2))),
            lambda o, t: pixel_reference(o, torch.where(t == 0, -100, t)),
            pixels,
            drawn=Classification(),
        ),
    }


def regression_cases() -> dict[str, Case]:
    one = torch.tensor(1.0, dtype=torch.float64)
    noise = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    return {
        "regression": Case(
            Regression(),
            lambda n: (normal(n, 3), normal(n, 3)),
            lambda o, t: gaussian(o, t, one),
            lambda o: two_points(o, one),
        ),
        "scalar regression": Case(
            Regression(variance=0.25),
            lambda n: (normal(n), normal(n)),
            lambda o, t: gaussian(o, t, one / 4),
            lambda o: two_points(o, one / 4),
        ),
        "variances, head, ids": Case(
            Regression(variance=noise, allowed_outputs=range(1, 4)),
            lambda n: (normal(n, 2, 5), normal(n, 2, 3), torch.arange(n)),
            lambda o, t, _: gaussian(o[..., 1:4], t, noise),
            lambda o: two_points(o[..., 1:4], noise),
        ),
        "masked regression": Case(
            Regression(variance=0.25),
            lambda n: garbled(normal(n, 3), normal(n, 3), math.nan, torch.rand(n, 3) < 0.6),
            lambda o, t, m: gaussian(o[m], t[m], one / 4),
            lambda o: two_points(o, one / 4),
        ),
        "masked scalar regression, ids": Case(
            Regression(),
            lambda n: (
                *garbled(normal(n), normal(n), math.inf, torch.rand(n) < 0.6),
                torch.arange(n),
            ),
            lambda o, t, m, _: gaussian(o[m], t[m], one),
            lambda o: two_points(o, one),
        ),
        "masked head": Case(
            Regression(allowed_outputs=[3, 0]),
            lambda n: garbled(normal(n, 4), normal(n, 2), math.nan, torch.rand(n, 2) < 0.6),
            lambda o, t, m: gaussian(o[:, [3, 0]][m], t[m], one),
            lambda o: two_points(o[:, [3, 0]], one),
        ),
        "integer targets, transform": Case(
            Regression(target_transform=lambda t: t * 2),
            lambda n: (normal(n, 2), torch.randint(-3, 3, (n, 2))),
            lambda o, t: gaussian(o, t * 2, one),
            lambda o: two_points(o, one),
            drawn=Regression(),
        ),
    }


def sequence_cases() -> dict[str, Case]:
    one = torch.tensor(1.0, dtype=torch.float64)

    def steps(outputs: Tensor) -> Outcomes:  # a single sample is first or second, of length 1
        flat = outputs.flatten(0, 1)
        for p, labels in labellings(flat, [(i,) for i in range(len(flat))]):
            yield p, labels.reshape(outputs.shape[:2])

    def reference(outputs: Tensor, targets: Tensor, *rest: Tensor) -> Tensor:
        flat, labels = outputs.flatten(0, 1), targets.flatten(0, 1)
        weights = torch.ones(len(labels)) if not rest or rest[0].dim() == 1 else rest[0].flatten()
        return torch.stack(
            [outputs.sum() * 0]
            + [
                float(w) * categorical(y, t)
                for y, t, w in zip(flat, labels, weights, strict=True)
                if w > 0
            ]
        ).sum()

    def masked(n: int) -> tuple[Tensor, ...]:
        targets = torch.randint(0, 3, (3, n))
        mask = torch.rand(3, n) < 0.6
        mask[:, 1:2] = False
        return normal(3, n, 3), torch.where(mask, targets, 99), mask

    def weighted(n: int) -> tuple[Tensor, ...]:
        weights = torch.rand(n, 3) * (torch.rand(n, 3) < 0.7)
        targets = torch.where(weights > 0, torch.randint(0, 3, (n, 3)), -5)
        return normal(n, 3, 3), targets, weights, torch.arange(n)

    def gappy(n: int) -> tuple[Tensor, ...]:
        mask = (torch.rand(2, n) < 0.6).int()
        targets = torch.where(mask[..., None] > 0, normal(2, n, 2), math.nan)
        return normal(2, n, 2), targets, mask

    return {
        "labelled steps": Case(
            TimeSeries(),
            lambda n: (normal(3, n, 3), torch.randint(0, 3, (3, n))),
            reference,
            steps,
        ),
        "probable steps, ids": Case(
            TimeSeries(),
            lambda n: (normal(3, n, 3), normal(3, n, 3).softmax(2), torch.arange(n)),
            reference,
            steps,
        ),
        "masked steps": Case(TimeSeries(), masked, reference, steps),
        "weighted steps, batch first": Case(
            TimeSeries(batch_first=True), weighted, reference, steps
        ),
        "head, transform": Case(
            TimeSeries(Classification([2, 0], target_transform=lambda t: t[:-1] - 1)),
            lambda n: (normal(3, n, 3), torch.randint(1, 3, (4, n))),
            lambda o, t: reference(o[..., [2, 0]], t[:-1] - 1),
            lambda o: steps(o[..., [2, 0]]),
            drawn=TimeSeries(Classification([2, 0])),
        ),
        "regression of steps, masked": Case(
            TimeSeries(Regression(variance=torch.tensor([2.0, 0.5]))),
            gappy,
            lambda o, t, m: gaussian(
                o[m > 0], t[m > 0], torch.tensor([2.0, 0.5], dtype=torch.float64)
            ),
            lambda o: two_points(o, torch.tensor([2.0, 0.5], dtype=torch.float64)),
        ),
        "regression of steps, outputs masked": Case(
            TimeSeries(Regression(), batch_first=True),
            lambda n: (
                *garbled(normal(n, 3, 2), normal(n, 3, 2), math.nan, torch.rand(n, 3, 2) < 0.6),
                torch.arange(n),
            ),
            lambda o, t, m, _: gaussian(o[m], t[m], one),
            lambda o: two_points(o, one),
        ),
        "regression of steps, weights and two masks": Case(
            TimeSeries(Regression()),
            lambda n: (
                normal(3, n, 2),
                normal(3, n, 2),
                torch.rand(3, n),
                torch.rand(3, n, 2) < 0.6,
                torch.rand(3, n) < 0.6,
            ),
            lambda o, t, w, a, b: (
                0.5 * (o - t).square() * w[..., None] * (a & b[..., None])
            ).sum(),
            lambda o: two_points(o, one),
        ),
        "regression of steps, batch first": Case(
            TimeSeries(Regression(allowed_outputs=[1]), batch_first=True),
            lambda n: (normal(n, 3, 2), normal(n, 3, 1)),
            lambda o, t: gaussian(o[..., [1]], t, one),
            lambda o: two_points(o[..., [1]], one),
        ),
    }


def tosses_nll(outputs: Tensor, targets: Tensor) -> Tensor:
    return -distributions.Bernoulli(logits=outputs).log_prob(targets.to(outputs.dtype)).sum()


def tosses(outputs: Tensor) -> Outcomes:
    for targets in itertools.product((0.0, 1.0), repeat=outputs.numel()):
        drawn = torch.tensor(targets, dtype=outputs.dtype).reshape(outputs.shape)
        yield distributions.Bernoulli(logits=outputs).log_prob(drawn).sum().exp().item(), drawn


def bernoulli_cases() -> dict[str, Case]:
    def labels(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape)

    def expected(outputs: Tensor, p: Tensor) -> Tensor:
        ones, zeros = torch.ones_like(outputs), torch.zeros_like(outputs)
        coin = distributions.Bernoulli(logits=outputs)
        return -(p * coin.log_prob(ones) + (1 - p) * coin.log_prob(zeros)).sum()

    return {
        "one question": Case(
            Bernoulli(), lambda n: (normal(n), labels(n).bool()), tosses_nll, tosses
        ),
        "many questions, ids": Case(
            Bernoulli(),
            lambda n: (normal(n, 3), labels(n, 3).to(torch.uint8), torch.arange(n)),
            lambda o, t, _: tosses_nll(o, t),
            tosses,
        ),
        "probable answers": Case(
            Bernoulli(), lambda n: (normal(n, 2, 2), torch.rand(n, 2, 2)), expected, tosses
        ),
        "some questions": Case(
            Bernoulli([2, 0]),
            lambda n: (normal(n, 3), labels(n, 2).float()),
            lambda o, t: tosses_nll(o[:, [2, 0]], t),
            lambda o: tosses(o[:, [2, 0]]),
        ),
        "answers not known": Case(
            Bernoulli(),
            lambda n: garbled(normal(n, 3), labels(n, 3), -1, torch.rand(n, 3) < 0.6),
            lambda o, t, m: tosses_nll(o[m], t[m]),
            tosses,
        ),
        "questions, transform": Case(
            Bernoulli(target_transform=lambda t: t[..., :2] > 0),
            lambda n: (normal(n, 2), normal(n, 3)),
            lambda o, t: tosses_nll(o, t[:, :2] > 0),
            tosses,
            drawn=Bernoulli(),
        ),
        "questions at each step, masked": Case(
            TimeSeries(Bernoulli(), batch_first=True),
            lambda n: garbled(normal(n, 2, 2), labels(n, 2, 2), 7, torch.rand(n, 2, 2) < 0.6),
            lambda o, t, m: tosses_nll(o[m], t[m]),
            tosses,
        ),
        "questions at each step, weighted": Case(
            TimeSeries(Bernoulli()),
            lambda n: (normal(3, n, 1), labels(3, n, 1), torch.rand(3, n)),
            lambda o, t, w: torch.stack([w[i, 0] * tosses_nll(o[i], t[i]) for i in range(3)]).sum(),
            tosses,
        ),
    }


def user_cases() -> dict[str, Case]:
    """Subclasses of `Pointwise` that are not the library's."""

    def masked(n: int) -> tuple[Tensor, ...]:
        mask = torch.rand(3, n) < 0.6
        return normal(3, n, 1), torch.where(mask[..., None], torch.ones(3, n, 1), math.nan), mask

    return {
        "a user's": Case(
            Coins(),
            lambda n: (normal(n, 2, 2), torch.randint(0, 2, (n, 2, 2))),
            tosses_nll,
            tosses,
        ),
        "a user's, masked": Case(
            Coins(),
            lambda n: garbled(normal(n, 2), torch.ones(n, 2), math.nan, torch.rand(n, 2) < 0.6),
            lambda o, t, m: tosses_nll(o[m], t[m]),
            tosses,
        ),
        "a user's, head": Case(
            FewCoins(),
            lambda n: (normal(n, 3), torch.randint(0, 2, (n, 2))),
            lambda o, t: tosses_nll(o[:, [2, 0]], t),
            lambda o: tosses(o[:, [2, 0]]),
        ),
        "a user's, masked steps": Case(
            TimeSeries(Coins()),
            masked,
            lambda o, t, m: tosses_nll(o[m], t[m]),
            tosses,
        ),
    }


CASES = (
    classification_cases()
    | bernoulli_cases()
    | regression_cases()
    | sequence_cases()
    | user_cases()
)
