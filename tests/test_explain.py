"""Looking inside a model shows what it computes: its own probabilities, its own attention; and changes nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import explain as explaining
import generate
from checkpoint import gather_tensors, save_checkpoint
from config import Config, DataConfig, GPTConfig
from errors import exit_code_of
from explain import attention_map, colour_text, explain, observe, token_text
from model import GPT, Attention
from tokenizer import Tokenizer

IDS = [299, *range(40, 65)]  # end-of-text, then others
SHAPES = [{}, {"n_kv_heads": 2}, {"mlp": "relu2", "tie_embeddings": True}]
TinyModel = Callable[..., GPT]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_lens_behind_the_last_block_is_the_model_to_the_bit(tiny_model: TinyModel, shape: dict, dtype: torch.dtype):
    model = tiny_model(320, **shape).to(dtype)
    with torch.inference_mode():
        logits = model(torch.tensor([IDS]))[0]
        streams, _ = observe(model, torch.tensor([IDS]))
        assert torch.equal(model.head(model.final_norm(streams[-1]))[0], logits)
        assert torch.equal(streams[0], model.embedding(torch.tensor([IDS])))
    e, p = explain(model, IDS), logits.float().softmax(dim=1)
    assert len(streams) == len(e.lens_ids) == model.config.n_layers + 1
    assert torch.equal(e.probability, p[range(len(IDS) - 1), IDS[1:]])
    for t, following in enumerate(IDS[1:]):
        assert e.rank[t] == 1 + sum(other > logits[t, following] for other in logits[t])
    assert torch.equal(e.top_probability, p.topk(10, dim=1).values)
    assert torch.equal(p.gather(1, e.top_ids), e.top_probability)
    assert torch.equal(e.lens_ids[-1], e.top_ids[:, 0])
    assert torch.equal(e.lens_rank[-1], e.rank)
    assert not torch.equal(e.lens_ids[0], e.lens_ids[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_maps_are_what_the_model_attends_with(tiny_model: TinyModel, shape: dict):
    model, seen = tiny_model(320, **shape), []
    for part in (part for part in model.modules() if isinstance(part, Attention)):
        part.register_forward_hook(lambda part, inputs, output: seen.append((part, inputs, output)))
    with torch.inference_mode():
        model(torch.tensor([IDS]))
        maps = explain(model, IDS).attention
        for layer, (part, (x, cos, sin, *_), output) in enumerate(seen[: len(maps)]):
            weights = attention_map(part, x, cos, sin)
            assert torch.equal(weights[0], maps[layer])
            assert torch.allclose(weights.sum(dim=3), torch.ones(()), atol=1e-6)
            assert not weights.triu(1).any()
            torch.testing.assert_close(attended(part, x, weights), output, atol=1e-5, rtol=1e-5)


def attended(part: Attention, x: Tensor, weights: Tensor) -> Tensor:
    H, G, K = part.n_heads, part.n_kv_heads, part.head_dim
    v = part.wqkv(x)[..., (H + G) * K :].unflatten(2, (G, K)).transpose(1, 2).repeat_interleave(H // G, dim=1)
    return part.wo((weights @ v).transpose(1, 2).flatten(2))


def test_maps_of_a_long_text_are_the_corner_of_the_whole(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(320)
    whole = explain(model, IDS).attention
    monkeypatch.setattr(explaining, "MAP_TOKENS", 7)
    torch.testing.assert_close(explain(model, IDS).attention, whole[:, :, :7, :7])


def test_looking_changes_nothing_in_the_model(tiny_model: TinyModel):
    model = tiny_model(320)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    explain(model, IDS)
    with pytest.raises(ValueError, match="exceed the model's context of 32"):
        explain(model, [1] * 33)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_tokens_that_are_no_text_are_named(tiny_tokenizer: Tokenizer):
    assert token_text(tiny_tokenizer.eot_id, tiny_tokenizer) == "<|endoftext|>"
    assert token_text(310, tiny_tokenizer) == "<no token 310>"
    (first, *_) = tiny_tokenizer.encode("\u00e9").tolist()
    assert token_text(first, tiny_tokenizer) == "\\xc3"


def test_the_terminal_shows_the_text_and_a_colour_for_each_token(tiny_model: TinyModel, tiny_tokenizer: Tokenizer):
    text = "Four score\nand caf\u00e9s"
    ids = [tiny_tokenizer.eot_id, *tiny_tokenizer.encode(text).tolist()]
    shown = colour_text(explain(tiny_model(320), ids), tiny_tokenizer)
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert plain.startswith(f"{text}\n\nprobability:  50% or more ")
    assert all(line.count("\x1b[48") == line.count("\x1b[0m") for line in shown.splitlines())


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model: TinyModel, tiny_tokenizer: Tokenizer) -> Path:
    config = Config(
        data=DataConfig(current_datasets=("SOTU",), dataset_probabilities=(1.0,), tokenizer="bpe", bpe_vocab_size=300),
        model=GPTConfig(d_model=64, n_layers=2, n_heads=4, max_length=32),
    )
    (tmp_path / "run").mkdir()
    tensors = gather_tensors(tiny_model(300), [], keep=True)
    return save_checkpoint(tmp_path / "run", 7, tensors, {}, config, tiny_tokenizer, None)


def test_generate_writes_the_page_and_says_what_it_leaves_out(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    page = checkpoint.parent.parent / "pages" / "inside.html"
    common = [str(checkpoint), "--prompt", "Four score and", "--max_tokens", "60"]
    assert generate.main([*common, "--explain", str(page)]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out  # it is not a terminal
    assert re.search(r"^Shown are the first 32 of \d+ tokens, which fill the model's context\.$", err, re.MULTILINE)
    assert err.endswith(f"written to {page}\n")
    assert "fineweb at step 7" in page.read_text()
    assert generate.main(common) == 0
    assert capsys.readouterr().out == out  # the same text as without


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_terminal_gets_colours_unless_no_color(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, no_color: str):
    master, slave = os.openpty()
    monkeypatch.setenv("NO_COLOR", no_color)
    with monkeypatch.context() as patched, open(slave, "w") as terminal:
        patched.setattr("sys.stdout", terminal)
        page = checkpoint.parent / "inside.html"
        generate.main([str(checkpoint), "--prompt", "Four", "--max_tokens", "5", "--explain", str(page)])
    shown = os.read(master, 100_000)
    os.close(master)
    assert shown.startswith(b"Four")
    assert (b"\x1b[48;5;" in shown) is not bool(no_color)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "x" * 40, "--explain", "a.html"], "has 41 tokens with end-of-text; --explain is of one context"),
        (["--explain", "notes.txt"], "--explain notes.txt is not an .html file; name the page to write"),
        (["--num_samples", "2", "--explain", "a.html"], "--explain is of one text"),
        (["--int8", "--explain", "a.html"], "--explain is of one text"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    checkpoint: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    assert exit_code_of(lambda: generate.main([str(checkpoint), *options])) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
