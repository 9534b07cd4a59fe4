"""The recipe for Avalanche."""

import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ewc import EWC, Classification, ZeroFisherWarning
from tests.integrations.recipes import Contract, recipe

avalanche = pytest.importorskip("avalanche")
pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")


def experience(space: ModuleType) -> object:
    """The first 8 samples of the first task."""
    from avalanche.benchmarks import benchmark_from_datasets

    (one,) = benchmark_from_datasets(train=[space.tasks[0].dataset.subset(range(8))]).train_stream
    return one


class TestAvalanche(Contract):
    page = "avalanche"

    def step(self, space: ModuleType, folder: Path, accumulate: int) -> None:
        if accumulate > 1:
            pytest.skip("Avalanche makes one step for each mini-batch")
        space.strategy.train_mb_size = 8
        space.strategy.train(experience(space), shuffle=False)

    def loss(self, space: ModuleType) -> Tensor:
        ((x, y, *_),) = DataLoader(experience(space).dataset, batch_size=8)
        return F.cross_entropy(space.model(x), y)

    def save_between(self, space: ModuleType, folder: Path) -> None:
        self.step(space, folder, 1)
        space.save(folder / "checkpoint.pt")
        self.step(space, folder, 1)

    def resume(self, space: ModuleType, folder: Path) -> ModuleType:
        space.resume(folder / "checkpoint.pt")
        self.step(space, folder, 1)
        return space

    def evaluate(self, space: ModuleType, folder: Path) -> float:
        metrics = space.strategy.eval(experience(space))
        (loss,) = [value for name, value in metrics.items() if name.endswith("Exp000")]
        return loss

    @pytest.mark.parametrize("heads", [False, True])
    def test_what_avalanche_tests_of_its_own_plugin(self, heads: bool) -> None:
        """One head for all experiences, and a head for each."""
        from avalanche.benchmarks import nc_benchmark
        from avalanche.benchmarks.utils import as_classification_dataset
        from avalanche.models import MTSimpleMLP, SimpleMLP
        from torch.utils.data import TensorDataset

        space = recipe(self.page, loop=False)
        draws = torch.Generator().manual_seed(0)
        y = torch.arange(60) % 6
        data = TensorDataset(torch.randn(60, 6, generator=draws) + y[:, None], y)
        data.targets = y.tolist()
        benchmark = nc_benchmark(
            as_classification_dataset(data),
            as_classification_dataset(data),
            n_experiences=3,
            task_labels=heads,
            seed=1,
        )
        kind = MTSimpleMLP if heads else SimpleMLP
        model = kind(input_size=6, hidden_size=10)
        ewc = EWC(model, Classification(), strength=20.0)
        strategy = space.Naive(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            criterion=torch.nn.CrossEntropyLoss(),
            train_mb_size=10,
            train_epochs=2,
            plugins=[space.Protect(ewc)],
            evaluator=space.evaluator,
        )
        for number, each in enumerate(benchmark.train_stream, start=1):
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", ZeroFisherWarning
                )  # heads that this task does not use
                strategy.train(each)
            strategy.eval(benchmark.test_stream)
            assert ewc.n_tasks == number
        if heads:
            assert {f"classifier.classifiers.{t}.classifier.weight" for t in range(3)} < set(
                ewc.fisher
            )
        assert ewc() > 0
