"""What the benchmarks refuse, and what is written beside their figures."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "words",
    ["train_speed.py --rounds 0", "scaling.py --rounds -2", "time_to_loss.py --seconds 0", "ablate.py x --steps 0"],
)
def test_a_benchmark_of_nothing_is_refused_at_once(words: str) -> None:
    script, *options = words.split()
    done = subprocess.run([sys.executable, ROOT / "bench" / script, *options], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith(f"{options[-1]} is not above 0\n")


@pytest.mark.parametrize("changed", ["model.py", "decoding.cpp", "bench/peers.py", None])
def test_a_result_says_that_any_part_of_the_code_was_not_the_commits(tmp_path: Path, changed: str | None) -> None:
    (tmp_path / "bench").mkdir()
    for name in (
        "model.py",
        "decoding.cpp",
        "hardware.py",
        "errors.py",
        "files.py",
        "bench/peers.py",
        "bench/context.py",
    ):
        shutil.copy(ROOT / name, tmp_path / name)
    for words in ("init -q", "add .", "-c user.name=x -c user.email=x commit -qm x"):
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    if changed:
        with (tmp_path / changed).open("a") as file:
            file.write("\n")
    script = "from bench.context import context; print(context()['uncommitted'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{changed is not None}\n"
