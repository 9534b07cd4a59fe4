"""The examples, in settings so small that they take seconds."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

for library in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(library)

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return load("permuted_digits")


@pytest.fixture
def small(digits: ModuleType) -> Any:
    return digits.Settings(tasks=2, seeds=1, steps=10, hidden=16, evaluations=2, sweep=False)


class TestPermutedDigits:
    def test_tasks_hold_the_same_digits_with_other_pixels(self, digits: ModuleType) -> None:
        first, second = digits.permuted_digits(2, seed=0)
        assert len(first.x) + len(first.x_test) == 1797
        assert torch.equal(first.y, second.y)
        assert not torch.equal(first.x, second.x)
        assert torch.equal(first.x.sort(1).values, second.x.sort(1).values)

    def test_ewc_remembers_what_fine_tuning_forgets(self, digits: ModuleType) -> None:
        settings = digits.Settings(tasks=3, seeds=1, steps=150, sweep=False)
        plan = digits.comparison(settings)
        results = digits.run_all([job for jobs in plan.values() for job in jobs], settings)
        final = {
            method: results[job.name].final[0] for method, jobs in plan.items() for job in jobs
        }
        assert final["EWC"] > final["fine-tuning"] + 0.2
        assert final["OnlineEWC"] > final["fine-tuning"] + 0.2

    @pytest.mark.parametrize("method", ["EWC", "OnlineEWC", "fine-tuning", "joint training"])
    def test_an_interrupted_run_continues_to_the_same_numbers(
        self, digits: ModuleType, small: Any, tmp_path: Path, method: str
    ) -> None:
        small = replace(small, tasks=3)
        jobs = [digits.Job("fine-tuning", 1), digits.Job(method, 0, strength=10.0)]
        whole = digits.run_all(jobs, small)
        path = tmp_path / "state.pt"
        calls = 0

        def save(state: dict[str, Any]) -> None:
            nonlocal calls
            digits.save_checkpoint(path, state)
            calls += 1
            if calls == 5:  # after the second of the second job's three tasks
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            digits.run_all(jobs, small, save=save)
        assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
        resumed = digits.run_all(jobs, small, digits.load_checkpoint(path, small))
        assert resumed.keys() == whole.keys()
        for name, result in whole.items():
            assert torch.equal(resumed[name].curve, result.curve)
            assert resumed[name].largest == result.largest

    def test_a_checkpoint_of_other_settings_is_refused(
        self, digits: ModuleType, small: Any, tmp_path: Path
    ) -> None:
        path = tmp_path / "state.pt"
        digits.run_all(
            [digits.Job("EWC", 0, 1.0)], small, save=lambda s: digits.save_checkpoint(path, s)
        )
        with pytest.raises(SystemExit, match="strength is 7.0, in the file 100.0"):
            digits.load_checkpoint(path, replace(small, strength=7.0))

    def test_divergence_is_explained(self, digits: ModuleType, small: Any) -> None:
        with pytest.raises(SystemExit, match="diverged.*--strength"):
            digits.run_all([digits.Job("EWC", 0, strength=1e9)], replace(small, tasks=2, steps=100))

    def test_the_command(
        self,
        digits: ModuleType,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        picture = tmp_path / "picture.png"
        monkeypatch.setattr("sys.argv", ["permuted_digits.py", "--tasks=2", f"--out={picture}"])
        small = digits.Settings
        monkeypatch.setattr(
            digits,
            "Settings",
            lambda **given: small(
                **{**given, "seeds": 2, "steps": 10, "hidden": 16, "evaluations": 2}
            ),
        )
        threads = torch.get_num_threads()
        digits.main()
        torch.set_num_threads(threads)
        printed = capsys.readouterr().out
        for part in (*digits.METHODS, "average", "Stability", "Laplace", str(picture)):
            assert part in printed
        assert picture.read_bytes().startswith(b"\x89PNG")
