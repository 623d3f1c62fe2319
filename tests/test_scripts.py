"""The calculators: they run from any folder, count what is built, and print tables that fit."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from bench.context import publish
from checkpoint import DiskError, gather_tensors
from config import PRESETS, Config, GPTConfig, TrainingConfig, load_config
from memory import training_memory
from model import GPT
from optim import build_optimizers, lr_factor_at
from plan import most_checkpoints, run_length
from scripts import calc_lr_config, calc_params
from tests.conftest import GETTYSBURG
from tokenizer import load_tiktoken

REPO = Path(__file__).resolve().parent.parent
PARAMS, LENGTH = str(REPO / "scripts/calc_params.py"), str(REPO / "scripts/calc_lr_config.py")


def run(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def output_of(folder: Path, *command: str, **environment: str) -> str:
    result = run(folder, *command, **environment)
    assert (result.stderr, result.returncode) == ("", 0)
    assert not list(folder.glob("checkpoints*"))
    return result.stdout


def number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, text
    return int(match[1].replace(",", ""))


def assert_tables_fit(text: str) -> None:
    tables = [line for line in text.splitlines() if line.startswith(" ")]
    assert len(tables) > 10
    assert max(map(len, tables)) <= 100


def assert_counts_the_built_model(shown: str, config: Config) -> None:
    with torch.device("meta"):
        model = GPT(config.model.resolved(config.data.n_vocab))
    parameters = sum(p.numel() for p in model.parameters())
    assert number(r"total +([\d,]+) ", shown) == parameters
    for part, count in model.parameter_counts().items():
        assert number(rf"{part} +([\d,]+) ", shown) == count
    assert f"{model.flops_per_token() / 1e6:,.1f} M to train" in shown
    momenta = 2 * parameters  # AdamW's; Muon keeps one number per weight
    if config.train.optimizer == "muon":
        momenta -= sum(p.numel() for p, _ in model.block_matrices())
    assert re.search(rf"weights +{4 * parameters / 2**30:.2f} GB", shown)
    assert re.search(rf"optimizer \({config.train.optimizer}\) +{4 * momenta / 2**30:.2f} GB", shown)
    (yours,) = (line for line in shown.splitlines() if line.endswith("<- yours"))
    assert yours.split()[0] == str(config.model.d_model)
    assert_tables_fit(shown)


def test_calc_params_counts_the_built_model_from_any_folder(tmp_path: Path):
    shown = output_of(tmp_path, PARAMS, "--preset", "gpt2")
    assert_counts_the_built_model(shown, PRESETS["gpt2"])


def test_calc_params_counts_other_choices_too(capsys: pytest.CaptureFixture[str]):
    options = "--preset smoke --model.mlp relu2 --model.n_kv_heads 1 --train.optimizer adamw --train.lr 1e-3".split()
    options += ["--train.batch_size", "auto"]
    assert calc_params.main(options) == 0
    shown = capsys.readouterr().out
    assert_counts_the_built_model(shown, load_config(options, "", Config))
    assert "GB, with batch_size 4\n  (batch_size auto: the run itself chooses it" in shown


@pytest.mark.parametrize("options", ["--model.tie_embeddings", "--train.optimizer adamw --train.lr 1e-3"])
def test_checkpoints_take_the_room_that_was_counted(options: str):
    config = load_config(["--preset", "smoke", *options.split()], "", Config)
    model = GPT(config.model.resolved(config.data.n_vocab))
    optimizers = build_optimizers(model, config.train)
    ids = torch.zeros(1, 8, dtype=torch.long)
    model(ids, ids).backward()
    for optimizer in optimizers:
        optimizer.step()
    written = gather_tensors(model, optimizers, keep=True)
    size = sum(tensor.nbytes for tensors in written.values() for tensor in tensors.values())
    assert size == pytest.approx(training_memory(config, 1).checkpoint, rel=0.001)


def test_room_on_the_disk_is_wanted_for_the_checkpoints_that_may_still_be_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def shown_for(free_disks: float) -> str:
        """--check_disk for a model whose checkpoint is so many times what is free here."""
        layers = round(free_disks * shutil.disk_usage(tmp_path).free / (8 * 12 * 4096**2))  # 8 bytes per weight
        config = f"--model.d_model 4096 --model.n_heads 32 --model.mlp relu2 --model.n_layers {layers}".split()
        assert calc_params.main([*config, "--check_disk", "--train.out_dir", str(tmp_path)]) == 0
        return capsys.readouterr().out

    assert most_checkpoints(load_config(["--train.keep_checkpoints", "2"], "", Config), 0) == 4
    kept = ["--train.max_steps", "950", "--train.keep_every", "100"]
    assert most_checkpoints(load_config(kept, "", Config), 950) == 14
    by_epochs = load_config(["--train.keep_every", "1000"], "", Config)  # 266 thousand steps: 266 are kept, and 5
    assert calc_params.most_checkpoints_of(by_epochs) == 5 + run_length(by_epochs, 1)[0] // 1000 > 200
    none = ["--data.current_datasets", "LOCAL", "--data.dataset_probabilities", "1", "--data.local_files", "none.txt"]
    assert calc_params.most_checkpoints_of(load_config([*kept, *none], "", Config)) == 14  # its data is not read
    run = tmp_path / "fineweb"
    assert re.fullmatch(rf"Checkpoints of [\d.]+ GB in {run}: [\d.]+ GB for 5 more, of .* GB free\n", shown_for(0.1))
    with pytest.raises(DiskError, match=r"GB for 5 more, and .* GB are free; free some space, choose another"):
        shown_for(0.4)
    for step in (10, 20, 30, 40):  # a run with all its checkpoints: each new one makes way for itself afterwards
        (run / f"step-{step:08d}").mkdir(parents=True)
    assert "GB for 1 more" in shown_for(0.4)
    with pytest.raises(DiskError, match="GB for 1 more"):
        shown_for(1.5)
    (run / ".tmp-step-00000050").mkdir()  # train.py removes what a killed save left
    with (run / ".tmp-step-00000050/model.safetensors").open("wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).free)
    assert "GB for 1 more" in shown_for(1.5)


def test_calc_lr_config_plans_the_missions_run_without_the_network(tmp_path: Path):
    shown = output_of(tmp_path, LENGTH, HTTPS_PROXY="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    steps, warmup = number(r"length +([\d,]+) steps", shown), Config().warmup_steps()
    assert number(r"= ([\d,]+) tokens per step", shown) == Config().tokens_per_step() == 131_072
    assert re.search(r"epochs +3\.00 of", shown)
    assert number(r"warm-up to step ([\d,]+),", shown) == warmup
    falls_from = number(r"from step ([\d,]+) linear", shown)
    assert lr_factor_at(falls_from - 1, steps, warmup, TrainingConfig()) == 1
    assert lr_factor_at(falls_from + 1, steps, warmup, TrainingConfig()) < 1
    (yours,) = (line for line in shown.splitlines() if line.endswith("<- yours"))
    assert yours.split()[:4] == ["4", "128", "131,072", f"{steps:,}"]
    assert_tables_fit(shown)


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        (["--preset", "demo"], {"lr (block matrices)": 0.03, "head and norms": 0.008 * 3**0.5, "embedding": 0.52}),
        (["--preset", "gpt2"], {"lr (block matrices)": 0.02, "head and norms": 0.008}),  # its embedding is the head
        (["--preset", "demo", "--train.optimizer", "adamw", "--train.lr", "1e-3"], {"lr (all weights)": 1e-3}),
    ],
)
def test_calc_lr_config_shows_the_rates_that_the_run_will_have(
    options: list[str], rates: dict[str, float], capsys: pytest.CaptureFixture[str]
):
    assert calc_lr_config.main(options) == 0
    (table,) = re.findall(r"peak +final\n((?:.+ [\d.e+-]+\n)+)", capsys.readouterr().out)
    shown = dict(re.findall(r"^(.+?) +([\d.e+-]+) ", table, re.MULTILINE))
    assert {name: float(rate) for name, rate in shown.items()} == pytest.approx(rates, rel=1e-2)


def test_calc_lr_config_counts_texts_of_ones_own_and_plans_for_many_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    texts, cache = tmp_path / "texts", tmp_path / "cache"
    texts.mkdir()
    for i in range(100, 300):
        (texts / f"{i}.txt").write_text(f"{i}. {GETTYSBURG}")
    options = [
        "--preset", "smoke", "--train.max_steps", "0", "--train.epochs", "2", "--data.current_datasets", "LOCAL",
        "--data.dataset_probabilities", "1", "--data.local_files", str(texts), "--data.cache_dir", str(cache),
        "--data.val_fraction", "0.1", "--data.tokenizer", "gpt2",
    ]  # fmt: skip
    per_text = len(load_tiktoken("gpt2", str(cache)).encode(f"100. {GETTYSBURG}")) + 1  # with end-of-text
    steps = {}
    for devices in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", str(devices))
        assert calc_lr_config.main(options) == 0
        shown = capsys.readouterr().out
        assert number(r"= ([\d,]+) tokens per step", shown) == 256 * devices
        steps[devices] = number(r"length +([\d,]+) steps", shown)
        assert_tables_fit(shown)
    assert steps[1] == pytest.approx(2 * 0.9 * 200 * per_text / 256, abs=1)
    assert steps[2] == pytest.approx(steps[1] / 2, abs=1)


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ([PARAMS, "--model.d_model", "250"], 2, "error: model.d_model 250 does not divide"),
        ([PARAMS, "--model.dmodel", "250"], 2, "Perhaps you meant"),
        ([LENGTH, "--preset", "nano"], 2, "error: there is no preset 'nano'"),
        ([LENGTH, "--train.max_steps", "10", "--train.warmup_tokens", "9000000"], 2, "error: train.warmup_tokens"),
        ([LENGTH, "--data.current_datasets", "LOCAL", "--data.dataset_probabilities", "1",
          "--data.local_files", "none.txt", "--data.tokenizer", "bpe"], 3, "none.txt"),
    ],
    ids=["impossible", "typo", "no preset", "warm-up", "no file"],
)  # fmt: skip
def test_a_mistake_has_its_exit_code(tmp_path: Path, command: list[str], code: int, words: str):
    result = run(tmp_path, *command)
    assert result.returncode == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(("script", "unbuffered"), [(PARAMS, "1"), (LENGTH, "")])
def test_head_does_not_show_a_traceback(tmp_path: Path, script: str, unbuffered: str):
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"'{sys.executable}' '{script}' --model.max_length 64 | head -1"],
        cwd=tmp_path, env=os.environ | {"PYTHONUNBUFFERED": unbuffered}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.stderr == ""
    assert result.returncode in (0, 141)  # 141: it met the closed pipe before it was done
    assert len(result.stdout.splitlines()) == 1


def test_every_script_answers_help_at_once_and_without_torch(tmp_path: Path):
    for script in (PARAMS, LENGTH):
        result = run(tmp_path, "-X", "importtime", script, "--help")
        assert result.returncode == 0
        assert "--model.d_model" in result.stdout
        assert "--restart_data and --init_from do nothing here" in " ".join(result.stdout.split())
        assert not re.search(r"\| +torch$", result.stderr, re.MULTILINE)


@pytest.fixture(scope="module")
def without_peers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python (-S) that has all packages of this one but transformers."""
    folder = tmp_path_factory.mktemp("packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith("transformers"):
            (folder / path.name).symlink_to(path)
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("script", ["decode", "train_speed", "time_to_loss", "interop nowhere", "evals"])
def test_a_benchmark_without_its_peer_says_at_once_what_to_install(
    script: str, without_peers: dict[str, str], tmp_path: Path
):
    name, *options = script.split()
    result = run(tmp_path, "-S", str(REPO / f"bench/{name}.py"), *options, **without_peers)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: a package is missing that this compares with: pip install ")
    assert result.stderr.count("\n") == 1
    (pinned,) = re.findall(r"^transformers==[\d.]+", (REPO / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert pinned in result.stderr


def test_a_benchmark_publishes_the_figures_of_its_default_settings_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    file = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "1"])
    assert not publish(parser, str(file), {"figure": 1})
    assert capsys.readouterr().out == f"results/{file} is left as it was: it has the figures of the default settings\n"
    assert not file.exists()
    monkeypatch.setattr(sys, "argv", ["bench.py", "--rounds", "5"])
    assert publish(parser, str(file), {"figure": 1})
    assert file.exists()


def test_the_ladder_keeps_your_own_shape_at_your_own_width():
    yours = GPTConfig(d_model=512, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=100)
    assert calc_params.ladder(yours, 512) == yours
    for width in (256, 1024, 2048):
        row = calc_params.ladder(yours, width).resolved(50257)
        row.validate()
        assert (row.d_model, row.n_layers, row.n_heads, row.head_dim) == (width, width // 64, width // 64, 64)
