"""The examples, in settings so small that they take seconds."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from tests.support.versions import needs_sharding

for library in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(library)

DOCS = Path(__file__).parent.parent / "docs"
EXAMPLES = DOCS / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def picture(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "picture.png"
    yield path
    assert path.read_bytes().startswith(b"\x89PNG")


class TestPermutedDigits:
    def test_tasks_hold_the_same_digits_with_other_pixels(self) -> None:
        first, second, *_ = load("permuted_digits").permuted_digits(seed=0)
        assert len(first[0]) + len(first[2]) == 1797
        assert torch.equal(first[1], second[1])
        assert not torch.equal(first[0], second[0])
        assert torch.equal(first[0].sort(1).values, second[0].sort(1).values)

    def test_ewc_protects_what_fine_tuning_forgets(self) -> None:
        learn = load("permuted_digits").learn
        plain, *protected = (
            learn(method, seed=0, steps=120)[2, 0] for method in ("fine-tuning", "EWC", "OnlineEWC")
        )
        assert min(protected) > plain + 0.2

    def test_the_command(
        self, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        example = load("permuted_digits")
        monkeypatch.setattr("sys.argv", ["permuted_digits.py", "--seeds=1", f"--out={picture}"])
        learn = example.learn
        monkeypatch.setattr(example, "learn", partial(learn, steps=120, hidden=64))
        threads = torch.get_num_threads()
        example.main()
        torch.set_num_threads(threads)
        printed = capsys.readouterr().out
        for part in (*example.COLOURS, "average", str(picture)):
            assert part in printed


class TestGallery:
    """Each example on little data or in few steps; what it claims it asserts itself, in full."""

    def test_looking_at_the_fisher(
        self, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        example = load("looking_at_the_fisher")
        monkeypatch.setattr("sys.argv", ["looking_at_the_fisher.py", f"--out={picture}"])
        monkeypatch.setattr(example.learn, "__defaults__", (1,))  # epochs
        threads = torch.get_num_threads()
        example.main()
        torch.set_num_threads(threads)
        printed = capsys.readouterr().out
        for part in ("Task 1", "Task 2", "output.weight", str(picture)):
            assert part in printed

    def test_choosing_strength(self, picture: Path) -> None:
        example = load("choosing_strength")
        found = example.sweep(0, [1.0, 1e4], steps=60)
        assert found.first.isnan().tolist() == [False, True]
        assert 1.0 < found.limit < 1e4
        assert "Laplace" in example.table(found)
        example.draw(found, picture)

    def test_split_digits(self, picture: Path) -> None:
        example = load("split_digits")
        results = example.compare(0, epochs=2)
        for accuracy in results.values():
            assert accuracy.shape == (5, 5)
            assert accuracy[0, 0] > 0.75
        example.draw(results, picture)

    def test_functions(self, picture: Path) -> None:
        example = load("functions")
        results = example.compare(0, steps=100)
        first = results["OnlineEWC"][0].deviation
        seen, unseen = (first[example.inside(example.PIECES[at])].mean() for at in (0, 2))
        assert unseen > 5 * seen
        example.draw(results, example.pieces(), picture)

    def test_sequences(self, picture: Path) -> None:
        example = load("sequences")
        batch = example.make(example.WAVES["sines"], 20)
        assert not batch.values[~batch.mask].any()
        results = example.compare(0, steps=10)
        errors = {method: rows for method, (_, rows) in results.items()}
        models = {method: model for method, (model, _) in results.items()}
        example.draw(errors, models, 0, picture)

    def test_language_model(self, picture: Path) -> None:
        example = load("language_model")
        steps = 2 * example.EVERY
        results = example.compare(0, steps, pretraining=40)
        for trained in example.RATES:
            plain, ours = (results[trained, method] for method in ("fine-tuning", "EWC"))
            assert torch.equal(plain[:3], ours[:3])  # up to the first consolidation
            assert ours[-1, 0] < plain[-1, 0]
        example.draw(results, picture)

    def test_lora_trains_only_what_is_beside_the_frozen_weights(self) -> None:
        example = load("language_model")
        model = example.with_lora(example.Transformer())
        trained = {name for name, one in model.named_parameters() if one.requires_grad}
        assert len(trained) == 10
        assert all(name.rpartition(".")[2] in ("down", "up") for name in trained)

    def test_hypernetwork(self, picture: Path) -> None:
        example = load("hypernetwork")
        results = example.compare(0, steps=2 * example.EVERY)
        for curve in results.values():
            assert curve.shape == (7, 3)
            assert curve[-1, -1] > 0.5
        example.draw(results, 2 * example.EVERY, picture)

    def test_lora(self, picture: Path) -> None:
        example = load("lora")
        runs = {}
        for make in (example.turned, example.split):
            found = [example.compare(make, seed, steps=20) for seed in range(2)]
            runs[make.__name__] = {key: torch.cat([one[key] for one in found]) for key in found[0]}
        for results in runs.values():
            assert {tuple(accuracies.shape) for accuracies in results.values()} == {(2, 3)}
            assert not torch.equal(results["adapter", 1.0], results["weights", 1.0])
        example.draw(runs, picture)

    def test_lora_changes_only_matrices_and_begins_at_the_base(self) -> None:
        example = load("lora")
        base = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        model = example.Adapted(base, rank=2)
        assert list(model.weights()) == ["0.weight", "1.weight"]
        torch.testing.assert_close(model.weights()["0.weight"], base[0].weight)
        trained = {name for name, one in model.named_parameters() if one.requires_grad}
        assert trained == {"down.0", "down.1", "up.0", "up.1"}

    def test_merging(self, picture: Path) -> None:
        example = load("merging")
        runs = {}
        for make in (example.turned, example.classes, example.covered):
            found = [example.compare(make, seed, steps=20) for seed in range(2)]
            results = {key: torch.stack([one[key] for one in found]) for key in found[0]}
            for end in (0, -1):  # a share of 0 or 1 is one of the two models, in both ways
                assert torch.equal(results["plain mean"][:, end], results["Fisher merging"][:, end])
            runs[make.__name__] = results
        example.draw(runs, picture)

    def test_merging_weighs_by_the_fisher(self) -> None:
        merged = load("merging").merged
        a, b = {"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([5.0, 5.0])}
        fishers = {"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([1.0, 0.0])}
        assert merged(a, b, *fishers, share=0.5)["w"].tolist() == [2.0, 3.0]

    def test_unlearning(self, picture: Path) -> None:
        example = load("unlearning")
        sets = {}
        for name, classes in example.CLASSES.items():
            found = [example.forget(digit, classes, digit, steps=100) for digit in range(2)]
            sets[name] = {key: torch.stack([one[key] for one in found]) for key in found[0]}
        assert (sets["ten classes"]["output switched off"][:, 0] == 0).all()
        example.draw(sets, picture)

    def test_unlearning_dampens_what_the_forgotten_digit_alone_needs(self) -> None:
        example = load("unlearning")
        model = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(model.weight)
        forgotten, retained = torch.tensor([[8.0, 3.0]]), torch.tensor([[2.0, 2.0]])
        dampened = example.dampen(model, {"weight": forgotten}, {"weight": retained}, alpha=2)
        assert dampened.weight.tolist() == [[0.25, 1.0]]
        assert model.weight.tolist() == [[1.0, 1.0]]

    def test_masks(self, picture: Path) -> None:
        example = load("masks")
        found = [example.compare(seed, steps=10) for seed in range(2)]
        learned, pruned = (
            {key: torch.stack([one[key] for one in each]) for key in each[0]}
            for each in zip(*found, strict=True)
        )
        assert "90 %" in example.table(pruned, example.PRUNED)
        example.draw(learned, pruned, picture)

    def test_masks_hold_the_most_important_weights_in_place(self) -> None:
        example = load("masks")
        torch.manual_seed(0)
        (task,) = example.permuted_digits(1)
        model = example.network()
        order = example.importance(model, "magnitude", {})
        frozen = example.largest(order, 0.3)
        assert sum(int(one.sum()) for one in frozen.values()) == pytest.approx(
            0.3 * sum(one.numel() for one in frozen.values()), abs=2
        )
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        example.train(model, task, 5, None, frozen)
        for name, after in model.named_parameters():
            assert torch.equal(after[frozen[name]], before[name][frozen[name]])
        assert not torch.equal(model[2].weight, before["2.weight"])

    @needs_sharding
    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as it is, for `resume`
    def test_sharded_on_a_single_process(self, tmp_path: Path) -> None:
        example = load("sharded")
        torch.manual_seed(0)
        tasks = [example.digits(0), example.digits(example.CLASSES)]
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            example.train_and_save(tasks, tmp_path)
        finally:
            dist.destroy_process_group()
        example.resume(tasks, tmp_path)  # asserts its own result


class TestGalleryPages:
    folder = DOCS / "gallery"
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))

    def test_every_example_has_one(self) -> None:
        pages = {path.stem for path in self.folder.glob("*.md")}
        assert pages == {*self.names, "index"}

    def test_the_index_lists_every_page(self) -> None:
        index = (self.folder / "index.md").read_text(encoding="utf-8")
        assert sorted(re.findall(r"^\| \[.+\]\((\w+)\.md\)", index, re.M)) == self.names
        (contents,) = re.findall(r"^```\{toctree\}\n(.*?)^```$", index, re.M | re.S)
        assert sorted(contents.split()[1:]) == self.names  # after `:hidden:`

    @pytest.mark.parametrize("name", names)
    def test_has_the_command_and_what_it_prints(self, name: str) -> None:
        page = (self.folder / f"{name}.md").read_text(encoding="utf-8")
        commands = re.findall(r"^(?:python|torchrun .*) docs/examples/(\w+)\.py", page, re.M)
        assert set(commands) == {name}
        assert len(re.findall(r"^```text$", page, re.M)) == len(commands)

    @pytest.mark.parametrize("name", names)
    def test_the_example_imports_nothing_from_a_neighbour(self, name: str) -> None:
        tree = ast.parse((EXAMPLES / f"{name}.py").read_text(encoding="utf-8"))
        imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert not imported & {path.stem for path in EXAMPLES.glob("*.py")}

    @pytest.mark.parametrize("name", [name for name in names if name != "sharded"])
    def test_has_the_picture_that_the_command_draws(self, name: str) -> None:
        page = (self.folder / f"{name}.md").read_text(encoding="utf-8")
        assert re.findall(r"!\[[^]]+\]\((.+?)\)", page) == [f"../images/{name}.png"]
        assert re.findall(r"--out docs/(\S+)$", page, re.M) == [f"images/{name}.png"]
        assert (DOCS / "images" / f"{name}.png").is_file()
