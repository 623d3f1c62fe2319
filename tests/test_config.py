"""Settings: mistakes are refused in one line with a remedy, defaults are the mission's, no field is dead; and the
shape of the code: who imports whom, and that importing does nothing."""

from __future__ import annotations

import ast
import dataclasses
import io
import json
import math
import os
import random
import re
import subprocess
import sys
import time
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import config as config_module
from config import (
    DATASETS,
    OTHER_NAMES,
    PRESETS,
    Config,
    DataConfig,
    Dataset,
    EvalConfig,
    GenerationConfig,
    GPTConfig,
    TrainingConfig,
    load_config,
    parse_arguments,
)
from errors import ConfigError, exit_code_of
from hub import DataError

REPO = Path(__file__).resolve().parent.parent
GROUPS = {"data": DataConfig, "model": GPTConfig, "train": TrainingConfig, "generation": GenerationConfig,
          "eval": EvalConfig}  # fmt: skip
NAN, INF = math.nan, math.inf


def config_with(settings: dict[str, Any]) -> Config:
    """The defaults, changed by dotted names."""
    values = Config().to_dict()
    for name, value in settings.items():
        *groups, field = name.split(".")
        (values[groups[0]] if groups else values)[field] = value
    return Config.from_dict(values)


def refusal(settings: dict[str, Any], world_size: int = 1) -> str:
    """The one line that refuses these settings."""
    with pytest.raises(ConfigError) as caught:
        config_with(settings).validate(world_size)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert "\n" not in message
    return message


def number_after(words: str, message: str) -> int:
    match = re.search(re.escape(words) + r" (\d+)", message)
    assert match, message
    return int(match[1])


def run(*command: str, cwd: Path = REPO) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=60)


# ---- what is refused -----------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str, str]] = [  # settings, words that name the field, words that say what to do
    ({"data.dataset_probabilities": [1.0]}, "data.dataset_probabilities (1.0)", "one probability for each"),
    ({"data.dataset_probabilities": [0.6, 0.3]}, "data.dataset_probabilities sum to 0.9", "must sum to 1"),
    ({"data.dataset_probabilities": [0.6, 0.6]}, "data.dataset_probabilities sum to 1.2", "must sum to 1"),
    ({"data.dataset_probabilities": [NAN, 0.4]}, "data.dataset_probabilities has nan", "above 0 and at most 1"),
    ({"data.dataset_probabilities": [INF, 0.4]}, "data.dataset_probabilities has inf", "above 0 and at most 1"),
    ({"data.dataset_probabilities": [1.5, -0.5]}, "data.dataset_probabilities has 1.5", "above 0 and at most 1"),
    ({"data.dataset_probabilities": [1.0, 0.0]}, "data.dataset_probabilities has 0.0", "above 0 and at most 1"),
    ({"data.current_datasets": ["FINEWB", "C4"]}, "data.current_datasets has no dataset 'FINEWB'", "mean FINEWEB?"),
    ({"data.current_datasets": ["FINEWEB", "c4"]}, "data.current_datasets has no dataset 'c4'", "did you mean C4?"),
    ({"data.current_datasets": ["ZZZ"]}, "data.current_datasets has no dataset 'ZZZ'", "choose from FINEWEB, FINEW"),
    ({"data.current_datasets": []}, "data.current_datasets is empty", "name at least one"),
    ({"data.current_datasets": ["C4", "C4"]}, "data.current_datasets names one dataset twice", "C4 C4"),
    ({"data.current_datasets": ["LOCAL", "C4"]}, "data.local_files", "needs data.local_files, or data.shards_dir"),
    ({"data.local_files": ["a.txt"]}, "data.local_files", "name LOCAL there, or leave the files out"),
    ({"data.max_samples": -1}, "data.max_samples is -1", "use 0 for all, or a positive number"),
    ({"data.val_fraction": 0.0}, "data.val_fraction is 0.0", "such as 0.005"),
    ({"data.val_fraction": 0.5}, "data.val_fraction is 0.5", "such as 0.005"),
    ({"data.val_fraction": NAN}, "data.val_fraction is nan", "such as 0.005"),
    ({"data.val_tokens": 0}, "data.val_tokens is 0", "use a positive number"),
    ({"data.n_streams": 0}, "data.n_streams is 0", "use a positive number"),
    ({"data.tokenizer": "bpe", "data.bpe_vocab_size": 256}, "data.bpe_vocab_size is 256", "use 257"),
    ({"data.tokenizer": "bpe", "data.bpe_vocab_size": 262145}, "data.bpe_vocab_size is 262145", "to 262144"),
    ({"model.d_model": 260}, "model.d_model 260 does not divide by model.n_heads 8", "try d_model 256"),
    ({"model.d_model": 4}, "model.d_model 4 does not divide by model.n_heads 8", "try d_model 16"),
    ({"model.d_model": 56}, "model.head_dim is 7", "an even number"),
    ({"model.head_dim": 7}, "model.head_dim is 7", "an even number"),
    ({"model.n_kv_heads": 3}, "model.n_kv_heads 3", "model.n_heads 8 must divide by"),
    ({"model.n_kv_heads": -1}, "model.n_kv_heads is -1", "use 0 (automatic) or more"),
    ({"model.n_layers": 0}, "model.n_layers is 0", "use a positive number"),
    ({"model.max_length": -5}, "model.max_length is -5", "use a positive number"),
    ({"model.rope_base": INF}, "model.rope_base is inf", "use a positive number"),
    ({"model.norm_eps": NAN}, "model.norm_eps is nan", "use a positive number"),
    ({"model.vocab_size": 50256}, "model.vocab_size 50256", "use 0 (automatic) or at least 50257"),
    ({"train.lr": NAN}, "train.lr is nan", "use a positive number"),
    ({"train.lr": INF}, "train.lr is inf", "use a positive number"),
    ({"train.lr": 0.0}, "train.lr is 0.0", "use a positive number"),
    ({"train.lr": -1e-3}, "train.lr is -0.001", "use a positive number"),
    ({"train.embedding_lr": NAN}, "train.embedding_lr is nan", "use a positive number"),
    ({"train.head_lr": 0.0}, "train.head_lr is 0.0", "use a positive number"),
    ({"train.optimizer": "adamw"}, "train.lr 0.02 is a rate for Muon", "try 6e-4 for a large model, 4e-3 for a small"),
    ({"train.batch_size": 0}, "train.batch_size is 0", "use a positive number"),
    ({"train.gradient_accumulation_steps": 0}, "train.gradient_accumulation_steps is 0", "use a positive number"),
    ({"train.epochs": 0}, "train.epochs is 0", "use a positive number"),
    ({"train.max_steps": -1}, "train.max_steps is -1", "use 0 or a positive number"),
    ({"train.weight_decay": NAN}, "train.weight_decay is nan", "use 0 or a positive number"),
    ({"train.max_grad_norm": NAN}, "train.max_grad_norm is nan", "use 0 or a positive number"),
    ({"train.save_minutes": INF}, "train.save_minutes is inf", "use 0 or a positive number"),
    ({"train.cooldown_fraction": 1.01}, "train.cooldown_fraction is 1.01", "use a share between 0 and 1"),
    ({"train.cooldown_fraction": NAN}, "train.cooldown_fraction is nan", "use a share between 0 and 1"),
    ({"train.final_lr_fraction": -0.1}, "train.final_lr_fraction is -0.1", "use a share between 0 and 1"),
    ({"train.keep_checkpoints": 0}, "train.keep_checkpoints is 0", "use a positive number"),
    ({"train.run_name": "runs/one"}, "train.run_name is 'runs/one'", "use letters, digits, '.', '_' and '-'"),
    ({"train.run_name": ".."}, "train.run_name is '..'", "use letters, digits, '.', '_' and '-'"),
    ({"train.run_name": "-x"}, "train.run_name is '-x'", "use letters, digits, '.', '_' and '-'"),
    ({"train.run_name": ""}, "train.run_name is ''", "use letters, digits, '.', '_' and '-'"),
    ({"train.run_name": "my run"}, "train.run_name is 'my run'", "use letters, digits, '.', '_' and '-'"),
    ({"train.run_name": "lauf\n"}, "train.run_name is 'lauf\\n'", "use letters, digits, '.', '_' and '-'"),
    ({"generation.temperature": -0.1}, "temperature is -0.1", "use 0 (greedy) or a positive number such as 0.8"),
    ({"generation.temperature": NAN}, "temperature is nan", "use 0 (greedy) or a positive number such as 0.8"),
    ({"generation.top_k": -1}, "top_k is -1", "use 0 (off) or a positive number"),
    ({"generation.top_p": 0.0}, "top_p is 0.0", "use a number above 0 and at most 1 (off)"),
    ({"generation.top_p": NAN}, "top_p is nan", "use a number above 0 and at most 1 (off)"),
    ({"generation.top_p": 1e-300}, "top_p is 1e-300, too near to 0", "use at least 1e-30"),
    ({"generation.repetition_penalty": 1e-308}, "repetition_penalty is 1e-308, too near to 0", "use at least 1e-30"),
    ({"generation.min_p": 1.0}, "min_p is 1.0", "use a number from 0 (off) to under 1"),
    ({"generation.repetition_penalty": 0.0}, "repetition_penalty is 0.0", "use a positive number"),
    ({"generation.num_samples": 0}, "num_samples is 0", "use a positive number"),
    ({"eval.batch_size": 0}, "eval.batch_size is 0", "use a positive number"),
    ({"eval.sample_tokens": 0}, "eval.sample_tokens is 0", "use a positive number"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "field", "remedy"), REFUSED, ids=lambda value: str(value)[:60])
def test_an_impossible_setting_is_refused_with_its_name_and_a_remedy(settings: dict[str, Any], field: str, remedy: str):
    message = refusal(settings)
    assert field in message
    assert remedy in message


def test_the_width_suggested_for_the_heads_works():
    config_with({"model.d_model": number_after("try d_model", refusal({"model.d_model": 260}))}).validate()


def test_the_accumulation_suggested_for_a_batch_works():
    chance, refused = random.Random(0), 0
    for _ in range(300):
        world_size = chance.choice([1, 2, 4, 8])
        settings = {
            "data.n_streams": world_size * chance.randint(1, 12),
            "train.batch_size": chance.randint(1, 40),
            "train.gradient_accumulation_steps": chance.randint(1, 9),
        }
        try:
            config_with(settings).validate(world_size)
        except ConfigError:
            message = refusal(settings, world_size)
            assert f"which must divide by data.n_streams {settings['data.n_streams']}" in message
            suggested = number_after("try train.gradient_accumulation_steps", message)
            config_with(settings | {"train.gradient_accumulation_steps": suggested}).validate(world_size)
            for smaller in range(1, suggested):
                refusal(settings | {"train.gradient_accumulation_steps": smaller}, world_size)
            refused += 1
    assert 50 < refused < 250


def test_a_world_size_that_does_not_divide_the_streams_is_refused_with_both_remedies():
    message = refusal({}, world_size=6)
    assert "data.n_streams 16 must divide by the number of processes, 6" in message
    assert "use 1, 2, 4, 8 or 16 processes" in message
    config_with({}).validate(8)
    settings = {"data.n_streams": number_after("or data.n_streams", message), "train.gradient_accumulation_steps": 3}
    assert config_with(settings).validate(6).data.n_streams == 18


def test_a_resumed_run_checks_its_layout_only_when_its_rows_per_step_are_known():
    c = config_with({"resume": True, "train.batch_size": 3}).validate()
    with pytest.raises(ConfigError, match="a step has 12 rows"):
        c.check_layout(1)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_rate_is_for_its_batch_on_one_device_and_grows_with_larger_ones_by_the_fourth_root(preset: str):
    c = load_config(["--preset", preset], "", Config)
    rows, lr = c.rows_per_step(), PRESETS[preset].train.lr
    assert c.with_batch_size(c.train.batch_size, rows).train.lr == lr
    larger = c.with_batch_size(c.train.batch_size, 16 * rows, world_size=16)
    assert larger.train.lr == 2 * lr
    assert larger.with_batch_size(1, 16 * rows, 4).train.lr == 2 * lr  # of one step of so many, however it is divided
    for length, expected in ((c.model.max_length // 2, lr), (2 * c.model.max_length, pytest.approx(lr * 2**0.25))):
        other = load_config(["--preset", preset, "--model.max_length", str(length)], "", Config)
        assert other.with_batch_size(c.train.batch_size, rows).train.lr == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--train.lr", "0.03"],
        ["--train.lr=0.03"],
        ["--train.lr_tokens_per_step", "0", "--preset", "demo"],
        ["--train.lr", "0.003", "--train.optimizer", "adamw", "--train.lr_tokens_per_step", "4096"],  # muon only
    ],
)
def test_a_rate_of_ones_own_is_taken_as_it_is(arguments: list[str]):
    c = load_config(arguments, "", Config)
    for rows in (1, 128, 4096):
        assert c.with_batch_size(1, rows).train.lr == c.train.lr in (0.03, 0.003)


def test_a_rate_of_ones_own_may_be_given_with_its_batch():
    c = load_config(["--train.lr_tokens_per_step", "8192", "--train.lr", "0.03"], "", Config)
    assert c.with_batch_size(1, 128).train.lr == 2 * 0.03


def test_the_world_size_of_a_launcher_counts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="number of processes, 3"):
        load_config([], "", Config)


@pytest.mark.parametrize("total_steps", [2, 3, 19, 20, 21, 1000])
def test_a_warm_up_beyond_the_run_is_refused_with_one_that_works(total_steps: int):
    settings = {"train.max_steps": total_steps, "train.warmup_tokens": 10**12}
    message = refusal(settings)
    assert f"train.warmup_tokens {10**12} is 7629395 steps, and the whole run has {total_steps};" in message
    settings["train.warmup_tokens"] = number_after("try --train.warmup_tokens", message)
    config_with(settings).validate()


def test_a_warm_up_that_just_fits_is_accepted():
    tokens_per_step = Config().tokens_per_step()
    config_with({"train.max_steps": 10, "train.warmup_tokens": 9 * tokens_per_step}).validate()
    refusal({"train.max_steps": 10, "train.warmup_tokens": 9 * tokens_per_step + 1})


@pytest.mark.parametrize("value", ["0", "00", "-1", "x", "²", ""])
def test_an_impossible_world_size_is_refused(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is .* in the environment; unset it"):
        load_config([], "", Config)


def test_a_run_that_goes_on_keeps_its_rows_so_its_warm_up_is_not_judged_by_fewer_devices():
    options = ["--preset", "gpt2", "--train.max_steps", "300"]  # on 8 devices: 39 steps of warm-up, on one 306
    with pytest.raises(ConfigError, match="306 steps, and the whole run has 300"):
        load_config(options, "", Config)
    load_config([*options, "--resume"], "", Config)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--max_iters", "10"], "there is no --max_iters; here it is --train.max_steps"),
        (["--train.learning-rate=1e-3"], "there is no --train.learning-rate; here it is --train.lr"),
        (["--model.n_embd", "384"], "here it is --model.d_model"),
        (["--presets", "demo"], "here it is --preset"),
        (["--model.dropout", "0.1"], "here it is left out; see --train.weight_decay"),
        (["--out_dir=foo"], "there is no --out_dir; here it is --train.out_dir"),
        (["--seed", "1"], "here it is --data.seed or --train.seed or --generation.seed"),
        (["--no-compile"], "there is no --no-compile; here it is --train.no_compile"),
        (["--train.compile", "False"], "without a value: --train.compile is on, --train.no_compile off"),
        (["--preset", "demo", "--train.fsdp=true"], "--train.fsdp is a switch, without a value"),
        (["--resume", "true"], "--resume is a switch, without a value: --resume is on, --no_resume off"),
        (["config/train_shakespeare_char.py", "--train.lr", "1e-3"], "config/train_shakespeare_char.py is no option"),
    ],
)
def test_who_comes_from_another_trainer_is_told_our_name_of_a_setting(options: list[str], told: str):
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_config(options, "", Config)


def test_a_text_may_be_a_word_that_is_no_value_of_a_switch():
    assert load_config(["--train.run_name", "false"], "", Config).train.run_name == "false"
    prompts = ["resume", "true", "train.fsdp=true"]
    assert load_config(["--eval.prompts", *prompts], "", Config).eval.prompts == (*prompts,)


def test_names_of_other_trainers_are_none_of_ours_and_lead_to_ours():
    ours = {f"--{name}" for name, _, _ in fields()} | {"--preset"}
    assert not OTHER_NAMES.keys() & {name.rpartition(".")[2] for name in ours}
    assert {there.split()[0] for there in OTHER_NAMES.values() if there.startswith("--")} <= ours


def test_a_preset_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"there is no preset 'demmo'; did you mean demo\?"):
        load_config(["--preset", "demmo"], "", Config)
    with pytest.raises(ConfigError, match="--preset needs a name: fineweb, demo"):
        load_config(["--preset"], "", Config)


# ---- exit codes ------------------------------------------------------------------------------


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(tmp_path: Path):
    result = run(str(REPO / "train.py"), "--train.lr", "nan", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: train.lr is nan; use a positive number\n"
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_typo_gets_a_suggestion_and_exit_code_2(tmp_path: Path):
    result = run(str(REPO / "train.py"), "--train.warmup_tokns", "5", cwd=tmp_path)
    assert result.returncode == 2
    assert "--train.warmup_tokns" in result.stderr
    assert re.search(r"Perhaps you meant:\W+--train\.warmup_tokens", result.stderr)
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argument", ["--model.d_model=abc", "--train.optimizer=sgd", "--data.max_samples=1.5"])
def test_a_value_of_the_wrong_type_has_exit_code_2_and_names_its_field(
    argument: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        load_config([argument], "", Config)
    assert caught.value.code == 2
    assert argument.split("=")[0] in capsys.readouterr().err


def test_each_process_of_many_says_who_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def main() -> int:
        raise DataError("wrong")

    for rank, shown in (("0", "error: wrong\n"), ("1", "error (process 1): wrong\n")):
        monkeypatch.setenv("RANK", rank)
        assert exit_code_of(main) == 3
        assert capsys.readouterr().err == shown


def test_settings_that_are_wrong_in_all_processes_are_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def main() -> int:
        raise ConfigError("wrong")

    monkeypatch.setenv("RANK", "1")
    assert exit_code_of(main) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (OSError(28, "No space left on device", "run/metrics.jsonl"), 6, "run/metrics.jsonl: No space left"),
        (PermissionError(13, "Permission denied", "out.json"), 6, "out.json: Permission denied"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "smaller batch_size"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("CUDA error: out of memory\nCompile with ..."), 2, "smaller batch_size"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 2, "context or"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), 2, "smaller batch_size"),
    ],
)
def test_a_full_disk_and_a_full_memory_are_one_line(
    error: Exception, code: int, says: str, capsys: pytest.CaptureFixture[str]
):
    def main() -> int:
        raise error

    assert exit_code_of(main) == code
    shown = capsys.readouterr().err
    assert says in shown
    assert shown.count("\n") == 1


def test_ctrl_c_is_one_word_and_exit_code_130(capsys: pytest.CaptureFixture[str]):
    def main() -> int:
        raise KeyboardInterrupt

    assert exit_code_of(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_exit_code_of_success_is_0_and_a_scripts_own_is_kept():
    assert exit_code_of(lambda: None) == exit_code_of(lambda: 0) == 0
    assert exit_code_of(lambda: 75) == 75


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_code_of(lambda: 1 // 0)


# ---- the defaults ----------------------------------------------------------------------------


def test_the_defaults_are_the_missions():
    c = load_config([], "", Config)
    assert c.data.current_datasets == ("FINEWEB", "C4")
    assert c.data.dataset_probabilities == (0.6, 0.4)
    assert c.data.max_samples == 10_000_000
    assert c.model.d_model == 256
    assert c.model.n_layers == 16
    assert c.model.n_heads == 8
    assert c.model.max_length == 1024
    assert c.train.batch_size == 32
    assert c.train.gradient_accumulation_steps == 4
    assert c.train.epochs == 3


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name: str, world_size: int):
    assert PRESETS[name].validate(world_size) is PRESETS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_where_the_command_line_starts_from(name: str):
    before = PRESETS[name].to_dict()
    loaded = load_config(["--train.log_every", "7", "--preset", name], "", Config)
    assert loaded == dataclasses.replace(PRESETS[name], train=dataclasses.replace(PRESETS[name].train, log_every=7))
    assert load_config([f"--preset={name}"], "", Config) == PRESETS[name]
    loaded.model.d_model = 1
    assert PRESETS[name].to_dict() == before


def test_automatic_fields_are_resolved():
    c = GPTConfig().resolved(50257)
    assert (c.vocab_size, c.head_dim, c.n_kv_heads, c.d_ff) == (50304, 32, 8, 704)
    assert GPTConfig(mlp="relu2").resolved(256).d_ff == 1024
    given = GPTConfig(vocab_size=300, head_dim=16, n_kv_heads=2, d_ff=100)
    assert given.resolved(300) == given


# ---- JSON ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_json(name: str):
    assert Config.from_dict(json.loads(json.dumps(PRESETS[name].to_dict()))) == PRESETS[name]


def test_settings_that_an_older_file_lacks_are_the_defaults():
    assert Config.from_dict({"train": {"epochs": 1}}) == config_with({"train.epochs": 1})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"learning_rate": 1}}, "unknown setting train.learning_rate; choose from run_name,"),
        ({"train": {"epoch": 1}}, "unknown setting train.epoch; did you mean epochs?"),
        ({"modle": {}}, "unknown setting modle; did you mean model?"),
        ({"train": {"lr": "fast"}}, "train.lr is 'fast'; expected float"),
        ({"train": {"lr": None}}, "train.lr is None; expected float"),
        ({"train": {"epochs": 2.5}}, "train.epochs is 2.5; expected int"),
        ({"train": {"epochs": True}}, "train.epochs is True; expected int"),
        ({"train": {"compile": 1}}, "train.compile is 1; expected bool"),
        ({"train": {"optimizer": "sgd"}}, "train.optimizer is 'sgd'; expected 'muon' or 'adamw'"),
        ({"data": {"current_datasets": ["C4", 4]}}, "data.current_datasets[1] is 4; expected str"),
        ({"data": {"current_datasets": "C4"}}, "data.current_datasets is 'C4'; expected tuple"),
        ({"model": 3}, "model"),
        ([], "the configuration must be an object"),
    ],
    ids=str,
)
def test_json_of_another_shape_is_refused_by_name(values: Any, words: str):
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(values)
    assert words in str(caught.value)


def test_a_whole_number_in_json_may_stand_for_a_float():
    value = Config.from_dict({"train": {"lr": 1}}).train.lr
    assert (value, type(value)) == (1.0, float)


# ---- the command line ------------------------------------------------------------------------


def fields() -> Iterator[tuple[str, type, dataclasses.Field[Any]]]:
    """(dotted name, its class, the field) of every setting."""
    for group, cls in GROUPS.items():
        yield from ((f"{group}.{field.name}", cls, field) for field in dataclasses.fields(cls))
    yield "resume", Config, next(f for f in dataclasses.fields(Config) if f.name == "resume")


def comments_of_fields() -> dict[tuple[str, str], str]:
    """(class, field) -> the comment behind it in config.py."""
    source = (REPO / "config.py").read_text()
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        (cls.name, node.target.id): by_line.get(node.end_lineno or 0, "")
        for cls in ast.parse(source).body
        if isinstance(cls, ast.ClassDef)
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def other_value(name: str, field: dataclasses.Field[Any], kind: Any) -> Any:
    """A value that is not the field's default; it need not make sense."""
    choices = [choice for choice in typing.get_args(kind) if choice != field.default]
    if typing.get_origin(kind) is typing.Literal:
        return choices[-1]
    if typing.get_origin(kind) is tuple:
        return (0.5, 0.25, 0.25) if choices[0] is float else ("one", "two words", name)
    return not field.default if kind is bool else {int: 12345, float: 0.125, str: f"a {name}"}[kind]


def test_every_field_can_be_set_by_its_dotted_name():
    arguments, expected = [], {}
    for name, cls, field in fields():
        value = expected[name] = other_value(name, field, typing.get_type_hints(cls)[field.name])
        if value is False:  # a flag that is on by default
            arguments.append("--" + ".no_".join(name.rsplit(".", 1)))
        elif value is True:
            arguments.append(f"--{name}")
        else:
            arguments += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    config = parse_arguments(Config, arguments)
    for name, value in expected.items():
        found: Any = config
        for part in name.split("."):
            found = getattr(found, part)
        assert (name, found) == (name, value)


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"], "About this script.", Config)
    assert caught.value.code == 0
    shown = " ".join(re.sub(r"[│╭╰─╮╯]", " ", capsys.readouterr().out).split())
    assert "About this script." in shown
    assert all(preset in shown for preset in PRESETS)
    comments = comments_of_fields()
    for name, cls, field in fields():
        comment = comments[cls.__name__, field.name]
        assert len(comment) >= 10, f"{name} has no comment"
        option = re.escape("--" + name)
        assert re.search(rf"{option}(, --\S+)? [^-]*?{re.escape(' '.join(comment.split()))}", shown), name


def test_help_answers_at_once_and_without_torch():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert run("train.py", "--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0  # 0.25 on an idle machine
    imported = set(re.findall(r"\| +([\w.]+)$", run("-X", "importtime", "train.py", "--help").stderr, re.MULTILINE))
    assert {"config", "tyro"} <= imported
    assert not {"torch", "numpy", "accelerate", "tiktoken"} & imported


# ---- no dead flags -----------------------------------------------------------------------------

SETTINGS: dict[str, type] = {
    cls.__name__: cls for cls in (Config, DataConfig, GPTConfig, TrainingConfig, GenerationConfig, EvalConfig, Dataset)
}


def product_files() -> list[Path]:
    return sorted([*REPO.glob("*.py"), *REPO.glob("scripts/*.py")])


class FieldReads(ast.NodeVisitor):
    """Collects (class, field) of the settings that a module reads.

    What is of which class follows from annotations, calls that build a configuration, and plain assignments; so
    `torch.compile` is no reading of train.compile. Reading a field into self.x in one method counts in the others.
    """

    def __init__(self) -> None:
        self.found: set[tuple[str, str]] = set()
        self._known: dict[str, str] = {}  # expression -> class
        self._alias = {name: name for name in SETTINGS}  # classes of the module that extend one of the settings

    def class_of(self, node: ast.expr | None) -> str | None:
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) in self._known:
            return self._known[ast.unparse(node)]
        if isinstance(node, ast.Attribute):
            hint = typing.get_type_hints(SETTINGS[owner]).get(node.attr) if (owner := self.class_of(node.value)) else 0
            return getattr(hint, "__name__", None) if hint in SETTINGS.values() else None
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "DATASETS":
            return "Dataset"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("dataclasses.replace", "copy.copy", "parse_arguments") and node.args:
                return self.class_of(node.args[0]) or self._alias.get(ast.unparse(node.args[0]))
            if called in ("load_config", "DATASETS.get"):
                return "Config" if called == "load_config" else "Dataset"
            return self._alias.get(called)
        return None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            if ast.unparse(base) in self._alias:
                self._alias[node.name] = self._alias[ast.unparse(base)]
        outer = dict(self._known)
        for _ in range(2):  # self.config may be set in a method below the one that reads it
            self.generic_visit(node)
        self._known = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = dict(self._known)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            self._known.pop(argument.arg, None)
            kind = self._alias.get(ast.unparse(argument.annotation).strip("'\"") if argument.annotation else "")
            if kind:
                self._known[argument.arg] = kind
        self.generic_visit(node)
        self._known = outer | {name: kind for name, kind in self._known.items() if name.startswith("self.")}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if kind := self.class_of(value):
                    self._known[ast.unparse(name)] = kind

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        owner = self.class_of(node.value)
        if owner and isinstance(node.ctx, ast.Load):
            self.found.add((owner, node.attr))


def fields_read(source: str) -> set[tuple[str, str]]:
    reads = FieldReads()
    reads.visit(ast.parse(source))
    return reads.found


def test_every_field_is_read_by_the_product():
    read = set().union(*(fields_read(path.read_text()) for path in product_files() if path.name != "config.py"))
    dead = [name for name, cls, field in fields() if (cls.__name__, field.name) not in read]
    dead += [f"Dataset.{field.name}" for field in dataclasses.fields(Dataset) if ("Dataset", field.name) not in read]
    assert dead == []


def test_the_search_for_dead_fields_is_not_fooled_by_other_things_of_that_name():
    source = """
class Run:
    def go(self):
        return self.settings.seed
    def __init__(self, model: GPT, c: Config, train: TrainingConfig = None):
        self.settings, n = c.data, train.batch_size
def f(config: GenerationConfig, data: DatasetPrep):
    torch.compile(model.mlp, data.tokenizer, config.validate)
    def g():
        return replaced.seed
    replaced = dataclasses.replace(config, top_k=3)
    config.top_p = 1
"""
    read = {(owner, name) for owner, name in fields_read(source) if name not in ("data", "validate")}
    assert read == {("DataConfig", "seed"), ("TrainingConfig", "batch_size")}


# ---- the shape of the code ---------------------------------------------------------------------

MAY_IMPORT = {  # of our own modules; those that are not listed here may import any of these
    "errors": set[str](),
    "files": {"errors"},
    "config": {"errors"},
    "tokenizer": {"errors", "files"},
    "hub": {"errors"},
    "sources": {"config", "hub"},
    "documents": {"config", "hub", "sources"},
    "shards": {"config", "documents", "files", "hub", "sources", "tokenizer"},
    "prepare_data": {"config", "documents", "errors", "files", "hub", "shards", "sources", "tokenizer"},
    "model": {"config"},
    "optim": {"config", "hardware", "model"},
    "metrics": {"errors", "files"},
    "hardware": {"errors"},
    "memory": {"config", "errors", "hardware", "model", "optim"},
    "interop": {"config", "errors", "tokenizer"},
    "checkpoint": {"config", "errors", "files", "hardware", "interop", "model", "tokenizer"},
    "decoding": {"errors", "files", "hardware", "model"},
    "sampling": {"config", "decoding", "errors", "model", "tokenizer"},
    "pages": {"files"},
    "explain": {"model", "sampling", "tokenizer"},
    "runtime": {"checkpoint", "config", "errors", "files", "hardware", "metrics", "model", "prepare_data"},
    "plan": {
        "checkpoint",
        "config",
        "errors",
        "files",
        "hardware",
        "memory",
        "metrics",
        "model",
        "prepare_data",
        "runtime",
        "tokenizer",
    },
    "tasks": {"hub"},
    "scoring": {"checkpoint", "errors", "hub", "metrics", "model", "sampling", "tasks", "tokenizer"},
}
WITHOUT_TORCH = [
    "errors", "files", "config", "tokenizer", "hub", "sources", "documents", "shards", "prepare_data", "tasks",
]  # fmt: skip


def imports_of(node: ast.AST) -> set[str]:
    """The modules imported anywhere in a piece of code, functions included."""
    found = set[str]()
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            found |= {alias.name for alias in each.names}
        elif isinstance(each, ast.ImportFrom):
            assert each.module
            assert each.level == 0, "relative import"
            found.add(each.module)
    return {name.partition(".")[0] for name in found}


def test_imports_form_the_documented_order():
    own = {path.stem for path in product_files()}
    assert own >= set(MAY_IMPORT)
    for path in product_files():
        imported = imports_of(ast.parse(path.read_text())) & own
        assert imported <= MAY_IMPORT.get(path.stem, set(MAY_IMPORT)), path.name


def test_config_imports_only_the_standard_library_and_tyro_when_it_parses():
    tree = ast.parse((REPO / "config.py").read_text())
    assert imports_of(tree) - set(sys.stdlib_module_names) == {"tyro", "errors"}
    assert imports_of(ast.parse((REPO / "errors.py").read_text())) <= set(sys.stdlib_module_names)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if "tyro" in imports_of(f)] == ["parse_arguments"]
    assert all("tyro" not in imports_of(node) for node in tree.body if node not in functions)


def test_the_model_is_torch_and_nothing_else():
    tree = ast.parse((REPO / "model.py").read_text())
    assert imports_of(tree) - set(sys.stdlib_module_names) == {"torch", "config"}


IMPORT_ALL = """
import importlib, os, sys, threading

sys.path[:0] = [{repo!r}, {repo!r} + "/scripts"]
before = dict(os.environ)
for name in {light!r}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name + " imports torch"
for name in {names!r}:
    importlib.import_module(name)
    assert threading.active_count() == 1, name + " starts a thread"
    assert dict(os.environ) == before, name + " changes the environment"
"""


def test_importing_does_nothing(tmp_path: Path):
    names = [path.stem for path in product_files()]
    home = tmp_path / "home"
    home.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL.format(repo=str(REPO), light=WITHOUT_TORCH, names=names)],
        cwd=tmp_path, env=os.environ | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)
    assert sorted(tmp_path.rglob("*")) == [home]


def test_every_dataset_says_what_its_kind_needs():
    for name, dataset in DATASETS.items():
        assert (dataset.location != "") == (dataset.kind != "local"), name
        assert (dataset.name is not None) == (dataset.kind == "hub"), name
        assert (dataset.documents > 0) == (dataset.tokens_per_document > 0) == (dataset.kind == "hub"), name


def test_a_class_of_settings_is_a_group_of_the_configuration():
    classes = {cls for cls in vars(config_module).values() if dataclasses.is_dataclass(cls)}
    assert classes == {*GROUPS.values(), Config, Dataset}


@pytest.mark.parametrize("value", ["abc", "0", "-1"])
def test_a_world_size_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        load_config([], "", Config)


@pytest.mark.parametrize("settings", [{"train.seed": -1}, {"generation.seed": 2**32}, {"eval.prompts": ()}])
def test_seeds_and_prompts_are_checked_before_the_run(settings: dict[str, Any]):
    with pytest.raises(ConfigError):
        config_with(settings).validate()


def test_the_warm_up_that_is_suggested_is_accepted():
    for max_steps in (1, 5, 30, 1000):
        settings = {"train.max_steps": max_steps, "train.warmup_tokens": 10**12}
        suggested = number_after("try --train.warmup_tokens", refusal(settings))
        config_with(settings | {"train.warmup_tokens": suggested}).validate()
