"""Row 45b: consolidations beside other threads."""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from ewc import EWC, Classification, OnlineEWC
from tests.support.asserts import raises, unchanged
from tests.support.tasks import CLASSES, INPUTS, make, make_model, make_task, same
from tests.support.threads import another_thread, at_once
from tests.support.versions import needs_causal_bias


class Noisy(nn.Module):
    """Draws in its forward."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(INPUTS, 4)
        self.head = nn.Linear(4, CLASSES)
        self.checkpointed = checkpointed

    def noisy(self, x):
        y = self.body(x)
        return F.dropout(y + torch.randn_like(y) * torch.rand(4), 0.5, training=True).tanh()

    def forward(self, x):
        y = checkpoint(self.noisy, x, use_reentrant=False) if self.checkpointed else self.noisy(x)
        return self.head(y)


class Seeded(Noisy):
    """Seeds in its forward: every run of it draws the same."""

    def __init__(self, seed) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, x):
        self.seed()
        return super().forward(x)


class Forked(Noisy):
    """Draws with a seed of its own, and then goes on as before."""

    def forward(self, x):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            noise = torch.rand(4)
        return super().forward(x) + self.head(noise)


class Biased(Noisy):
    """Makes a tensor of a subclass in its forward, which no dispatch mode may see."""

    def forward(self, x):
        y = super().noisy(x).view(len(x), 1, 4, 1)
        return self.head(
            F.scaled_dot_product_attention(y, y, y, causal_lower_right(4, 4)).flatten(1)
        )


SEEDS = {
    "manual_seed": lambda: torch.manual_seed(7),
    "set_rng_state": lambda: torch.set_rng_state(torch.Generator().manual_seed(7).get_state()),
    "imported": lambda: torch.random.manual_seed(7),
}


@contextmanager
def unchanged_process():
    """Nothing of the whole process is changed, but for the random state."""
    with unchanged(None, nn.Module()), torch.random.fork_rng():
        yield


def fisher(model, **options):
    torch.manual_seed(3)
    ewc = EWC(model, Classification(), **options)
    ewc.consolidate(make_task(batches=3))
    return ewc.fisher


@pytest.mark.parametrize(
    ("make_it", "options"),
    [
        (make_model, {}),
        (make_model, {"fisher_type": "mc"}),
        (Noisy, {}),
        (lambda: Noisy(checkpointed=True), {}),
        (Noisy, {"fisher_type": "mc"}),
        *((lambda seed=seed: Seeded(seed), {}) for seed in SEEDS.values()),
        (lambda: Seeded(SEEDS["manual_seed"]), {"fisher_type": "mc"}),
        (Forked, {}),
        pytest.param(Biased, {}, marks=needs_causal_bias),
    ],
    ids=[
        "plain",
        "mc",
        "noisy",
        "noisy inside checkpointing",
        "noisy, mc",
        *SEEDS,
        "manual_seed, mc",
        "fork_rng",
        "tensor of a subclass",
    ],
)
def test_row_45b_beside_a_thread_the_numbers_are_the_same(make_it, options):
    model = make_it()
    alone, after = fisher(model, **options), torch.get_rng_state()
    with another_thread():
        beside = fisher(model, **options)
        assert torch.equal(torch.get_rng_state(), after)
    assert same(beside, alone)


def test_row_45b_beside_a_thread_a_failure_takes_back_what_was_drawn(kind):
    model, ewc = make(kind, fisher_type="mc")
    loader = DataLoader(TensorDataset(*make_task()[0]), 2, shuffle=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([1e4, 0.0, 0.0]))  # the outcome of a draw is certain
    with another_thread():
        for own in (None, generator):
            with unchanged(ewc, model, generator), raises(ValueError, "is zero"):
                ewc.consolidate(loader, generator=own)


@pytest.mark.parametrize("make_it", [make_model, Noisy])
@pytest.mark.parametrize("fails", [False, True])
def test_row_45b_a_thread_that_draws_draws_as_alone(make_it, fails):
    draws = 3000
    generator = torch.Generator().manual_seed(0)
    expected = [torch.rand((), generator=generator).item() for _ in range(draws)]
    ended = threading.Event()
    ewc = EWC(make_it(), Classification(), fisher_type="mc")

    def draw():
        try:
            return [torch.rand(()).item() for _ in range(draws)]
        finally:
            ended.set()

    def consolidate():
        times = 0
        while not ended.is_set() or times == 0:
            own = torch.Generator().manual_seed(times)
            if fails:
                with raises(RuntimeError, "stop"):
                    ewc.consolidate(failing(), generator=own)
            else:
                ewc.consolidate(make_task(), generator=own)
            times += 1

    def failing():
        yield from make_task()
        raise RuntimeError("stop")

    torch.manual_seed(0)
    found, _ = at_once(draw, consolidate)
    assert found == expected


def train(model, steps, step=None):
    """Train on batches drawn from the global generator, with dropout."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    compute = model if step is None else step
    losses = []
    for _ in range(steps):
        x, y = torch.randn(8, INPUTS), torch.randint(CLASSES, (8,))
        optimizer.zero_grad()
        loss = F.cross_entropy(compute(F.dropout(x, 0.2)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_row_45b_a_thread_that_trains_trains_as_alone():
    other = make_model(1)
    expected = copy.deepcopy(other)
    torch.manual_seed(0)
    losses, after = train(expected, 150), torch.get_rng_state()
    ewc = EWC(make_model(), Classification())
    with unchanged_process():
        torch.manual_seed(0)
        found, _ = at_once(
            lambda: train(other, 150), lambda: [ewc.consolidate(make_task()) for _ in range(10)]
        )
        assert torch.equal(torch.get_rng_state(), after)
    assert found == losses
    assert same(dict(other.named_parameters()), dict(expected.named_parameters()))


def test_row_45b_a_thread_that_compiles_compiles_as_alone():
    calls = []

    def backend(graph, inputs):
        def run(*arguments):
            calls.append(threading.get_ident())
            return graph.forward(*arguments)

        return run

    # The first compilation of a process adds a filter of warnings in PyTorch 2.6.
    torch.compile(make_model(), backend="eager")(torch.zeros(1, INPUTS))
    torch._dynamo.reset()
    own = make_model()
    own[0] = torch.compile(own[0], backend=backend)  # runs eagerly in the consolidation
    plain, other = make_model(), make_model(1)
    ewc = EWC(own, Classification())

    def consolidate():
        for _ in range(5):
            ewc.consolidate(make_task())
        return threading.get_ident()

    compiled = torch.compile(other, backend=backend)
    with unchanged_process():
        _, ident = at_once(lambda: train(other, 60, compiled), consolidate)
    assert ident not in calls
    assert len(calls) == 60  # none of them was run eagerly
    expected = EWC(plain, Classification())
    for _ in range(5):
        expected.consolidate(make_task())
    assert same(ewc.fisher, expected.fisher)
    torch._dynamo.reset()


def test_row_45b_consolidations_that_overlap(kind):
    """A enters, B enters, A leaves, B leaves; in full and in the caller's precision."""
    inside, leave, ended = threading.Event(), threading.Event(), threading.Event()

    def first():
        yield make_task(0)[0]
        inside.set()
        assert leave.wait(30)
        yield make_task(0)[1]

    def second():
        assert inside.wait(30)
        yield make_task(0)[0]
        leave.set()
        ended.wait(30)
        yield make_task(0)[1]

    torch.set_float32_matmul_precision("medium")
    try:
        alone = [kind(make_model(seed), Classification()) for seed in (0, 1)]
        for ewc in alone:
            ewc.consolidate(iter(make_task(0)))
        with unchanged_process():
            models = [make_model(0), make_model(1)]
            objects = [kind(model, Classification()) for model in models]

            def consolidate(index, batches):
                objects[index].consolidate(batches)
                if index == 0:
                    ended.set()

            at_once(lambda: consolidate(0, first()), lambda: consolidate(1, second()))
    finally:
        torch.set_float32_matmul_precision("highest")
    for seed in (0, 1):
        assert same(objects[seed].fisher, alone[seed].fisher)


@pytest.mark.parametrize("is_one_object", [True, False])
def test_row_45b_consolidations_of_one_model(kind, is_one_object):
    """While one of them runs the model, the others begin."""
    model, ewc = make(kind, n_tasks=0)
    model.train()
    objects = [ewc] * 3 if is_one_object else [kind(model, Classification()) for _ in range(3)]
    begun = threading.Semaphore(0)

    def consolidate(each):
        begun.release()
        each.consolidate(batches())

    def batches():
        for batch in make_task():
            for _ in objects:  # at most until all of them have begun
                begun.acquire(timeout=0.1)
            yield batch

    at_once(*(lambda each=each: consolidate(each) for each in objects))
    assert all(module.training for module in model.modules())
    _, alone = make(kind, n_tasks=0)
    times = 3 if is_one_object else 1
    for _ in range(times):
        alone.consolidate(iter(make_task()))
    for each in objects:
        assert each.n_tasks == times
        assert same(each.fisher, alone.fisher)


def test_row_45b_a_consolidation_inside_a_consolidation(kind):
    model, ewc = make(kind, n_tasks=0)
    other = OnlineEWC(make_model(1), Classification())

    def batches():
        for batch in make_task():
            other.consolidate(make_task())
            yield batch

    _, expected = make(kind, n_tasks=0)
    expected.consolidate(iter(make_task()))
    ewc.consolidate(batches())
    assert same(ewc.fisher, expected.fisher)
    assert other.n_tasks == 2
