"""The benchmarks run, say what is wrong, and agree with the page that shows them."""

import importlib
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ewc import EWC, Classification
from ewc.fisher.accumulation import Accumulator

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "benchmarks"
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
CHOOSING = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
SCRIPTS = ["collection", "one_batch", "penalty", "memory", "growth", "parameters"]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def from_their_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for file in FOLDER.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.fixture
def harness() -> ModuleType:
    return importlib.import_module("_harness")


@pytest.fixture
def collection() -> ModuleType:
    return importlib.import_module("collection")


def on_page(script: str) -> str:
    begin, end = importlib.import_module("_harness").markers(script)
    assert PAGE.count(begin) == PAGE.count(end) == 1
    return PAGE.split(begin)[1].split(end)[0]


def heads(text: str) -> list[str]:
    lines = text.splitlines()
    return [a for a, b in itertools.pairwise(lines) if b.startswith("| --- |")]


def first_cells(text: str) -> list[str]:
    return [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line[:1] == "|"]


class TestHarness:
    def test_a_ratio_is_the_median_of_the_ratios_in_a_round(self, harness: ModuleType) -> None:
        timings = harness.Timings({"unit": [1.0, 10.0, 2.0], "other": [2.0, 50.0, 6.0]})
        assert timings.ratio("other", "unit") == 3.0
        assert timings.median("other") == 6.0
        assert timings.spread("unit") == pytest.approx(1.5 / 3.0)

    def test_contenders_take_turns_and_slow_ones_stop(
        self, harness: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(harness, "SHORTEST", 0.0)
        monkeypatch.setattr(harness, "LONGEST", 0.005)
        calls = []
        timings = harness.interleave(
            {"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.01))},
            3,
            runs={"b": 5},
        )
        assert calls == [*"ab", *"ab", *"aa"]
        assert len(timings.seconds["b"]) == 1
        assert 0.002 <= timings.median("b") < 0.01

    def test_the_first_round_is_run_however_short_the_time(
        self, harness: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(harness, "SHORTEST", 0.0)
        timings = harness.interleave({"a": list, "b": list}, 3, seconds=-1.0)
        assert [len(each) for each in timings.seconds.values()] == [1, 1]

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0.0123, "0.012"), (1.234, "1.23"), (-12.34, "-12.3"), (1234.5, "1,234")],
    )
    def test_numbers(self, harness: ModuleType, value: float, text: str) -> None:
        assert harness.number(value) == text

    def test_writing_replaces_what_stands_between_the_markers(
        self, harness: ModuleType, tmp_path: Path
    ) -> None:
        page = tmp_path / "page.md"
        page.write_text("before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n")
        for _ in range(2):
            harness.write("x", "new\n", page)
            assert page.read_text() == ("before\n<!-- x: begin -->\nnew\n<!-- x: end -->\nafter\n")
        with pytest.raises(ValueError, match="once each"):
            harness.write("y", "new", page)


class TestReplay:
    def test_the_same_operations_are_run_on_the_same_tensors(self) -> None:
        replay = importlib.import_module("_replay").replay
        torch.manual_seed(0)
        layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
        total, found = torch.zeros(2, 3), []

        def run() -> None:
            first, second = layer(x).split(1, 1)
            loss = (first * second).sum().add_(1)
            (gradient,) = torch.autograd.grad(loss, [layer.weight])
            total.add_(gradient)

        run()
        once = total.clone()
        again = replay(run)
        for times in (3, 4):
            again()
            found.append(total / once)
            torch.testing.assert_close(found[-1], torch.full_like(total, times))

    def test_a_consolidation_adds_the_same_squares(self) -> None:
        models, one_batch = (importlib.import_module(name) for name in ("_models", "one_batch"))
        workload = next(each for each in models.WORKLOADS if "LSTM" in each.name)
        model, sums = workload.build().eval(), []
        batch = models.part(workload.data(1)[0], 0, 3)

        class Kept(Accumulator):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                sums.append(self.sums)

        with pytest.MonkeyPatch.context() as patches:
            patches.setattr("ewc.fisher.collection.Accumulator", Kept)
            again = one_batch.operations_of_a_batch(
                lambda: EWC(model, Classification()).consolidate([batch])
            )
        (own,) = sums
        before = {name: each.clone() for name, each in own.items()}
        again()
        for name, each in own.items():
            torch.testing.assert_close(each - before[name], before[name] * 3, rtol=1e-4, atol=1e-9)


class TestPage:
    @pytest.mark.parametrize("script", SCRIPTS)
    def test_every_table_names_its_command_and_its_machine(self, script: str) -> None:
        text = on_page(script)
        assert text.strip().startswith(f"`python docs/benchmarks/{script}.py")
        assert f"torch {torch.__version__.split('.')[0]}." in text
        assert heads(text)

    def test_collection_has_all_models_and_all_contenders(self) -> None:
        models, peers = importlib.import_module("_models"), importlib.import_module("_peers")
        text = on_page("collection")
        assert all(workload.name in heads(text)[0] for workload in models.WORKLOADS)
        assert {each.title for each in peers.CONTENDERS} <= set(first_cells(text))

    def test_memory_has_all_sweeps(self) -> None:
        memory = importlib.import_module("memory")
        cells = first_cells(on_page("memory"))
        for sweep in memory.SWEEPS.values():
            assert any(cell.startswith(sweep.title) for cell in cells)


class TestCommands:
    @pytest.fixture(autouse=True)
    def each_run_once(self, harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(harness, "SHORTEST", 0.0)

    def run(self, module: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        module.main(["--quick", "--rounds=1", *arguments])
        printed = capsys.readouterr().out
        assert "--quick" in printed.splitlines()[0]
        assert f"torch {torch.__version__}" in printed
        return printed

    def shrink(self, collection: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        models = importlib.import_module("_models")
        tiny = models.Workload("tiny", lambda: models.mlp(4), models.vectors(784), 5, 2)
        monkeypatch.setattr(collection, "WORKLOADS", [tiny])

    def test_collection(
        self,
        collection: ModuleType,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.shrink(collection, monkeypatch)
        printed = self.run(collection, capsys, "--no-peers")
        for kind in importlib.import_module("_peers").OWN:
            assert kind.title in printed
        assert "cannot" not in printed

    def test_what_a_contender_cannot_do_is_an_entry(
        self,
        collection: ModuleType,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.shrink(collection, monkeypatch)
        peers = importlib.import_module("_peers")

        class Twice(peers.OneByOne):
            title = "twice"

            def squares(self) -> dict[str, torch.Tensor]:
                return {name: 2 * each for name, each in super().squares().items()}

        class Refusing(peers.OneByOne):
            title = "refusing"

            def run(self, batches: Sequence[Any]) -> None:
                raise NotImplementedError("no such layer\nand more")

        monkeypatch.setattr(peers, "OWN", [Twice, Refusing])
        printed = self.run(collection, capsys, "--no-peers")
        assert "| twice | cannot (a) |" in printed
        assert "| refusing | cannot (b) |" in printed
        assert "(a) wrong result, off by 100 %" in printed
        assert "(b) no such layer" in printed

    def test_a_model_whose_library_is_absent_is_left_out(
        self,
        collection: ModuleType,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.shrink(collection, monkeypatch)

        def build() -> Any:
            raise ModuleNotFoundError("No module named 'absent'")

        (tiny,) = collection.WORKLOADS
        monkeypatch.setattr(collection, "WORKLOADS", [tiny, replace(tiny, name="x", build=build)])
        printed = self.run(collection, capsys, "--no-peers")
        assert "x: No module named 'absent'." in printed

    def test_penalty(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        penalty = importlib.import_module("penalty")
        monkeypatch.setattr(penalty, "QUICK", [penalty.Layout("Tiny", 3, (4, 5))])
        printed = self.run(penalty, capsys, "--tasks", "1", "10", "20")
        assert heads(printed)[0] in on_page("penalty")
        assert "**ewc**, 20 tasks" in printed

    @pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own books")
    def test_memory(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        memory = importlib.import_module("memory")
        monkeypatch.setitem(memory.SWEEPS, "mlp", replace(memory.SWEEPS["mlp"], quick=(4096,)))
        printed = self.run(memory, capsys, "--sweeps", "mlp")
        assert heads(printed)[0] in on_page("memory")
        row = next(line for line in printed.splitlines() if "4096" in line)
        ordinary, collection = (float(cell) for cell in row.split("|")[2:4])
        batch = 4096 * (784 + 2 * 400) * 4 / 2**20  # inputs are held before; hidden layers are not
        assert 0.3 * batch < ordinary < 3 * batch
        assert collection > 0.3 * batch

    def test_growth(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        growth = importlib.import_module("growth")
        monkeypatch.setattr(growth, "TASKS", (1, 2))
        printed = self.run(growth, capsys)
        assert [head for head in heads(printed) if head not in on_page("growth")] == []

    def test_one_batch(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one_batch = importlib.import_module("one_batch")
        models = importlib.import_module("_models")
        tiny = models.Workload("tiny", lambda: models.mlp(4), models.vectors(784), 5, 4)
        monkeypatch.setattr(one_batch, "WORKLOADS", [tiny])
        printed = self.run(one_batch, capsys)
        assert first_cells(printed) == first_cells(on_page("one_batch"))

    def test_parameters(self, capsys: pytest.CaptureFixture[str]) -> None:
        printed = self.run(importlib.import_module("parameters"), capsys)
        assert first_cells(printed) == first_cells(on_page("parameters"))

    def test_gpu_is_rehearsed(
        self,
        harness: ModuleType,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        gpu = importlib.import_module("gpu")
        if not torch.cuda.is_available():
            with pytest.raises(SystemExit, match="needs an accelerator"):
                gpu.main([])
        printed = self.run(gpu, capsys, "--json", str(tmp_path / "times.json"))
        tables = printed.split("\n\n", 1)[1].strip()
        assert (tmp_path / "times.md").read_text() == tables
        page = tmp_path / "page.md"
        page.write_text(PAGE)
        harness.write("gpu", printed, page)
        assert tables in page.read_text()
        models, penalties = heads(printed)[:2], heads(printed)[2:]
        assert ["GPT-2 small" in models[0], "ResNet-50" in models[1]] == [True, True]
        assert len(penalties) == 1
        for precision in importlib.import_module("_device").PRECISIONS:
            assert precision in models[0]
            assert f"ResNet-50, {precision}" in (tmp_path / "times.json").read_text()
        assert {"**ewc**, one more batch", "`vmap(grad)`"} <= set(first_cells(printed))
        assert "no time was left" not in printed
        errors = [line for line in printed.splitlines() if line.startswith("| error of **ewc**")]
        for line in errors:
            full, tf32, half = (float(cell) for cell in line.split("|")[2:5])
            assert max(full, tf32) < 1e-2
            assert half < 0.3

    def test_gpu_measures_every_column_however_short_the_time(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        gpu = importlib.import_module("gpu")
        monkeypatch.setattr(gpu, "QUICK", gpu.QUICK[:1])
        printed = self.run(gpu, capsys, "--seconds=0")
        assert "- (a) not measured: no time was left" in printed
        row = next(line for line in printed.splitlines() if line.startswith("| forward + backward"))
        assert all(float(cell) > 0 for cell in row.split("|")[2:5])


class TestChoices:
    TABLES = ("types", "memory", "heads", "samples", "strength", "optimizer")

    @pytest.fixture
    def choices(self, harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
        pytest.importorskip("sklearn")
        monkeypatch.setattr(harness, "SHORTEST", 0.0)
        return importlib.import_module("choices")

    def on_page(self, name: str) -> str:
        begin, end = importlib.import_module("_harness").markers(f"choices {name}")
        assert CHOOSING.count(begin) == CHOOSING.count(end) == 1
        return CHOOSING.split(begin)[1].split(end)[0]

    @pytest.mark.parametrize("name", TABLES)
    def test_the_page_has_what_is_printed(self, name: str, choices: ModuleType) -> None:
        assert tuple(choices.TABLES) == self.TABLES
        page = self.on_page(name)
        assert page.strip().startswith(f"`python docs/benchmarks/choices.py {name}`")
        assert f"torch {torch.__version__.split('.')[0]}." in page
        scale = choices.Scale(seeds=1, tasks=2, steps=3, rounds=1)
        printed = choices.report(name, scale, quick=False)
        assert heads(printed) == heads(page)
        assert first_cells(printed) == first_cells(page)

    def test_divergence_is_an_entry(self, choices: ModuleType) -> None:
        scale = choices.Scale(seeds=1, tasks=2, steps=30)
        cells = choices.accuracies(choices.Job(strength=1e6), scale)
        assert cells == ["diverges (1 of 1)"] * 3

    def test_the_bound_is_where_the_penalty_alone_begins_to_grow(self, choices: ModuleType) -> None:
        scale = choices.Scale(seeds=1, tasks=2, steps=60)
        for step in choices.STEPS.values():
            if step.bound < float("inf"):
                assert choices.alone(step, 0.98 * step.bound, scale, seed=0) < 1
                assert choices.alone(step, 1.05 * step.bound, scale, seed=0) > 1

    def test_an_unknown_table_is_an_error(self, choices: ModuleType) -> None:
        with pytest.raises(SystemExit):
            choices.main(["tpyes"])


class TestStrength:
    """`strength.json` has the runs; the page has the tables that are made of them."""

    TABLES = ("scores", "scales", "sgd", "adam", "default", "proximal")
    SETTING = "MLP, pixels, short"

    @pytest.fixture
    def strength(self) -> ModuleType:
        pytest.importorskip("sklearn")
        return importlib.import_module("strength")

    @pytest.fixture
    def sequel(self, strength: ModuleType) -> Any:
        return strength.Sequel(replace(strength.SETTINGS[self.SETTING], steps=40), seed=0)

    def test_the_page_has_the_tables(self, strength: ModuleType) -> None:
        results = strength.Results(strength.RESULTS)
        tables = strength.report(results.runs)
        page = (ROOT / "docs" / "strength.md").read_text(encoding="utf-8")
        assert tuple(tables) == self.TABLES
        assert all(f"\n\n{text}\n\n{results.machine}." in page for text in tables.values())

    def test_every_setting_builds_and_consolidates(self, strength: ModuleType) -> None:
        for name, setting in strength.SETTINGS.items():
            sequel = strength.Sequel(replace(setting, steps=1, tasks=2), seed=0)
            found = sequel.run("largest", 1.0)
            assert found["product"] == pytest.approx(1.0, rel=1e-3), name
            assert found["scales"]["largest"] >= found["scales"]["top"] > 0, name

    def test_beyond_the_bound_is_divergence_except_for_the_proximal_step(self, sequel: Any) -> None:
        assert sequel.run("largest", 100.0)["diverged"]
        assert not sequel.run("largest", 100.0, proximal=True)["diverged"]

    def test_the_proximal_step_of_a_large_strength_is_the_anchor(self, sequel: Any) -> None:
        model, ewc = sequel.model, sequel.ewc
        ewc.strength = 1e20
        strength = sys.modules["strength"]
        strength.train(model, ewc, sequel.tasks[1], sequel.setting, 0, proximal=True)
        protected = {name: one > 1e-9 for name, one in ewc.fisher.items()}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.detach()[protected[name]], ewc.anchor[name][protected[name]]
            )

    def test_a_run_is_made_once(self, strength: ModuleType, tmp_path: Path) -> None:
        path = tmp_path / "strength.json"
        strength.measure(strength.Results(path), [self.SETTING], 1, ["largest"])
        again = strength.Results(path)
        before = list(again.runs)
        strength.measure(again, [self.SETTING], 1, ["largest"])
        assert before
        assert again.runs == before
