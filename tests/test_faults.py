"""The fault suite itself works: a small version of each proof, in a process of its own as a person starts it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.test_train import ROOT


@pytest.mark.slow
def test_the_whole_suite_in_small() -> None:
    command = [sys.executable, str(ROOT / "bench/faults.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    results = dict(re.findall(r"^(\w+) +(passed|skipped) +[\d.]+  ", done.stdout, re.MULTILINE))
    assert results.keys() == {"saves", "kills", "order", "flips", "disk", "signals", "worlds", "stall", "harm"}
    may_skip = {"order", "disk"}  # no strace, or no right to mount
    assert {name for name, result in results.items() if result == "skipped"} <= may_skip
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


def test_a_proof_that_does_not_exist_is_refused_by_name() -> None:
    command = [sys.executable, str(ROOT / "bench/faults.py"), "kill"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no proof is called kill; there are saves, kills, order" in done.stderr
