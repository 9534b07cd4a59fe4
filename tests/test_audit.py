"""The formulas on the page of the audit, executed: each equals the Fisher here times its factor.

Written anew from the lines that the page names; no code of those projects is in here. The factor is
read from the page's second column. The numbers of its first paragraph are counted in its tables.
"""

import itertools
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ewc import Custom, Regression
from tests.support.audit import PAGE, Task, flat, gradient, make, rows, value

SINGLE = rows("Single samples")
BATCH = rows("Batch means")
NEITHER = rows("Neither")
LIBRARIES = rows("Libraries for curvature")
ALPHA, SCALE = 0.3, 4.0  # of FACIL and LibContinual; of the gradient scaler

# ---------------------------------------------------------------- single samples

PER_SAMPLE = make(10, 4)  # batches of 4, 4 and 2
BATCHES = 3
DRAWS = torch.randint(10, (30,), generator=torch.Generator().manual_seed(1))
VARIANCE = 0.5


def squares(labels: Callable[[Task], Tensor] = lambda task: task.y) -> Callable[[Task], Tensor]:
    return lambda task: (task.gradients(labels(task)) ** 2).mean(0)


def expectation(task: Task) -> Tensor:
    return (task.p[..., None] * task.scores**2).sum(1).mean(0)


def draws(labels: Callable[[Task], Tensor]) -> Callable[[Task], Tensor]:
    return lambda task: (task.gradients(labels(task))[DRAWS] ** 2).mean(0)


def mammoth(task: Task) -> Tensor:
    of_label = task.p.gather(1, task.y[:, None])
    return (of_label * task.gradients(task.y) ** 2).sum(0) / (BATCHES * task.batch)


def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
    nll = F.cross_entropy(outputs, labels, reduction="none")
    return (-nll).exp().detach().sqrt() * nll


def targets(task: Task) -> Tensor:
    return F.one_hot(task.y, 3).double()


def reconstruction(task: Task) -> Tensor:
    losses = ((task.model(task.x) - targets(task)) ** 2).mean(1)
    return torch.stack([gradient(task.model, one) for one in losses]).square().mean(0)


def gaussian_policy(task: Task) -> Tensor:
    means = task.model(task.x)
    found = [torch.stack([gradient(task.model, one) for one in sample]) for sample in means]
    return (torch.stack(found) ** 2 / VARIANCE).sum(1).mean(0)


def evenly(task: Task) -> Tensor:
    return torch.stack([task.here(torch.full_like(task.y, k)) for k in range(3)]).mean(0)


Both = tuple[Callable[[Task], Tensor], Callable[[Task], Tensor]]
DATA: Both = (squares(), Task.here)
ARG_MAX: Both = (squares(lambda t: t.most_probable), lambda t: t.here(t.most_probable))
SAMPLED: Both = (squares(lambda t: t.sampled), lambda t: t.here(t.sampled))
EXACT: Both = (expectation, lambda t: t.here(fisher_type="exact"))
DRAWN: Both = (draws(lambda t: t.sampled), lambda t: t.here(t.sampled, chosen=DRAWS))

# What is computed there, and the Fisher here that it is a multiple of.
FORMULAS: dict[str, Both] = {
    "GMvandeVen/continual-learning": (
        lambda t: expectation(t) * len(t.x) / (len(t.x) - 1),
        EXACT[1],
    ),
    "aimagelab/mammoth": (mammoth, lambda t: t.here(likelihood=Custom(weighted))),
    "chrhenning/hypnettorch": DATA,
    "moskomule/ewc.pytorch": ARG_MAX,
    "kuc2477/pytorch-ewc": DATA,
    "imirzadeh/CL-Gym": DATA,
    "lifelonglab/pyCLAD": (
        reconstruction,
        lambda t: t.here(targets(t), likelihood=Regression(variance=3 / 2)),
    ),
    "speechbrain/benchmarks": DATA,
    "ariseff/overcoming-catastrophic": DRAWN,
    "okdshin/chainer-EWC": DRAWN,
    "stokesj/EWC": DATA,
    "TimoFlesch/elastic-weight-consolidation": (
        draws(lambda t: t.most_probable),
        lambda t: t.here(t.most_probable, chosen=DRAWS),
    ),
    "Laborieux-Axel/SynapticMetaplasticityBNN": DATA,
    "numenta/nupic.research": DATA,
    "ganguli-lab/pathint": (lambda t: (t.scores**2).sum(1).mean(0), evenly),
    "awarelab/continual_world": (
        gaussian_policy,
        lambda t: t.here(targets(t), Regression(variance=VARIANCE), fisher_type="exact"),
    ),
    "TTomilin/MEAL": SAMPLED,
    "lebrice/Sequoia": (lambda t: expectation(t) * len(t.x) / (len(t.x) / t.batch), EXACT[1]),
    "nvcuong/variational-continual-learning": (
        lambda t: len(t.x) * squares()(t) / len(t.x),
        Task.here,
    ),
    "ooples/AiDotNet": DATA,
    "mmatena/model_merging": EXACT,
    "r-three/mats": DATA,
}


@pytest.mark.parametrize("repository", FORMULAS)
def test_squares_of_single_samples_are_the_fisher_times_a_factor(repository: str) -> None:
    row, (there, here) = SINGLE[repository], FORMULAS[repository]
    found, ours = there(PER_SAMPLE), here(PER_SAMPLE)
    if not row.penalty.startswith("none"):
        span = re.findall(r"`.*?`", row.strength)[0]
        found = value(row.penalty, PER_SAMPLE) * found
        ours = value(span, PER_SAMPLE, batches=BATCHES) / 2 * ours
    torch.testing.assert_close(found, ours)


# ---------------------------------------------------------------- batch means

SHUFFLED = make(6, 2)


def means(g: Tensor, batch: int) -> Tensor:
    """The mean gradient of each batch, `[batches, P]`."""
    return g.unflatten(0, (-1, batch)).mean(1)


def batch_means(g: Tensor, batch: int) -> Tensor:
    return (means(g, batch) ** 2).mean(0)


def times_batch_over_samples(g: Tensor, batch: int) -> Tensor:
    return (batch * means(g, batch) ** 2).sum(0) / len(g)


# From the gradients of single samples, in the order of the loader, `[N, P]`.
BATCH_FORMULAS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "ContinualAI/avalanche": batch_means,
    "LAMDA-CL/PyCIL": batch_means,
    "sun-hailong/LAMDA-PILOT": batch_means,
    "RL-VIG/LibContinual": lambda g, b: (1 - ALPHA) * times_batch_over_samples(g, b),
    "mmasana/FACIL": lambda g, b: (1 - ALPHA) * times_batch_over_samples(g, b),
    "GT-RIPL/Continual-Learning-Benchmark": lambda g, b: b * batch_means(g, b),
    "joansj/hat": times_batch_over_samples,
    "csm9493/UCL": times_batch_over_samples,
    "ZixuanKe/PyContinual": times_batch_over_samples,
    "zzz47zzz/codebase-for-incremental-learning-with-llm": times_batch_over_samples,
    "pengxiang-wang/continual-learning-arena": times_batch_over_samples,
    "adaptive-machine-learning/CapyMOA": batch_means,
    "facebookresearch/GradientEpisodicMemory": lambda g, m: g[:m].mean(0) ** 2,
    "nik-dim/sequel": lambda g, b: (means(g, b) ** 2).sum(0) / len(g),
    "ShinhwanKang/BeGin": times_batch_over_samples,
    "MECLabTUDA/Lifelong-nnUNet": lambda g, b: (SCALE * g[-b:].mean(0)) ** 2,
    "AGI-Labs/continual_rl": lambda g, b: ((b * means(g, b)) ** 2).mean(0),
    "mr-eggplant/EATA": batch_means,
    "if-loops/selective-synaptic-dampening": batch_means,
}


def expected(task: Task, labels: Tensor, batch: int) -> Tensor:
    """The expectation of the squared mean gradient of a batch, from the Fisher here."""
    samples = len(labels)
    mean = gradient(task.model, F.cross_entropy(task.model(task.x), labels)) ** 2
    return mean + (task.here(labels) - mean) / batch * (samples - batch) / (samples - 1)


@pytest.mark.parametrize("repository", BATCH_FORMULAS)
def test_squares_of_batch_means_are_on_average_what_the_formula_says(repository: str) -> None:
    task, there, row = SHUFFLED, BATCH_FORMULAS[repository], BATCH[repository]
    labels = task.most_probable if row.labels.startswith("arg max") else task.y
    g = task.gradients(labels)
    orders = itertools.permutations(range(len(g)))
    average = torch.stack([there(g[list(order)], task.batch) for order in orders]).mean(0)

    if row.strength.startswith("`"):
        names = {"M": task.batch, "alpha": ALPHA, "s": SCALE}
        span = re.findall(r"`.*?`", row.strength)[0]
        factor = value(span, task, **names) / 2 / value(row.penalty, task) * task.batch
    else:
        factor = task.batch**2 if repository == "AGI-Labs/continual_rl" else 1
    torch.testing.assert_close(average, factor * expected(task, labels, task.batch))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(there(g, task.batch), factor / task.batch * task.here(labels))


def test_nothing_of_the_fisher_is_left_of_one_batch() -> None:
    found = batch_means(SHUFFLED.gradients(SHUFFLED.y), len(SHUFFLED.y))
    torch.testing.assert_close(found, expected(SHUFFLED, SHUFFLED.y, len(SHUFFLED.y)))
    mean = gradient(SHUFFLED.model, F.cross_entropy(SHUFFLED.model(SHUFFLED.x), SHUFFLED.y))
    torch.testing.assert_close(found, mean**2)


# ---------------------------------------------------------------- neither


def is_no_multiple(found: Tensor, ours: Tensor) -> bool:
    return bool(F.cosine_similarity(found, ours, dim=0) < 0.99)


def test_added_classes() -> None:
    """stijani/elastic-weight-consolidation-tf2: a sum over classes, then the square."""
    task = SHUFFLED
    added = [gradient(task.model, one) for one in task.model(task.x).log_softmax(1).sum(1)]
    found = torch.stack(added).square().mean(0)
    torch.testing.assert_close(found, task.scores.sum(1).square().mean(0))
    assert is_no_multiple(found, task.here(fisher_type="exact"))


def test_gradients_that_add_up() -> None:
    """nik-dim/sequel (PyTorch): the square of the sum over batches; spacy-ewc: of partial sums."""
    task, found = SHUFFLED, []
    task.model.zero_grad()
    for x, y in zip(task.x.split(task.batch), task.y.split(task.batch), strict=True):
        F.cross_entropy(task.model(x), y).backward()
        found.append(flat([p.grad for p in task.model.parameters()]) ** 2)
    task.model.zero_grad()

    sums = means(task.gradients(task.y), task.batch).cumsum(0)
    torch.testing.assert_close(torch.stack(found), sums**2)
    whole = gradient(task.model, F.cross_entropy(task.model(task.x), task.y))
    torch.testing.assert_close(found[-1] / 3, 3 * whole**2)
    assert is_no_multiple(found[-1], task.here())
    assert is_no_multiple(torch.stack(found).mean(0), task.here())


def test_every_label_for_every_sample() -> None:
    """shivamsaboo17: the mean over pairs is a cross-entropy with the batch's label frequencies."""
    task, losses, pairs = SHUFFLED, [], []
    for i in range(0, len(task.y), task.batch):
        chosen = slice(i, i + task.batch)
        frequencies = F.one_hot(task.y[chosen], 3).double().mean(0)
        losses.append(F.cross_entropy(task.model(task.x[chosen]), frequencies.expand(2, 3)))
        pairs.append(task.scores[chosen][:, task.y[chosen]])
    found = torch.cat(pairs).mean((0, 1)) ** 2
    torch.testing.assert_close(found, gradient(task.model, torch.stack(losses).mean()) ** 2)
    assert is_no_multiple(found, task.here())


def test_terms_between_classes() -> None:
    """tanganke/fusion_bench: with single samples, the true Fisher and products of classes."""
    task = SHUFFLED
    log_p = task.model(task.x).log_softmax(1)
    losses = (log_p.detach().exp().sqrt() * log_p).sum(1)
    found = torch.stack([gradient(task.model, one) for one in losses]).square().mean(0)

    roots = task.p.sqrt()[..., None] * task.scores
    common = sum(roots[:, j] * roots[:, k] for j in range(3) for k in range(3) if j != k)
    torch.testing.assert_close(found, task.here(fisher_type="exact") + common.mean(0))
    assert is_no_multiple(found, task.here(fisher_type="exact"))


# ---------------------------------------------------------------- libraries

LIBRARY_FORMULAS: dict[str, Both] = {
    "tfjgeorge/nngeometry": EXACT,
    "f-dangel/curvlinops": EXACT,
    "kazukiosawa/asdl": (
        lambda t: ((t.p.sqrt()[..., None] * t.scores) ** 2).sum((0, 1)) / len(t.x),
        EXACT[1],
    ),
    "aleximmer/Laplace": (lambda t: len(t.x) * expectation(t), EXACT[1]),
    "f-dangel/backpack": (lambda t: ((t.gradients(t.y) / len(t.x)) ** 2).sum(0), Task.here),
}


@pytest.mark.parametrize("repository", LIBRARY_FORMULAS)
def test_libraries_for_curvature(repository: str) -> None:
    there, here = LIBRARY_FORMULAS[repository]
    factor = value(LIBRARIES[repository].strength, PER_SAMPLE)
    torch.testing.assert_close(there(PER_SAMPLE), factor * here(PER_SAMPLE))


# ---------------------------------------------------------------- the page

NOT_EXECUTED = {
    "Knowledgator/GLiClass": "its largest entry depends on the order of the data",
    "BeyonderXX/TRACE": "follows a training",
    "which47/LLMCL": "follows a training",
    "arslan-chaudhry/agem": "follows a training",
}
BY_HAND = {
    "stijani/elastic-weight-consolidation-tf2",
    "nik-dim/sequel",
    "shivamsaboo17/Overcoming-Catastrophic-forgetting-in-Neural-Networks",
    "darkrockmountain/spacy-ewc",
    "tanganke/fusion_bench",
}


def test_every_row_is_executed_or_says_why_not() -> None:
    executed = {*FORMULAS, *BATCH_FORMULAS, *LIBRARY_FORMULAS, *BY_HAND}
    assert {*SINGLE, *BATCH, *NEITHER, *LIBRARIES} == executed | set(NOT_EXECUTED)
    assert not executed & set(NOT_EXECUTED)
    assert "all rows but four" in PAGE
    assert len(NOT_EXECUTED) == 4


def test_links_are_to_the_commit_of_their_row() -> None:
    for row in [*SINGLE.values(), *BATCH.values(), *NEITHER.values(), *LIBRARIES.values()]:
        address = (
            r"\[(.+), (\d+)-(\d+)\]\(https://github\.com/(.+)/blob/(\w{40})/(.+)#L(\d+)-L(\d+)\)"
        )
        name, first, last, repository, commit, path, *lines = re.fullmatch(
            address, row.link
        ).groups()
        assert repository == row.repository
        assert row.commit == f"`{commit[:7]}`"
        assert path.split("/")[-1] == name
        assert lines == [first, last]


def test_the_first_paragraph_counts_the_tables() -> None:
    audited = [*SINGLE.values(), *BATCH.values(), *NEITHER.values()]
    labels = [row.labels.split(",")[0].split(";")[0].split(":")[0] for row in audited]
    penalties = [row.penalty for row in audited if not row.penalty.startswith("none")]
    counted = [
        len({row.repository for row in audited}),
        len(SINGLE),
        len(BATCH),
        len(NEITHER),
        sum(row.mode.startswith("train") for row in audited),
        len(audited),
        sum(label.startswith("data") for label in labels),
        labels.count("arg max"),
        labels.count("sampled"),
        labels.count("expectation"),
        len(penalties),
        sum(penalty.startswith("c/2") for penalty in penalties),
    ]
    first = PAGE.split("\n\n")[1].replace("1/2", "")
    assert first.startswith("Fifty ")
    assert [int(number) for number in re.findall(r"\d+", first)] == counted
