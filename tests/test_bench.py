"""What the benchmarks refuse, and what is written beside their figures."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import time_to_loss
from bench.ablate import effects, factorial, joined

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


def test_of_eight_changes_together_each_is_in_half_of_the_runs_whatever_the_seed_and_the_others_are() -> None:
    runs = factorial()
    assert len(set(runs)) == 16
    assert [seed for seed, _ in runs] == sorted(4 * [0, 1, 2, 3])
    made = list(zip(*(changes for _, changes in runs), strict=True))
    assert [sum(change[4 * seed : 4 * seed + 4]) for change in made for seed in range(4)] == 8 * 4 * [2]
    for several in (2, 3):  # of three as well: so no change looks like the joint effect of two others
        for together in itertools.combinations(made, several):
            assert sum(map(all, zip(*together, strict=True))) == 16 >> several


def test_of_eight_changes_together_each_ones_effect_is_found_beside_noise_and_joint_effects() -> None:
    true = [0.01, -0.02, 0.03, 0.0, 0.005, 0.0, -0.01, 0.07]
    values = [1.7 + 0.02 * seed + sum(itertools.compress(true, changes)) for seed, changes in factorial()]
    found, error = effects(factorial(), values)
    assert found == pytest.approx(true, abs=1e-9)
    assert error == pytest.approx(0, abs=1e-9)
    # two that gain less together: half of that is each one's effect over the runs with and without the other
    jointly = [v + 0.008 * (made[0] and made[1]) for v, (_, made) in zip(values, factorial(), strict=True)]
    found, _ = effects(factorial(), jointly)
    assert found == pytest.approx([0.014, -0.016, *true[2:]], abs=1e-9)
    noise = [
        0.002,
        -0.001,
        0.001,
        0.0,
        -0.002,
        0.003,
        -0.001,
        0.001,
        0.0,
        -0.003,
        0.002,
        0.001,
        -0.001,
        0.0,
        0.002,
        -0.002,
    ]
    found, error = effects(factorial(), [v + n for v, n in zip(values, noise, strict=True)])
    assert found == pytest.approx(true, abs=4 * error)
    assert 0.0003 < error < 0.002


def test_the_options_of_several_changes_are_joined_with_their_variants_first() -> None:
    changes = ["--variant a --x 'two words'", "--y 2", "--variant b"]
    assert joined(changes) == "--variant a,b --x 'two words' --y 2"
    assert joined(changes[1:2]) == "--y 2"
    assert joined([]) == ""


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ([f"{n}: --x{n} 1" for n in range(7)], "--together takes eight changes, not 7"),
        ([f"{n}: --x{n} 1" for n in range(7)] + ["7: --x0 2"], "--x0 is in two changes, and where both are made the"),
        ([f"{n}: --x{n} 1" for n in range(8)] + ["3: --x9 2"], "two changes have one name"),
        ([f"{n}: --x{n} 1" for n in range(7)] + ["7: --variant"], "--variant has no name; bench/variants.py prints"),
        ([f"{n}: --x{n} 1" for n in range(8)] + ["--seeds=4"], "--together has four seeds of its own; leave --seeds"),
    ],
)
def test_changes_that_cannot_be_made_together_are_refused_before_any_run(
    tmp_path: Path, changes: list[str], why: str
) -> None:
    command = [sys.executable, str(ROOT / "bench" / "ablate.py"), str(tmp_path / "out.json"), "--together", *changes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert why in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("late: --variant polar-5,polar-6", "late: there is no variant 'polar-6'; bench/variants.py prints"),
        ("late: --train.lr -3", "late: train.lr is -3.0; use a positive number"),
        ("late: --variant polar-5 --train.lrr 3", "unrecognized options: --train.lrr"),
        ("late: --train.warmup_tokens 20000000", "whole run has 300"),
        ("late: --train.run_name 'x", "--train.run_name 'x: no closing quotation"),
        ("don't: --variant ''", "don't: there is no variant ''"),
        ("late: --help", "late: --help is no change"),
    ],
)
def test_a_change_that_cannot_be_trained_is_refused_before_any_run(tmp_path: Path, change: str, why: str) -> None:
    command = [sys.executable, str(ROOT / "bench" / "ablate.py"), str(tmp_path / "out.json"), "first: ", change]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert why in done.stderr.lower()
    assert not [*tmp_path.iterdir()]


def test_an_ablation_goes_on_with_further_seeds_and_each_has_the_command_that_it_is_of(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    common = f"--train.no_compile --train.warmup_tokens 0 --data.cache_dir {tmp_path / 'cache'}"
    ablate = [sys.executable, str(ROOT / "bench" / "ablate.py"), str(out), "--preset", "smoke", "--steps", "2"]
    said = [
        subprocess.run([*ablate, "--seeds", n, "--common", common], capture_output=True, text=True, check=True).stdout
        for n in ("1", "2")
    ]
    assert [text.count("as it is, seed") for text in said] == [1, 1]
    ((entry,),) = [table.values() for table in json.loads(out.read_text()).values()]
    assert [entry["contexts"][seed]["command"].partition(" --seeds ")[2][:1] for seed in ("0", "1")] == ["1", "2"]
    assert entry["bits_per_byte"]["0"] != entry["bits_per_byte"]["1"]
    assert f"{sum(entry['bits_per_byte'].values()) / 2:.4f} +- " in said[1]


@pytest.mark.parametrize("needed", [1, 9, 10, 11, 26, 30, 131, 560])
@pytest.mark.parametrize("at", [0, 4])
def test_the_shortest_run_to_a_loss_is_found_to_one_step_in_forty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, needed: int, at: int
) -> None:
    def train(steps: int, seed: int, folder: Path) -> dict[str, float]:
        return {"steps": steps, "seconds": 2.0 * steps, "bits_per_byte": 5.0 if steps < needed else 1.0}

    monkeypatch.setattr(time_to_loss, "train_ours", train)
    reached, ours = time_to_loss.fewest_steps(1.5, 0, tmp_path, at)
    assert reached
    assert needed <= ours["steps"] <= needed + needed // 40


def test_a_loss_that_no_run_gets_to_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        time_to_loss, "train_ours", lambda steps, *_: {"steps": steps, "seconds": 1, "bits_per_byte": 2}
    )
    reached, ours = time_to_loss.fewest_steps(1.5, 0, tmp_path, 0)
    assert not reached
    assert ours["steps"] == time_to_loss.OUR_STEPS[-1]


@pytest.mark.parametrize("words", ["", "nothing", "embedding-norm,nothing"])
def test_variants_refuse_a_name_they_do_not_have(words: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "variants.py", *words.split()], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "embedding-norm" in done.stderr
