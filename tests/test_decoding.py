"""One more token at a time gives what the whole text gives at once."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import decoding
from config import GenerationConfig
from decoding import CompiledStep, Decode, DecodeStep, decode_step
from errors import ConfigError
from model import GPT, KVCache
from sampling import generate_ids

Build = Callable[..., GPT]
ROOT = Path(__file__).resolve().parent.parent
SHAPES = [
    {}, {"mlp": "relu2"}, {"n_kv_heads": 1}, {"tie_embeddings": True}, {"head_dim": 24}, {"norm_eps": 0.1},
    {"qk_norm": False, "n_kv_heads": 2}, {"d_model": 44, "n_heads": 1, "n_kv_heads": 1, "d_ff": 37, "vocab_size": 129},
    {"d_ff": 1025, "n_layers": 1},
]  # fmt: skip

FORMATS = [
    (torch.float32, False),
    (torch.bfloat16, False),
    (torch.float32, True),
    (torch.bfloat16, True),
]  # dtype, int8


def trained(model: GPT) -> GPT:
    """With no weight where it begins, so that each of them has a say."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1 if p.dim() == 1 else 0))
    return model.eval()


def steps_from(decode: Decode, model: GPT, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """The logits (B, T - prompt, V) of one token after another behind a prompt."""
    cache = KVCache(model.config, len(ids), ids.size(1), model.device, model.embedding.weight.dtype)
    if prompt:
        model(ids[:, :prompt], cache=cache)
    return torch.stack([decode(ids[:, t], cache) for t in range(prompt, ids.size(1))], dim=1)


@pytest.mark.parametrize("kind", [CompiledStep, DecodeStep])
@pytest.mark.parametrize("fields", SHAPES, ids=repr)
@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_token_by_token_the_logits_are_those_of_the_whole_text(
    tiny_model: Build, fields: dict[str, Any], rows: int, kind: Any
) -> None:
    model = trained(tiny_model(**fields))
    ids = torch.randint(0, model.config.vocab_size, (rows, model.config.max_length))
    decode = kind(model)
    torch.testing.assert_close(steps_from(decode, model, ids, 5), model(ids)[:, 5:], rtol=1e-4, atol=1e-4)
    cache = KVCache(model.config, rows, model.config.max_length, model.device, torch.float32)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="33 tokens exceed the model's context of 32"):
        decode(ids[:, 0], cache)


@pytest.mark.parametrize("fields", SHAPES, ids=repr)
@torch.inference_mode()
def test_in_bf16_the_compiled_step_is_nearer_to_fp32_than_torch(tiny_model: Build, fields: dict[str, Any]) -> None:
    model = trained(tiny_model(**fields)).bfloat16()
    ids = torch.randint(0, model.config.vocab_size, (2, 30))
    compiled, in_torch = (steps_from(kind(model), model, ids, 5).float() for kind in (CompiledStep, DecodeStep))
    exact = model.float()(ids)[:, 5:]  # the same weights, all else in fp32
    errors = [(logits - exact).square().mean() / exact.square().mean() for logits in (compiled, in_torch)]
    assert errors[0] < 0.001
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.parametrize(("dtype", "int8"), FORMATS)
@pytest.mark.parametrize("fields", [SHAPES[0], *SHAPES[-2:]], ids=repr)
@torch.inference_mode()
def test_it_computes_the_same_bits_with_any_number_of_threads_and_rows(
    tiny_model: Build, fields: dict[str, Any], dtype: torch.dtype, int8: bool
) -> None:
    model = trained(tiny_model(**fields)).to(dtype)
    ids = torch.randint(0, model.config.vocab_size, (7, 20))
    alone = torch.cat([steps_from(CompiledStep(model, int8), model, row, 0) for row in ids[:, None]])
    before = torch.get_num_threads()
    try:
        for threads, rows in ((1, 7), (2, 7), (5, 7), (2, 2), (2, 5)):
            torch.set_num_threads(threads)
            assert torch.equal(steps_from(CompiledStep(model, int8), model, ids[:rows], 0), alone[:rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("dtype", "int8"), FORMATS)
@pytest.mark.parametrize("fields", SHAPES, ids=repr)
@torch.inference_mode()
def test_it_computes_the_same_bits_whichever_way_it_reads_the_weights(
    tiny_model: Build, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], dtype: torch.dtype, int8: bool
) -> None:
    model = trained(tiny_model(**fields)).to(dtype)
    ids = torch.randint(0, model.config.vocab_size, (1, 20))
    logits = []
    for way in decoding.WAYS:
        monkeypatch.setattr(decoding, "WAYS", (way,))
        logits.append(steps_from(CompiledStep(model, int8), model, ids, 0))
    assert len(logits) > 1
    assert all(torch.equal(each, logits[0]) for each in logits)


@pytest.mark.parametrize("slow", decoding.WAYS, ids=str)
@torch.inference_mode()
def test_each_way_to_read_the_weights_is_tried_and_a_slow_one_left(
    tiny_model: Build, monkeypatch: pytest.MonkeyPatch, slow: tuple[int, int]
) -> None:
    model = trained(tiny_model(max_length=64))
    decode, used = CompiledStep(model), []
    plain = decode._step

    def step(*arguments: Any) -> None:
        used.append((decode._model.rows_at_once, decode._model.ahead))
        plain(*arguments)
        if used[-1] == slow:
            time.sleep(0.01)

    monkeypatch.setattr(decode, "_step", step)
    steps_from(decode, model, torch.ones(1, 64, dtype=torch.long), 0)
    n = len(decoding.WAYS) * decoding.TRIES
    assert {way: used[:n].count(way) for way in used[:n]} == dict.fromkeys(decoding.WAYS, decoding.TRIES)
    assert slow not in used[n:]
    assert len(used) == 64


@torch.inference_mode()
def test_under_autocast_weights_in_fp32_are_multiplied_in_bf16(tiny_model: Build) -> None:
    model = trained(tiny_model())
    ids = torch.randint(0, model.config.vocab_size, (2, 30))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decode = decode_step(model)
        cache = KVCache(model.config, 2, 30, model.device, torch.bfloat16)
        model(ids[:, :5], cache=cache)
        logits = torch.stack([decode(ids[:, t], cache) for t in range(5, 30)], dim=1)
    exact = model(ids)[:, 5:]
    assert 0 < (logits - exact).square().mean() / exact.square().mean() < 0.001


@torch.inference_mode()
def test_weights_that_are_not_numbers_show_in_the_logits(tiny_model: Build) -> None:
    for name in ("blocks.0.attention.wqkv.weight", "blocks.1.mlp.w_up.weight", "final_norm.weight"):
        for mlp in ("swiglu", "relu2"):
            model = trained(tiny_model(mlp=mlp))
            dict(model.named_parameters())[name].view(-1)[-1] = torch.nan
            ids = torch.randint(0, model.config.vocab_size, (1, 4))
            assert steps_from(CompiledStep(model), model, ids, 1)[0, -1].isnan().any(), (name, mlp)


@torch.inference_mode()
def test_a_weight_that_does_not_lie_row_by_row_is_copied(tiny_model: Build) -> None:
    model = trained(tiny_model())
    ids = torch.randint(0, model.config.vocab_size, (1, 20))
    logits = steps_from(CompiledStep(model), model, ids, 0)
    for weight in (
        model.get_parameter("blocks.0.attention.wo.weight"),
        model.get_parameter("blocks.1.mlp.w_down.weight"),
    ):
        weight.data = weight.data.t().contiguous().t()
    assert torch.equal(steps_from(CompiledStep(model), model, ids, 0), logits)


@torch.inference_mode()
def test_a_cache_of_another_shape_or_format_is_refused_not_written_beyond(tiny_model: Build) -> None:
    model = tiny_model()
    decode, ids = CompiledStep(model), torch.tensor([1, 2])
    for rows, length, dtype in ((1, 8, torch.float32), (2, 3, torch.float32), (2, 8, torch.bfloat16)):
        cache = KVCache(model.config, rows, length, model.device, dtype)
        cache.seen = 3
        with pytest.raises(ValueError, match="has no room for these tokens"):
            decode(ids, cache)
        assert cache.seen == 3


# ---- int8 weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])  # of all but the weights
@pytest.mark.parametrize("fields", SHAPES, ids=repr)
@torch.inference_mode()
def test_int8_rounds_each_row_to_the_nearest_of_255_steps(
    tiny_model: Build, fields: dict[str, Any], dtype: torch.dtype
) -> None:
    model = trained(tiny_model(**fields | {"tie_embeddings": False})).to(dtype)  # embeddings are not rounded
    model.get_parameter("blocks.0.mlp.w_down.weight")[3] = 0  # a row without a largest weight
    ids = torch.randint(0, model.config.vocab_size, (2, 20))
    int8, exact = (steps_from(decode_step(model, int8=int8), model, ids, 1).float() for int8 in (True, False))
    for matrix in [m for m in model.float().modules() if isinstance(m, torch.nn.Linear)]:
        step = matrix.weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
        matrix.weight.copy_((matrix.weight / step).round() * step)
    by_hand = model(ids)[:, 1:]  # all else in fp32
    assert (int8 - by_hand).square().mean() < 0.001 * by_hand.square().mean()
    assert 0.0001 < (int8 - exact).square().mean() / exact.square().mean() < 0.01


def test_int8_is_refused_where_there_is_no_such_step(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="leave --int8 out"):
        decode_step(tiny_model().half(), int8=True)
    monkeypatch.setattr(decoding, "library", lambda: None)
    with pytest.raises(ConfigError, match="leave --int8 out"):
        decode_step(tiny_model(), int8=True)


def test_many_texts_at_a_time_go_through_torch(tiny_model: Build) -> None:
    model = tiny_model()
    assert [type(decode_step(model, rows)) for rows in (1, 8, 9)] == [CompiledStep, CompiledStep, DecodeStep]
    assert isinstance(decode_step(model, 9, int8=True), CompiledStep)


# ---- compiling ----------------------------------------------------------------------------------


def library_in(home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = "import decoding; print(decoding.library() is not None)"
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def test_it_is_compiled_once_and_kept(tmp_path: Path) -> None:
    assert library_in(tmp_path).stdout == "True\n"
    (file,) = (tmp_path / ".cache/basicgpt").iterdir()
    made = file.stat().st_mtime_ns
    assert library_in(tmp_path).stdout == "True\n"
    assert file.stat().st_mtime_ns == made


@pytest.mark.parametrize("left", [0, 20_000])
def test_a_damaged_library_is_compiled_again(tmp_path: Path, left: int) -> None:
    library_in(tmp_path)
    (file,) = (tmp_path / ".cache/basicgpt").iterdir()
    file.write_bytes(file.read_bytes()[:left])
    again = library_in(tmp_path)  # to load it would end the process by SIGBUS
    assert (again.stdout, again.stderr, again.returncode) == ("True\n", "", 0)


def test_without_a_compiler_or_with_a_broken_one_it_says_so_and_text_is_written_still(tmp_path: Path) -> None:
    none = library_in(tmp_path, PATH=str(tmp_path))
    assert none.stdout == "False\n"
    assert none.stderr == ("text is written more slowly, without decoding.cpp: no C++ compiler found\n")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no rule for this processor' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert "without decoding.cpp: " in library_in(tmp_path, CXX=str(broken)).stderr
    assert "no rule for this processor" in library_in(tmp_path, CXX=str(broken)).stderr
    (tmp_path / "home").write_text("")  # no folder can be made in it
    assert library_in(tmp_path / "home").stdout == "False\n"


def test_without_a_home_folder_text_is_written_still(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # as for a user of a container whom /etc/passwd does not name
    assert decoding.library.__wrapped__() is None
    assert "more slowly, without decoding.cpp: Could not determine home directory" in capsys.readouterr().err


@torch.inference_mode()
def test_what_a_machine_without_a_compiler_writes_is_the_same(
    tiny_model: Build, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(tiny_model(n_vocab=300))
    config, texts = GenerationConfig(max_tokens=60, num_samples=2, seed=7), []
    for kind in (CompiledStep, DecodeStep):
        assert isinstance(decode_step(model), kind)
        texts.append(list(generate_ids(model, [1, 2, 3], tiny_tokenizer, config)))
        monkeypatch.setattr(decoding, "library", lambda: None)
    assert texts[0] == texts[1]
