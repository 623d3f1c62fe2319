"""From logits to ids: the distributions of transformers, and a decode loop that a cache does not change."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from config import GenerationConfig, GPTConfig
from generate import read_prompt
from model import GPT
from sampling import (
    NonFiniteError,
    TextStream,
    encode_prompt,
    fit_context,
    generate_ids,
    generate_text,
    next_token_probabilities,
)
from tokenizer import Tokenizer

Build = Callable[..., GPT]

PLAIN = GenerationConfig(temperature=1.0, top_k=0, top_p=1.0)
GREEDY = GenerationConfig(temperature=0.0, max_tokens=100)


def random_logits(rows: int = 4, n_vocab: int = 50, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, n_vocab, generator=torch.Generator().manual_seed(seed))


def ids_of(
    model: GPT, prompt: list[int], tokenizer: Tokenizer, config: GenerationConfig, **how: Any
) -> list[list[int]]:
    """The samples' ids, a list each."""
    return [list(text) for text in zip(*generate_ids(model, prompt, tokenizer, config, **how), strict=True)]


def chain_model(build: Build, followers: dict[int, dict[int, float]]) -> GPT:
    """A model whose next token depends on the last alone: followers[id] holds logits, about; others have none.

    Its blocks do nothing; head row b gets the direction of a's embedding for each pair (a, b).
    """
    model = build(300, d_model=256, max_length=16)
    with torch.no_grad():
        for block in model.blocks:
            block.get_parameter("attention.wo.weight").zero_()
            block.get_parameter("mlp.w_down.weight").zero_()
        model.final_norm.weight.fill_(1.0)
        model.head.weight.zero_()
        directions = torch.nn.functional.normalize(model.embedding.weight)
        for last, nexts in followers.items():
            for token_id, logit in nexts.items():
                model.head.weight[token_id] += logit / 256**0.5 * directions[last]
    return model


# ---- the distribution ----------------------------------------------------------------------


def their_probabilities(logits: Tensor, config: GenerationConfig, seen: Tensor) -> Tensor:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors: Any = LogitsProcessorList()
    if config.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    processors.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        processors.append(MinPLogitsWarper(config.min_p))
    return processors(seen, logits.clone()).softmax(dim=1)


def assert_as_theirs(config: GenerationConfig, seed: int = 0) -> None:
    logits = random_logits(seed=seed)
    seen = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(seed))
    ours, theirs = next_token_probabilities(logits, config, seen), their_probabilities(logits, config, seen)
    assert torch.equal(ours > 0, theirs > 0), config
    assert torch.allclose(ours, theirs, atol=1e-6), config


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.3}, {"temperature": 2.5}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.7},
        {"top_k": 1}, {"top_k": 7}, {"top_k": 50}, {"top_k": 1000}, {"top_p": 0.01}, {"top_p": 0.5}, {"top_p": 0.99},
        {"min_p": 0.05}, {"min_p": 0.999},
    ],
    ids=str,
)  # fmt: skip
def test_each_setting_gives_transformers_distribution(fields: dict[str, Any]):
    assert_as_theirs(dataclasses.replace(PLAIN, **fields))


def test_any_combination_gives_transformers_distribution():
    chance = random.Random(0)
    for seed in range(200):
        assert_as_theirs(
            GenerationConfig(
                temperature=chance.uniform(0.2, 2),
                top_k=chance.choice([0, 1, 3, 20, 49]),
                top_p=chance.choice([1.0, chance.uniform(0.05, 0.99)]),
                min_p=chance.choice([0.0, chance.uniform(0.01, 0.5)]),
                repetition_penalty=chance.choice([1.0, chance.uniform(0.6, 2)]),
            ),
            seed,
        )


def test_all_settings_off_leave_the_models_own_distribution():
    logits = random_logits()
    assert torch.allclose(next_token_probabilities(logits, PLAIN), logits.softmax(dim=1))


def test_of_tokens_as_likely_as_the_k_th_all_stay():
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0], [3.0, 2.0, 1.0, 0.0, -1.0]])
    two = next_token_probabilities(logits, dataclasses.replace(PLAIN, top_k=2))
    assert torch.equal(two > 0, torch.tensor([[1, 1, 1, 0, 1], [1, 1, 0, 0, 0]]).bool())
    assert two[0, 0] == two[0, 2] == two[0, 4]


def test_temperature_zero_gives_all_to_the_likeliest_token():
    logits = random_logits()
    probabilities = next_token_probabilities(logits, GREEDY)
    assert torch.equal(probabilities, torch.nn.functional.one_hot(logits.argmax(dim=1), 50).float())


def test_bf16_logits_are_sampled_in_fp32():
    probabilities = next_token_probabilities(random_logits().bfloat16(), PLAIN)
    assert probabilities.dtype == torch.float32
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", [PLAIN, GREEDY], ids=["sampled", "greedy"])
def test_logits_that_are_not_finite_end_with_exit_code_5(value: float, config: GenerationConfig):
    logits = random_logits()
    logits[2, 3] = value
    with pytest.raises(NonFiniteError, match="use an earlier one") as caught:
        next_token_probabilities(logits, config)
    assert caught.value.exit_code == 5


def test_a_token_that_the_model_excludes_stays_excluded():
    logits = random_logits()
    logits[:, 7] = -torch.inf
    assert not next_token_probabilities(logits, PLAIN)[:, 7].any()


def test_a_model_with_broken_weights_ends_with_exit_code_5(tiny_model: Build, tiny_tokenizer: Tokenizer):
    model = tiny_model(300)
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError):
        generate_text(model, "Four score", tiny_tokenizer, GREEDY)


# ---- the loop ------------------------------------------------------------------------------


@torch.inference_mode()
def test_greedy_text_is_the_argmax_of_the_model(tiny_model: Build, tiny_tokenizer: Tokenizer):
    model = tiny_model(300)
    ids = [5, 6, 7]
    (text,) = ids_of(model, ids, tiny_tokenizer, dataclasses.replace(GREEDY, max_tokens=20))
    for token_id in text:
        assert token_id == model(torch.tensor([ids]))[0, -1, :300].argmax()
        ids = [*ids, token_id]


@pytest.mark.parametrize(
    "fields", [{}, {"n_kv_heads": 2}, {"max_length": 5}, {"max_length": 2}, {"max_length": 1}], ids=str
)
@pytest.mark.parametrize("length", [1, 4, 11, 40])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"repetition_penalty": 1.5, "temperature": 0.7}], ids=str)
def test_the_cache_changes_nothing_also_beyond_the_context(
    tiny_model: Build, tiny_tokenizer: Tokenizer, fields: dict[str, Any], length: int, settings: dict[str, Any]
):
    model = tiny_model(300, **fields)
    config = GenerationConfig(**{"num_samples": 3, "max_tokens": 45} | settings)
    prompt = torch.randint(299, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    with_cache = ids_of(model, prompt, tiny_tokenizer, config)
    assert with_cache == ids_of(model, prompt, tiny_tokenizer, config, use_cache=False)
    assert len(with_cache) == 3
    assert len(with_cache[0]) == 45 or all(text[-1] == 299 for text in with_cache)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(tiny_model: Build, tiny_tokenizer: Tokenizer):
    model, config = tiny_model(300), dataclasses.replace(PLAIN, max_tokens=30, num_samples=2)
    first, again, other = (
        ids_of(model, [299, 65], tiny_tokenizer, dataclasses.replace(config, seed=seed)) for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other
    assert first[0] != first[1]  # and the samples of one seed differ


@pytest.mark.parametrize("fields", [{"top_k": 0, "top_p": 1.0}, {"top_k": 5, "top_p": 1.0}, {"top_k": 0, "top_p": 0.8}])
def test_each_token_is_drawn_as_often_as_its_probability(
    fields: dict[str, Any], tiny_model: Build, tiny_tokenizer: Tokenizer
):
    logits = {100 + i: 6 - i / 3 for i in range(12)} | {250: 4.2}
    model, n = chain_model(tiny_model, {72: logits}), 20_000
    config = GenerationConfig(temperature=1.0, max_tokens=1, num_samples=n, **fields)
    drawn = torch.tensor([text[0] for text in ids_of(model, [72], tiny_tokenizer, config)]).bincount(minlength=300) / n
    expected = next_token_probabilities(model(torch.tensor([[72]]))[:, -1, :300], config)[0]
    assert ((drawn - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_ids_beyond_the_tokenizers_are_never_sampled(tiny_model: Build, tiny_tokenizer: Tokenizer):
    model = tiny_model(300, vocab_size=4096)
    config = GenerationConfig(max_tokens=100, num_samples=8, temperature=5.0, top_k=0, top_p=1.0)
    texts = ids_of(model, [1, 2], tiny_tokenizer, config)
    assert max(max(text) for text in texts) < 300
    (greedy,) = ids_of(model, [1, 2], tiny_tokenizer, GREEDY)
    assert max(greedy) < 300


def test_generation_stops_at_end_of_text(tiny_model: Build, tiny_tokenizer: Tokenizer):
    model = chain_model(tiny_model, {72: {101: 30}, 101: {108: 30}, 108: {299: 30}})
    assert ids_of(model, [299, 72], tiny_tokenizer, GREEDY) == [[101, 108, 299]]
    text = generate_text(model, tiny_tokenizer.decode([72]), tiny_tokenizer, GREEDY)
    assert text == [tiny_tokenizer.decode([101, 108])]  # end-of-text is not shown


def test_a_text_that_ended_is_filled_with_end_of_text_while_others_go_on(tiny_model: Build, tiny_tokenizer: Tokenizer):
    model = chain_model(tiny_model, {72: {72: 30, 299: 28}})
    config = GenerationConfig(num_samples=6, max_tokens=200, temperature=1.0, seed=3)
    texts = ids_of(model, [299, 72], tiny_tokenizer, config)
    lengths = [text.index(299) for text in texts]
    assert len(set(lengths)) > 1
    assert max(lengths) == len(texts[0]) - 1  # over as soon as the last one is
    assert all(set(text[:end]) == {72} for text, end in zip(texts, lengths, strict=True) if end)
    assert all(set(text[end:]) == {299} for text, end in zip(texts, lengths, strict=True))


def test_max_tokens_ends_the_text_too(tiny_model: Build, tiny_tokenizer: Tokenizer):
    model = chain_model(tiny_model, {72: {72: 30}})
    assert ids_of(model, [72], tiny_tokenizer, dataclasses.replace(GREEDY, max_tokens=20)) == [[72] * 20]


def test_an_empty_prompt_starts_a_new_document(tiny_model: Build, tiny_tokenizer: Tokenizer):
    assert encode_prompt("", tiny_tokenizer) == [299]
    assert encode_prompt("nation", tiny_tokenizer) == [299, *tiny_tokenizer.encode("nation").tolist()]
    model = chain_model(tiny_model, {299: {72: 30}, 72: {299: 30}})
    assert generate_text(model, "", tiny_tokenizer, GREEDY) == [tiny_tokenizer.decode([72])]


# ---- text as it grows ------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["two\nlines", "two\nlines\n", "two\r\nlines\r\n", "two\nlines\n\n"])
def test_a_prompt_from_a_file_or_a_pipe_goes_on_in_its_last_line(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "prompt.txt"
    file.write_bytes(written.encode())
    expected = "two\nlines\n" if written.endswith("\n\n") else "two\nlines"  # an empty line is the user's own
    assert read_prompt(f"@{file}") == expected
    with file.open() as pipe, monkeypatch.context() as patched:
        patched.setattr("sys.stdin", pipe)
        assert read_prompt("-") == expected
    assert read_prompt("kept\n") == "kept\n"


@pytest.mark.parametrize("text", ["👩\u200d👩\u200d👧🏳️\u200d🌈", "naïve 漢字 שלום", "plain"])
def test_a_stream_never_breaks_a_character(tiny_tokenizer: Tokenizer, text: str):
    ids_of_byte = {tiny_tokenizer.decode_token(i): i for i in range(299) if tiny_tokenizer.token_byte_length[i] == 1}
    stream, pieces = TextStream(tiny_tokenizer), []
    for byte in text.encode():
        pieces.append(stream.add(ids_of_byte[bytes([byte])]))
    assert [piece for piece in pieces if piece] == list(text)  # each as soon as it is complete
    assert stream.end() == ""


def test_a_character_that_is_never_completed_is_shown_as_a_replacement(tiny_tokenizer: Tokenizer):
    ids = tiny_tokenizer.encode("a😀").tolist()
    stream = TextStream(tiny_tokenizer)
    assert "".join(stream.add(token_id) for token_id in ids[:-1]) == "a"
    assert stream.end() == "\ufffd"


# ---- the window over a long text ---------------------------------------------------------------


@pytest.mark.parametrize("max_length", [1, 2, 3, 4, 5, 8, 31, 64])
def test_the_window_never_exceeds_the_context_keeps_half_of_it_and_grows_token_by_token(max_length: int):
    windows = [fit_context(length, max_length) for length in range(1, 6 * max_length + 2)]
    assert windows[:max_length] == list(range(1, max_length + 1))  # all of it while it fits
    cuts = 0
    for before, after in zip(windows[max_length - 1 :], windows[max_length:], strict=False):
        assert max(max_length // 2, 1) <= after <= max_length
        if after != before + 1:  # a cut: only from a full window, down to half
            assert (before, after) == (max_length, max(max_length // 2, 1))
            cuts += 1
    assert cuts == sum(window == max_length for window in windows[max_length - 1 : -1])


def test_ids_without_text_are_never_sampled():
    tokens = [bytes([b]) for b in range(256)]
    tokenizer = Tokenizer("holes", r"\p{L}+|.", tokens, {"<|endoftext|>": 300, "<|other|>": 290})
    torch.manual_seed(0)
    model = GPT(GPTConfig(d_model=16, n_layers=1, n_heads=1, max_length=64).resolved(tokenizer.n_vocab))
    settings = GenerationConfig(temperature=1.0, top_k=0, top_p=1.0, num_samples=16, max_tokens=60)
    drawn = {i for step in generate_ids(model, [300], tokenizer, settings) for i in step}
    assert drawn <= set(range(256)) | {300}


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = torch.tensor([[100.0, 90.0, -50.0]])
    probabilities = next_token_probabilities(logits, GenerationConfig(temperature=1e-40, top_k=0, top_p=1.0))
    assert probabilities.tolist() == [[1.0, 0.0, 0.0]]
