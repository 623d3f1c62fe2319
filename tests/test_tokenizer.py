"""Text -> ids -> the same text, whatever the text; the same tokenizer from the same words; no network."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from errors import ConfigError
from tests.conftest import GETTYSBURG
from tokenizer import _FAST_PATTERNS, END_OF_TEXT, Tokenizer, load_tiktoken, train_bpe

REPO = Path(__file__).resolve().parent.parent
NAMES = ["gpt2", "cl100k_base", "bpe"]


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    cache = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
        return {name: load_tiktoken(name, cache) for name in ("gpt2", "cl100k_base")} | {"bpe": tiny_tokenizer}


@pytest.fixture(params=NAMES)
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[request.param]


def fuzzed_texts() -> list[str]:
    """Texts of characters of every plane and script (but surrogates, which are not characters), and hard ones."""
    chance = random.Random(0)
    ranges = [(0x20, 0x7F), (0x00, 0x20), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    texts = [
        "".join(chr(chance.randrange(*chance.choice(ranges[: chance.randint(1, 6)]))) for _ in range(length))
        for length in (1, 2, 3, 7, 20, 60, 200, 600) * 25
    ]
    hard = ["", " ", "\n", "\r\n\r\n", "\t \n  x", "\x00", "\ufeff", "\ufffd", "e\u0301 é", "don't I'LL we've"]
    hard += ["👩\u200d👩\u200d👧 🏳️\u200d🌈", "שלום עולם", "ไม่มีช่องว่าง", "3.14159e-10 1,000,000"]
    return texts + hard + [character * 20_000 for character in "a \n!漢"]


def test_any_text_comes_back_as_it_was(tokenizer: Tokenizer):
    for text in fuzzed_texts():
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint32
        assert tokenizer.decode(ids) == text


def test_the_lengths_of_tokens_sum_to_the_texts_bytes(tokenizer: Tokenizer):
    assert tokenizer.token_byte_length.shape == (tokenizer.n_vocab,)
    for text in fuzzed_texts():
        assert tokenizer.token_byte_length[tokenizer.encode(text)].sum() == len(text.encode())


def test_known_ids(tokenizers: dict[str, Tokenizer]):
    assert tokenizers["gpt2"].encode("hello world").tolist() == [31373, 995]
    assert tokenizers["cl100k_base"].encode("hello world").tolist() == [15339, 1917]
    assert {name: (t.n_vocab, t.eot_id) for name, t in tokenizers.items()} == {
        "gpt2": (50257, 50256), "cl100k_base": (100277, 100257), "bpe": (300, 299)
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_fast_form_of_a_pattern_gives_the_ids_of_the_published_one(tokenizers: dict[str, Tokenizer], name: str):
    """On 20,000 texts of the characters that the patterns tell apart."""
    ours = tokenizers[name]
    assert ours._pattern in _FAST_PATTERNS
    published = tiktoken.Encoding(
        name, pat_str=ours._pattern, mergeable_ranks={token: i for i, token in enumerate(ours._tokens)},
        special_tokens=ours._special_ids,
    )  # fmt: skip
    spaces, letters = " " * 5 + "\t\n\r\x0b\x85\xa0\u2028\u3000", "sdmtSDMTlLvVrReE\u017faZ\xe9\u0416\u4e2d"
    others = "\x27\x27\x270179\u0663\xbd\u2167.,!-_\u2014\u0301\u200d\U0001f600\x00"
    rng = random.Random(0)
    for _ in range(20_000):
        text = "".join(rng.choices(spaces + letters + others, k=rng.randint(1, 40)))
        assert ours.encode(text).tolist() == published.encode_ordinary(text), repr(text)


def test_end_of_text_inside_a_text_is_ordinary_text(tokenizer: Tokenizer):
    for special in (END_OF_TEXT, "<|fim_prefix|>", "<|endofprompt|>"):
        text = f"one{special}two"
        ids = tokenizer.encode(text)
        assert tokenizer.eot_id not in ids
        assert tokenizer.token_byte_length[ids].all()  # no special id at all
        assert tokenizer.decode(ids) == text


def test_end_of_text_stands_for_no_bytes_of_text(tokenizer: Tokenizer):
    assert tokenizer.token_byte_length[tokenizer.eot_id] == 0
    assert tokenizer.decode_token(tokenizer.eot_id) == END_OF_TEXT.encode()


def test_an_unknown_id_is_named(tokenizer: Tokenizer):
    with pytest.raises(KeyError, match=str(tokenizer.n_vocab)):
        tokenizer.decode([tokenizer.n_vocab])


def test_a_tokenizer_survives_json(tokenizer: Tokenizer):
    again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert (again.name, again.n_vocab, again.eot_id) == (tokenizer.name, tokenizer.n_vocab, tokenizer.eot_id)
    assert again.fingerprint == tokenizer.fingerprint
    assert np.array_equal(again.token_byte_length, tokenizer.token_byte_length)
    for text in fuzzed_texts():
        assert np.array_equal(again.encode(text), tokenizer.encode(text))


def test_the_same_texts_train_the_same_tokenizer():
    words = [f"{GETTYSBURG[i:]} {i}" for i in range(0, 300, 7)]
    first, second, fewer = train_bpe(words, 400), train_bpe(iter(words), 400), train_bpe(words, 399)
    assert first.to_dict() == second.to_dict()
    assert first.fingerprint == second.fingerprint != fewer.fingerprint
    assert first.n_vocab == 400 == first.eot_id + 1


def test_a_trained_tokenizer_learns_the_words_of_its_text(tiny_tokenizer: Tokenizer):
    assert len(tiny_tokenizer.encode(GETTYSBURG)) < 0.75 * len(GETTYSBURG)
    assert len(tiny_tokenizer.encode(" nation")) < len(" nation")


@pytest.mark.parametrize("texts", [[], [""], ["ab"], ["the cat and the hat"]], ids=repr)
def test_too_little_text_is_refused_with_a_size_that_works(texts: list[str]):
    with pytest.raises(ConfigError, match=r"data\.bpe_vocab_size is 1000, but .* only \d+ entries") as caught:
        train_bpe(texts, 1000)
    message = str(caught.value)
    entries = int(message.split(" only ")[1].split()[0])
    assert message.endswith(f"; use --data.bpe_vocab_size {entries}")
    assert entries >= 257  # what the option takes
    assert train_bpe(texts, entries).n_vocab == entries


NO_NETWORK = """
import socket, sys

def refuse(*_, **__):
    raise OSError("the network is off")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.path.insert(0, {repo!r})
from tokenizer import Tokenizer, load_tiktoken, train_bpe
for name in ("gpt2", "cl100k_base"):
    print(*load_tiktoken(name, "cache").encode("hello world"))
trained = train_bpe(["hello world " * 9], 262)
again = Tokenizer.from_dict(trained.to_dict())
print(again.decode(again.encode("hello world")))
"""


def test_every_tokenizer_loads_without_the_network(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if k not in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")}
    for own in ({}, {"TIKTOKEN_CACHE_DIR": str(tmp_path / "own")}):
        run = subprocess.run(
            [sys.executable, "-c", NO_NETWORK.format(repo=str(REPO))],
            cwd=tmp_path, env=environment | own | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True,
        )  # fmt: skip
        assert run.stderr == ""
        assert run.stdout.splitlines() == ["31373 995", "15339 1917", "hello world"]


def test_half_a_surrogate_pair_becomes_a_replacement_character(tokenizer: Tokenizer):
    assert tokenizer.decode(tokenizer.encode("a \ud83d b")) == "a \ufffd b"
