"""train.py --plan and --check: what is told before a run is what the run then takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import memory
import train
from errors import ConfigError
from tests.test_train import Runs


def seconds(text: str) -> float:
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return sum(int(n) * unit[u] for n, u in re.findall(r"(\d+)([smhd])", text))


def test_a_plan_foretells_the_run_and_leaves_nothing_behind(runs: Runs) -> None:
    options = ["--train.max_steps", "60", "--train.eval_every", "60", "--train.save_every", "60"]
    out, _ = runs("planned", *options, "--plan", "--price_per_hour", "36")
    assert not [*runs.folder.iterdir()], "a plan left something"
    assert "60 steps of 256 tokens: 15,360 tokens" in out
    price = re.search(r"price +([0-9.]+) at 36 an hour", out)
    assert price
    told_seconds = float(price[1]) * 100
    told_bytes = re.search(r"disk +(\d+) MB a checkpoint, (\d+) at a time", out)
    assert told_bytes

    runs("planned", *options)
    records = runs.records("planned")
    took = max(r["time"] for r in records) - min(r["time"] for r in records)
    assert 0.3 < told_seconds / took < 3.3  # on a machine whose other core may be busy in one of the two
    n_bytes = sum(path.stat().st_size for path in runs.checkpoint("planned", 60).glob("*.safetensors"))
    assert abs(n_bytes / 2**20 - int(told_bytes[1])) <= 1
    assert len([*(runs.folder / "planned").glob("step-*")]) <= int(told_bytes[2])


def test_a_plan_counts_the_memory_of_the_rows_that_auto_will_choose(runs: Runs) -> None:
    auto, fixed = (
        ["--train.batch_size", "auto", "--train.gradient_accumulation_steps", "4"],
        ["--train.batch_size", "16"],
    )
    told = [runs("fitted", "--plan", "--model.max_length", "512", *options)[0] for options in (auto, fixed)]
    counted = [re.findall(r"memory +([0-9.]+) GB a device at most, with 16 rows at once", out) for out in told]
    assert counted[0] == counted[1] != []
    assert float(counted[0][0]) > 0.01


def test_a_plan_measures_a_run_that_saves_by_the_minute_and_one_that_begins_with_other_weights(runs: Runs) -> None:
    runs("parent")
    text = runs.folder / "few.txt"  # gives no tokenizer of the parent's size by itself
    text.write_text("\n\n".join("a few words " * n for n in range(1, 60)))
    options = ["--plan", "--train.save_minutes", "0.0001", "--data.current_datasets", "LOCAL"]
    options += ["--data.dataset_probabilities", "1", "--data.local_files", str(text)]
    before = {*runs.folder.iterdir()}
    out, _ = runs("child", *options, "--init_from", str(runs.folder / "parent"))
    assert re.search(r"passes over LOCAL [\d.]+\n", out)
    assert "measured in 5 steps" in out
    assert {*runs.folder.iterdir()} == before, "a plan left something"


def test_a_run_by_epochs_passes_over_each_dataset_as_often_whatever_its_share(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--plan", "--gpu", "T4", "--mfu", "0.4", "--train.max_steps", "0", "--train.epochs"]
    options = [*runs.command("")[-4:], *options]
    unequal = ["--data.dataset_probabilities", "0.05", "0.95"]
    train.main(["--preset", "smoke", *options, "2", *unequal])
    out = capsys.readouterr().out
    assert "passes over SOTU 2.00, WIKI 2.00\n" in out
    assert "by heart" not in out
    train.main(["--preset", "smoke", *options, "5", *unequal])
    assert "SOTU 5 times, WIKI 5 times: more than about 4 passes" in capsys.readouterr().out
    by_documents = ["--train.max_steps", "90000", "--data.mix_by", "documents"]  # a speech is as long as 70 articles
    train.main(["--preset", "smoke", *options[:-3], *by_documents])
    out = capsys.readouterr().out
    assert "how often it is passed over is not known" in out
    assert "by heart" not in out


def test_a_plan_counts_checkpoints_by_the_minute_from_the_last_one_on(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "gpt2", "--plan", "--gpu", "H100", "--mfu", "0.4", "--train.max_steps", "18000"]
    for save_every, n_saves in (("100000", 2), ("17000", 3), ("9000", 2)):  # of 40 minutes, with one at 30
        train.main([*options, "--train.save_every", save_every, "--train.keep_checkpoints", "100"])
        out = capsys.readouterr().out
        assert re.search(r"18,000 steps 39m40s", out), out
        assert f"{n_saves} at a time" in out


def test_a_plan_of_a_run_that_goes_on_has_its_rows_per_step(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs("begun", "--train.max_steps", "5")
    options = [*runs.command("begun")[2:], "--plan", "--gpu", "T4", "--mfu", "0.4", "--resume"]
    train.main([*options, "--train.batch_size", "1"])
    assert "20 steps of 256 tokens" in capsys.readouterr().out


def test_a_plan_does_not_touch_the_run_of_that_name(runs: Runs) -> None:
    runs("existing")
    before = {path: path.stat().st_mtime_ns for path in (runs.folder / "existing").rglob("*")}
    runs("existing", "--plan", "--resume")
    assert {path: path.stat().st_mtime_ns for path in (runs.folder / "existing").rglob("*")} == before


def test_a_plan_for_a_gpu_that_is_not_here_follows_from_its_peak(capsys: pytest.CaptureFixture[str]) -> None:
    def plan(mfu: str) -> tuple[float, str]:
        train.main(["--preset", "gpt2", "--plan", "--gpu", "H100", "--mfu", mfu])
        out = capsys.readouterr().out
        rate = re.search(r"speed +([0-9,]+) tokens/s", out)
        assert rate
        return float(rate[1].replace(",", "")), out

    slow, _ = plan("0.2")
    fast, out = plan("0.4")
    assert fast == pytest.approx(2 * slow, rel=1e-4)
    assert "if 1 x H100 reach 40% of 989 TFLOP/s" in out
    assert "lr        0.02 at its peak\n" in out
    assert re.search(r"time .*, compiling 1m00s\n", out)  # and no seconds for what is not counted
    flops = re.search(r"([0-9,.]+) MFLOP per token", out)
    assert flops
    assert fast == pytest.approx(989e12 * 0.4 / (float(flops[1].replace(",", "")) * 1e6), rel=1e-3)


def test_a_plan_for_a_gpu_counts_in_the_gpus_format_not_in_this_machines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(precision: str) -> list[str]:
        options = ["--plan", "--gpu", "H100", "--mfu", "0.4", "--train.precision", precision]
        assert train.main(["--preset", "gpt2", *options]) == 0
        out = capsys.readouterr().out
        return [line for line in out.splitlines() if line.startswith(("memory", "speed"))]

    def unusable(_: object) -> NoReturn:
        raise ConfigError("a GPU that this torch has no code for")

    bf16, tf32 = plan("bf16"), plan("tf32")
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(memory, "best_dtype", lambda _, dtype=dtype: dtype)
        assert plan("auto") == bf16
    monkeypatch.setattr(memory, "best_dtype", unusable)
    assert plan("auto") == bf16
    gigabytes = [float(re.findall(r"[0-9.]+", lines[0])[0]) for lines in (bf16, tf32)]
    assert gigabytes[0] < gigabytes[1]
    assert "40% of 494.5 TFLOP/s" in tf32[1]
    assert "40% of 989 TFLOP/s" in bf16[1]
    with pytest.raises(ConfigError, match="how fast GPUs are in fp32 is not known"):
        plan("fp32")


@pytest.mark.parametrize("gpu", ["T4", "V100"])
def test_a_plan_for_a_gpu_before_ampere_refuses_the_formats_that_it_lacks(
    gpu: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--preset", "gpt2", "--plan", "--gpu", gpu, "--mfu", "0.4", "--train.precision"]
    for precision in ("bf16", "tf32"):
        with pytest.raises(ConfigError, match=f"a {gpu} has no {precision}; plan with --train.precision fp16 or auto"):
            train.main([*options, precision])
    with pytest.raises(ConfigError, match=r"not known here; plan with --train.precision fp16"):
        train.main([*options, "fp32"])
    plans = []
    for precision in ("fp16", "auto"):
        assert train.main([*options, precision]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]


def test_a_plan_for_a_gpu_that_is_not_here_holds_the_memory_against_the_cards(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def plan(*options: str) -> str:
        train.main(["--preset", "gpt2", "--plan", "--mfu", "0.4", *options])
        return capsys.readouterr().out

    given, fitted = plan("--gpu", "T4"), plan("--gpu", "T4", "--train.fit_memory")
    assert "32 rows at once, of 12.7 to use\n" in given  # 85% of 16 * 10^9 bytes
    told = ["  ! it may not fit the memory; --train.batch_size auto" in out for out in (given, fitted)]
    assert told == [True, False]
    chosen = re.search(r"memory +([0-9.]+) GB a device at most, with (\d+) rows at once, of 12.7 to use\n", fitted)
    assert chosen
    assert float(chosen[1]) <= 12.7
    assert 1 < int(chosen[2]) < 32


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (["--data.bpe_vocab_size", "8192"], "embedding and head are 9"),
        (["--train.warmup_tokens", "2560"], "warm-up takes 50% of the run"),
        ([], "only 20 steps: a smaller batch"),
        (["--train.max_steps", "200000"], "teach it by heart"),
        ([], "tokens per parameter; about 20 are compute-optimal"),
    ],
)
def test_a_plan_warns_of_what_usually_goes_wrong(
    options: list[str], warning: str, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(["--preset", "smoke", *runs.command("")[-4:], "--plan", "--gpu", "T4", "--mfu", "0.4", *options])
    out = capsys.readouterr().out
    assert any(line.startswith("  ! ") and warning in line for line in out.splitlines()), out


def test_a_plan_warns_of_nothing_when_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["--preset", "gpt2", "--plan", "--gpu", "H100", "--mfu", "0.4", "--train.max_steps", "40000"])
    assert "  ! " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--plan", "--gpu", "H1000", "--mfu", "0.4"], "there is no GPU 'H1000' in the table; choose from"),
        (["--plan", "--gpu", "H100", "--mfu", "40"], "mfu is 40.0; use a share above 0"),
        (["--plan", "--gpu", "H100"], "gpu and mfu go together, such as --gpu H100 --mfu 0.4"),
        (["--gpu", "H100"], "are for --plan"),
        (["--train.hang_minutes", "1e12"], "train.hang_minutes is 1000000000000.0; use at most 1e6"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(runs: Runs, options: list[str], says: str) -> None:
    _, err = runs("wrong", *options, code=2)
    assert says in err
    assert err.count("\n") == 1


def test_a_check_goes_through_the_parts_of_a_run_and_leaves_nothing_behind(runs: Runs) -> None:
    before = {*runs.folder.iterdir()}
    out, _ = runs("checked", "--check")
    for part in ("data, a step, a save", "resume, one more step", "generate", "evaluate"):
        assert f"\nok  {part}  " in out
    assert "ready: " in out
    assert {*runs.folder.iterdir()} == before


def test_two_processes_are_measured_together_and_planned_for_once(runs: Runs) -> None:
    out, err = runs("planned-together", "--plan", processes=2)
    assert out.count("measured in") == err.count("measuring") == 1
    assert "device    2 x " in out


def test_trackers_show_neither_a_plan_nor_a_check_but_have_to_be_installed(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text("raise SystemExit('wandb is asked to show this')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    _, err = runs("shown", "--train.trackers", "wandb", code=1)
    assert "wandb is asked to show this" in err
    out, _ = runs("checked", "--check", "--train.trackers", "wandb")
    assert "ok  tracker                wandb is installed; whether it starts is seen in the run" in out
    assert "ready: " in out
    out, _ = runs("planned", "--plan", "--train.trackers", "wandb")
    assert "measured in" in out
    (tmp_path / "wandb.py").unlink()
    (tmp_path / "wandb").mkdir()  # as wandb makes one beside its runs; no package
    _, err = runs("checked", "--check", "--train.trackers", "wandb", code=2)
    assert err == "error: train.trackers has wandb, which is not installed: pip install wandb\n"


def test_a_check_that_fails_says_why_and_ends_with_the_runs_exit_code(runs: Runs, tmp_path: Path) -> None:
    local = ["--data.current_datasets", "LOCAL", "--data.dataset_probabilities", "1"]
    out, _ = runs("unread", "--check", *local, "--data.local_files", str(tmp_path / "nothing.txt"), code=3)
    last = out.splitlines()[-1]
    assert last.startswith(" !  data, a step, a save")
    assert "nothing.txt" in last
