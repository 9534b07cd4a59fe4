"""What type checkers say about code that uses the library: mypy --strict, pyright in both modes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
SCRIPT, MISTAKES = "user_script.py", "mistakes.py"


def mypy(folder: Path) -> dict[str, set[int]]:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", SCRIPT, MISTAKES]
    cache = f"--cache-dir={ROOT / '.mypy_cache'}"
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [*command, cache], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[str, set[int]] = {SCRIPT: set(), MISTAKES: set()}
    for line in done.stdout.splitlines():
        match = re.match(r"(.+?):(\d+): error:", line)
        if match and match[1] in found:  # `ewc` is checked with the project's own settings
            found[match[1]].add(int(match[2]))
    return found


def pyright(folder: Path, mode: str) -> dict[str, set[int]]:
    pytest.importorskip("pyright")
    configuration = {"typeCheckingMode": mode, "extraPaths": [str(ROOT)], "pythonVersion": "3.10"}
    (folder / "pyrightconfig.json").write_text(json.dumps(configuration))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, "-p", str(folder)], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["summary"]["filesAnalyzed"] == 2
    found: dict[str, set[int]] = {SCRIPT: set(), MISTAKES: set()}
    for each in answer["generalDiagnostics"]:
        found[Path(each["file"]).name].add(each["range"]["start"]["line"] + 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("checker", ["mypy strict", "pyright standard", "pyright strict"])
def test_the_script_is_accepted_and_every_mistake_is_found(checker: str, tmp_path: Path) -> None:
    for name in (SCRIPT, MISTAKES):
        shutil.copy(FOLDER / name, tmp_path)
    name, mode = checker.split()
    found = mypy(tmp_path) if name == "mypy" else pyright(tmp_path, mode)
    lines = (FOLDER / MISTAKES).read_text(encoding="utf-8").splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("  # error")}
    assert found == {SCRIPT: set(), MISTAKES: expected}


def test_the_script_has_every_public_name_and_silences_nothing() -> None:
    import ewc

    text = (FOLDER / SCRIPT).read_text(encoding="utf-8")
    assert [name for name in ewc.__all__ if not re.search(rf"\b{name}\b", text)] == []
    assert not re.search(r"# *(type|pyright|mypy):", text)


def test_the_script_runs() -> None:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, str(FOLDER / SCRIPT)],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        timeout=120,
    )
