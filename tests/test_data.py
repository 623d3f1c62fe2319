"""From files to batches: nothing lost, nothing twice, the same at every world size and after every resume."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import documents
import prepare_data
from config import DATASETS, DataConfig, Dataset
from documents import DocumentStream, is_held_out
from errors import ConfigError, exit_code_of
from hub import DataError
from prepare_data import IGNORED, Batch, DatasetPrep, PackedSource, StateMismatch, encode
from sources import (
    CorruptRecord,
    Document,
    EmptyStream,
    Source,
    TextFieldMissing,
    document_hash,
    read_chunks,
    resolve_source,
    row_of,
)
from tokenizer import BPE_PATTERN, END_OF_TEXT, Tokenizer, load_tiktoken

ROOT = Path(__file__).resolve().parent.parent
V = 8  # streams, unless a test says otherwise
T = 32  # tokens of context
BYTES = Tokenizer("bytes", BPE_PATTERN, [bytes([i]) for i in range(256)], {END_OF_TEXT: 256})  # a token is a byte
EOT = BYTES.eot_id


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    """A test that waits for ever fails instead, after 40 seconds."""

    def too_long(*_: object) -> None:
        raise TimeoutError("the test hangs")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(40)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


# ---- files, and what reads them --------------------------------------------------------------


def write_jsonl(path: Path, texts: Sequence[Any], field: str = "text") -> Path:
    """JSON lines, gzipped if the name says so, with a blank line after every tenth."""
    lines = [json.dumps({"id": i, field: text}) + "\n" + "\n" * (i % 10 == 9) for i, text in enumerate(texts)]
    content = "".join(lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def write_parquet(path: Path, texts: Sequence[Any], rows_per_group: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def texts_of(name: str, n: int, words: int = 12) -> list[str]:
    """Distinct documents of 1 to 2 x `words` short words, each beginning with its name and number."""
    rng = random.Random(name)
    return [
        " ".join([f"{name}{i}", *(rng.choice(("water", "of", "the", "éa")) for _ in range(rng.randrange(2 * words)))])
        for i in range(n)
    ]


def config_of(folder: Path, *files: Path, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {
        "current_datasets": ("LOCAL",), "dataset_probabilities": (1.0,), "local_files": tuple(map(str, files)),
        "n_streams": V, "val_fraction": 0.2, "cache_dir": str(folder / "cache"),
    }  # fmt: skip
    return DataConfig(**values | changes)


Register = Callable[..., DataConfig]


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Several datasets of local files at once, which a user has to join in LOCAL: register(A=[file], B=[file])."""
    files: dict[str, tuple[str, ...]] = {}

    def resolve(name: str, config: DataConfig) -> Source:
        return resolve_source(name, dataclasses.replace(config, local_files=files[name]))

    def register(probabilities: tuple[float, ...], datasets: dict[str, list[Path]], **changes: Any) -> DataConfig:
        for name, paths in datasets.items():
            monkeypatch.setitem(DATASETS, name, Dataset("local"))
            files[name] = tuple(map(str, paths))
        names = tuple(datasets)
        return config_of(tmp_path, current_datasets=names, dataset_probabilities=probabilities, **changes)

    monkeypatch.setattr(prepare_data, "resolve_source", resolve)
    return register


@contextlib.contextmanager
def opened(config: DataConfig, rows: int = 16, rank: int = 0, world: int = 1, **more: Any) -> Iterator[DatasetPrep]:
    data = DatasetPrep(config, more.pop("length", T), rows, rank, world, tokenizer=more.pop("tokenizer", BYTES), **more)
    try:
        yield data
    finally:
        data.close()


def documents_of(config: DataConfig, stream: int = 0, n_streams: int = 1, epochs: int = 1, **more: Any) -> list[str]:
    source = resolve_source("LOCAL", config)
    return texts_in(DocumentStream(source, config, stream, n_streams, epochs, **more))


def trained_on(texts: Sequence[str]) -> list[str]:
    """All but the one that is held out of a few at the smallest val_fraction."""
    held_out = min(texts, key=document_hash)
    return [text for text in texts if text != held_out]


def texts_in(stream: Iterable[Document]) -> list[str]:
    return [text for text in stream if isinstance(text, str)]


def tokens_of_streams(batches: Sequence[Batch], n_streams: int = V) -> list[list[int]]:
    """Each stream's tokens as a model sees them: its first input, then its targets that count."""
    streams: list[list[int]] = [[] for _ in range(n_streams)]
    for batch in batches:
        for row, (inputs, targets) in enumerate(zip(batch.inputs, batch.targets, strict=True)):
            valid = targets != prepare_data.IGNORED
            stream = streams[row % n_streams]
            if valid.any():
                assert not np.diff(valid.astype(int)).clip(0).any(), "a gap in a row"
                stream += [] if stream else [int(inputs[0])]
                assert inputs[valid].tolist() == [stream[-1], *targets[valid][:-1].tolist()]
                stream += targets[valid].tolist()
    return streams


def split_documents(tokens: Sequence[int], tokenizer: Tokenizer = BYTES) -> list[str]:
    """Documents of a stream, each of which begins with end-of-text."""
    assert not tokens or tokens[0] == tokenizer.eot_id
    starts = [i for i, token in enumerate(tokens) if token == tokenizer.eot_id]
    return [tokenizer.decode(tokens[a + 1 : b]) for a, b in itertools.pairwise([*starts, len(tokens)])]


def global_batches(config: DataConfig, world: int, rows: int = 16, **more: Any) -> Iterator[Batch]:
    """The batches of all processes put together in the order of their streams, as if there were one process."""
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(opened(config, rows, r, world, **more)) for r in range(world)]
        while True:
            got = [next(part, None) for part in parts]
            if not any(got):
                return
            yield join([batch or part.empty_batch() for batch, part in zip(got, parts, strict=True)], config.n_streams)


def join(parts: list[Batch], n_streams: int) -> Batch:
    world, rows = len(parts), sum(len(part.inputs) for part in parts)
    inputs, targets = (np.zeros((rows, T), dtype=np.int64) for _ in range(2))
    sources = np.zeros(rows, dtype=np.int64)
    for rank, part in enumerate(parts):
        for i in range(len(part.inputs)):
            turn, k = divmod(i, n_streams // world)
            row = turn * n_streams + rank + k * world
            inputs[row], targets[row], sources[row] = part.inputs[i], part.targets[i], part.sources[i]
    return Batch(inputs, targets, sum(p.n_targets for p in parts), sources)


def mix_of(batch: Batch, n_sources: int = 2) -> np.ndarray:
    """Targets of each source."""
    return np.bincount(batch.sources, (batch.targets != IGNORED).sum(axis=1), minlength=n_sources)


def assert_same(a: Sequence[Batch], b: Sequence[Batch]) -> None:
    assert len(a) == len(b)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert np.array_equal(x.inputs, y.inputs), f"batch {i}"
        assert np.array_equal(x.targets, y.targets), f"batch {i}"
        assert (x.n_targets, x.sources.tolist()) == (y.n_targets, y.sources.tolist()), f"batch {i}"


@pytest.fixture
def mixed_files(tmp_path: Path) -> tuple[list[Path], list[str]]:
    return write_mixed_files(tmp_path / "files")


def write_mixed_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Every kind of local file, in nested folders, with empty and null texts; and the documents in them.

    They are fewer than streams, so that each is divided among all.
    """
    lines, zipped, many, few = texts_of("j", 83), texts_of("z", 41), texts_of("m", 120), texts_of("f", 57)
    write_jsonl(folder / "a/lines.jsonl", [*lines[:40], None, "", *lines[40:]])
    write_jsonl(folder / "a/b/zipped.jsonl.gz", zipped)
    write_parquet(folder / "many groups.parquet", [*many[:70], None, "", *many[70:]], rows_per_group=7)  # 18 groups
    write_parquet(folder / "few groups.parquet", few, rows_per_group=23)  # 3 groups, fewer than streams
    write_parquet(folder / "empty.parquet", [], rows_per_group=1)
    (folder / "empty.txt").touch()
    (folder / "plain.txt").write_text("a plain text\n\nof two paragraphs\n")
    return [folder], [*lines, *zipped, *many, *few, "a plain text\n\nof two paragraphs\n"]


# ---- packing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_files", [1, 7, 8, 19])
def test_every_token_of_an_epoch_is_a_target_once_with_end_of_text_before_each_document(
    tmp_path: Path, n_files: int
) -> None:
    """Fewer files than streams, as many, and more: whole files and shared ones."""
    texts = texts_of("d", 400)
    paths = [write_jsonl(tmp_path / f"{k:02d}.jsonl", texts[k::n_files]) for k in range(n_files)]
    config = config_of(tmp_path, *paths)
    streams = tokens_of_streams(list(global_batches(config, 1, epochs=1)))
    for v, tokens in enumerate(streams):
        expected = documents_of(config, v, V)
        assert tokens == [t for text in expected for t in (EOT, *text.encode())]
    seen = [text for tokens in streams for text in split_documents(tokens)]
    assert sorted(seen) == sorted(t for t in texts if not is_held_out(t, config.val_fraction))


def test_training_and_held_out_documents_together_are_all_documents(
    tmp_path: Path, mixed_files: tuple[list[Path], list[str]]
) -> None:
    files, texts = mixed_files
    config = config_of(tmp_path, *files)
    streams = tokens_of_streams(list(global_batches(config, 1, epochs=1)))
    trained = [text for tokens in streams for text in split_documents(tokens)]
    held_out = documents_of(config, held_out=True)
    assert len(held_out) > 20
    assert Counter(trained) + Counter(held_out) == Counter(texts)
    assert all(count == 1 for count in Counter(texts).values())


def test_empty_files_among_others_do_no_harm(tmp_path: Path) -> None:
    texts = texts_of("d", 240)
    paths = [write_jsonl(tmp_path / f"{k:02d}.jsonl", texts[k::12] if k < 12 else []) for k in range(16)]
    (tmp_path / "16.txt").touch()
    (tmp_path / "17.jsonl").write_text("\n\n  \n")
    paths += [write_parquet(tmp_path / "18.parquet", [], 1), tmp_path / "16.txt", tmp_path / "17.jsonl"]
    config = config_of(tmp_path, *paths, n_streams=4)
    seen = [text for v in range(4) for text in documents_of(config, v, 4)]
    assert Counter(seen) == Counter(t for t in texts if not is_held_out(t, config.val_fraction))


def test_three_epochs_are_three_times_every_document(tmp_path: Path, mixed_files: tuple[list[Path], list[str]]) -> None:
    files, texts = mixed_files
    config = config_of(tmp_path, *files)
    streams = tokens_of_streams(list(global_batches(config, 1, epochs=3)))
    trained = Counter(text for tokens in streams for text in split_documents(tokens))
    assert trained == {text: 3 for text in texts if not is_held_out(text, config.val_fraction)}


def test_the_global_batch_is_the_same_row_for_row_at_every_world_size(
    tmp_path: Path, mixed_files: tuple[list[Path], list[str]]
) -> None:
    config = config_of(tmp_path, *mixed_files[0])
    alone = list(global_batches(config, 1, epochs=1))
    assert len(alone) > 20
    for world in (2, 4, 8):
        assert_same(alone, list(global_batches(config, world, epochs=1)))


def test_two_datasets_keep_all_their_tokens_when_mixed(tmp_path: Path, register: Register) -> None:
    texts = {"A": texts_of("a", 90), "B": texts_of("b", 150, words=20)}
    files = {name: [write_jsonl(tmp_path / f"{name}.jsonl", values)] for name, values in texts.items()}
    config = register((0.3, 0.7), files, n_streams=2)
    with opened(config, rows=2, epochs=1) as data:
        for v in range(2):
            tokens: dict[str, list[int]] = {"A": [], "B": []}
            row = np.zeros(T + 1, dtype=np.int64)
            while (drawn := data._streams[v].next_row(row)) != (0, 0):
                stream = tokens[config.current_datasets[drawn[0]]]
                assert not stream or stream[-1] == row[0]
                stream += row[: drawn[1]].tolist()[1 if stream else 0 :]
            for source in data.sources:
                expected = texts_in(DocumentStream(source, config, v, 2, epochs=1))
                assert split_documents(tokens[source.name]) == expected


def test_a_row_s_last_target_is_the_next_row_s_first_input_and_only_the_last_row_is_short(tmp_path: Path) -> None:
    config = config_of(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts_of("d", 50)), n_streams=1)
    packed = PackedSource(DocumentStream(resolve_source("LOCAL", config), config, 0, 1, 1), BYTES, T)
    row, rows = np.zeros(T + 1, dtype=np.int64), []
    while n := packed.next_row(row):
        rows.append(row[:n].tolist())
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(rows))
    assert {len(row) for row in rows[:-1]} == {T + 1}
    assert 2 <= len(rows[-1]) <= T + 1
    assert packed.next_row(row) == 0


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 5000])
def test_one_document_gives_all_its_tokens_at_any_context_length(tmp_path: Path, length: int) -> None:
    text = "one long document " * 40
    config = config_of(tmp_path, write_jsonl(tmp_path / "a.jsonl", [text]), n_streams=1, val_fraction=1e-9)
    with opened(config, rows=1, epochs=1, length=length) as data:
        batches = list(data)
    assert tokens_of_streams(batches, 1) == [[EOT, *text.encode()]]
    assert len(batches) == -(-len(text) // length)


def test_a_document_of_megabytes_is_one_document(tmp_path: Path) -> None:
    text = "a long story " * 200_000
    texts = ["short", text, "shorter"]
    paths = [write_jsonl(tmp_path / "a.jsonl", texts)]
    config = config_of(tmp_path, *paths, n_streams=1, val_fraction=1e-9)
    with opened(config, rows=64, length=1024, epochs=1) as data:
        assert sum(batch.n_targets for batch in data) == len("".join(trained_on(texts))) + 1
    assert text in trained_on(texts)


def test_end_of_text_written_in_a_document_is_ordinary_text(tmp_path: Path) -> None:
    texts = [f"before {END_OF_TEXT} after {END_OF_TEXT}{i}" for i in range(20)]
    config = config_of(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), n_streams=1, val_fraction=1e-9)
    gpt2 = load_tiktoken("gpt2", str(tmp_path))
    with opened(config, rows=1, epochs=1, tokenizer=gpt2) as data:
        (tokens,) = tokens_of_streams(list(data), 1)
    assert tokens.count(gpt2.eot_id) == len(trained_on(texts))
    parts = gpt2.decode(tokens).split(END_OF_TEXT + "before")[1:]
    assert sorted("before" + part for part in parts) == sorted(trained_on(texts))


def pieces_of(*files: Path) -> list[list[str]]:
    """The documents of each file."""
    source = resolve_source("LOCAL", config_of(files[0].parent, *files))
    pieces = [texts_in(t for c in read_chunks(source, i, 0, 1, 0) for t in c) for i in range(len(files))]
    assert sum(map(len, pieces)) == source.documents
    return pieces


LINES = [f"line {i} of a book, with some words é\n" + "\n" * (i % 7 == 0) for i in range(12_000)]
TEXTS = {
    "a book": "".join(LINES),
    "a short story": "".join(LINES[:1000]),
    "a page": "".join(LINES[:120]),
    "no blank lines": "".join(line.strip() + "\r\n" for line in LINES[:1000]),
    "one line": "wörds " * 9_000,
    "no spaces": "漢字" * 9_000,
    "a line among others": "".join(LINES[:500]) + "word " * 9_000 + "\n" + "".join(LINES[:500]),
    "byte order marks": "\ufeff" * 9_000,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_file_is_cut_into_pieces_that_join_to_it_again(tmp_path: Path, kind: str) -> None:
    text = TEXTS[kind]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # its byte order mark is no text
    (pieces,) = pieces_of(tmp_path / "a.txt")
    assert "".join(pieces) == text
    size = min(16 * 1024, max(512, len(text.encode()) // 100))
    assert all(len(piece.encode()) < 6 * size for piece in pieces)
    assert 8 <= len(pieces) <= 100
    if kind in ("a book", "a short story", "a page", "no blank lines"):
        assert all(piece.endswith("\n") for piece in pieces)
    if kind in ("a book", "a short story"):
        assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    if kind == "one line":
        assert all(piece.endswith(" ") for piece in pieces)


def test_a_few_text_files_are_cut_and_of_a_hundred_only_the_long(tmp_path: Path) -> None:
    files = [tmp_path / f"{i:03d}.txt" for i in range(100)]
    for i, file in enumerate(files):
        file.write_text(f"text {i}\n\n" * 700)
    files[7].write_text("long\n\n" * 90_000)
    assert [len(pieces) == 1 for pieces in pieces_of(*files)] == [i != 7 for i in range(100)]
    few = pieces_of(*files[10:30])
    assert all(len(pieces) > 3 for pieces in few)
    assert ["".join(pieces) for pieces in few] == [file.read_text() for file in files[10:30]]


@pytest.mark.parametrize("n", [2, 9, 100, 900])
@pytest.mark.parametrize("val_fraction", [1e-9, 0.05, 0.4999])
def test_of_a_few_documents_some_are_held_out_and_some_trained_on(tmp_path: Path, n: int, val_fraction: float) -> None:
    """The same at any number of streams; a copy of a document stays with it."""
    for name in "abc":
        texts = texts_of(name, n)
        texts += [min(texts, key=document_hash), max(texts, key=document_hash)]
        config = config_of(tmp_path, write_jsonl(tmp_path / f"{name}.jsonl", texts), val_fraction=val_fraction)
        held_out, trained = (documents_of(config, held_out=which) for which in (True, False))
        assert held_out
        assert trained
        assert Counter(held_out + trained) == Counter(texts)
        assert not set(held_out) & set(trained)
        if n > 100:
            assert set(held_out) == {t for t in texts if is_held_out(t, val_fraction)} or val_fraction == 1e-9


def test_the_packaged_datasets_are_split_by_the_hash_of_the_text_alone(tmp_path: Path) -> None:
    for name, n in (("SOTU", 249), ("WIKI", 10_033)):
        source = resolve_source(name, DataConfig())
        assert source.documents == n
        for config in (DataConfig(val_fraction=0.05), DataConfig(val_fraction=1e-9)):
            both = [texts_in(DocumentStream(source, config, 0, 1, 1, held_out)) for held_out in (False, None)]
            assert Counter(both[0]) == Counter(t for t in both[1] if document_hash(t) >= config.val_fraction * 2**64)
            assert len(both[1]) == n


@pytest.mark.parametrize("n_shares", [1, 2, 3, 5, 8, 16])
def test_the_shares_of_one_file_are_all_its_rows_once_and_can_begin_at_any_chunk(tmp_path: Path, n_shares: int) -> None:
    texts = texts_of("d", 1300, words=2)
    files = [
        write_jsonl(tmp_path / "a.jsonl", texts),
        write_jsonl(tmp_path / "b.jsonl.gz", texts),
        write_parquet(tmp_path / "c.parquet", texts, rows_per_group=101),
        write_parquet(tmp_path / "d.parquet", texts, rows_per_group=601),
        write_parquet(tmp_path / "e.parquet", texts, rows_per_group=9),
    ]
    n_groups = (0, 0, 13, 3, 145)
    source = resolve_source("LOCAL", config_of(tmp_path, *files))
    for file in range(len(files)):
        shares = [list(read_chunks(source, file, share, n_shares, 0)) for share in range(n_shares)]
        assert Counter(t for chunks in shares for chunk in chunks for t in chunk) == Counter(texts)
        for share, chunks in enumerate(shares):
            for start in range(len(chunks) + 1):
                again = list(read_chunks(source, file, share, n_shares, start))
                assert again == chunks[start:]
        lengths = [sum(len(chunk) for chunk in chunks) for chunks in shares]
        if n_groups[file] < 8 * n_shares:  # not dealt out by row groups
            assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "parquet, a group each"])
@pytest.mark.parametrize("n_streams", [4, 5, 16])
@pytest.mark.parametrize("period", [2, 3, 4])
def test_records_in_turns_as_questions_and_answers_are_in_all_streams(
    tmp_path: Path, suffix: str, n_streams: int, period: int
) -> None:
    """Were they dealt out one by one, a stream of questions alone would be through them many times."""
    answers = ["because {0} " * 30] * (period - 1)
    texts = [text.format(i) for i in range(2400 // period) for text in ("why {0}?", *answers)]
    if suffix == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl", texts)
    else:
        path = write_parquet(tmp_path / "a.parquet", texts, rows_per_group=1 if "each" in suffix else 1200)
    source = resolve_source("LOCAL", config_of(tmp_path, path))
    for share in range(n_streams):
        its = texts_in(t for chunk in read_chunks(source, 0, share, n_streams, 0) for t in chunk)
        assert sum(t.startswith("why") for t in its) / len(its) == pytest.approx(1 / period, abs=0.12)
    with opened(config_of(tmp_path, path, n_streams=n_streams, val_fraction=0.001)) as data:
        for sample in (350, 400, 480, 500):  # one of each 7, 6 or 5
            told = data.tokens_per_epoch(sample)["LOCAL"]
            assert told == pytest.approx(sum(len(text.encode()) + 1 for text in trained_on(texts)), rel=0.12)


def test_which_rows_are_a_shares_is_for_ever_the_same() -> None:
    """If it has to change: STATE_FORMAT and shards.FORMAT too, or a resume would lose rows and repeat others."""
    assert [row_of(turn, 0, 16) for turn in range(8)] == [0, 18, 39, 51, 71, 94, 102, 119]


def test_of_a_file_with_any_period_a_share_has_every_part_alike() -> None:
    for n_shares, period in itertools.product([*range(1, 40), *range(490, 520)], range(2, 6)):
        parts = Counter(row_of(turn, 1, n_shares) % period for turn in range(500))
        for part in range(period):
            assert parts[part] / 500 == pytest.approx(1 / period, abs=0.1), f"{n_shares} shares, period {period}"


@pytest.mark.parametrize("large", ["a large file beside it", "full row groups before it"])
def test_a_small_share_of_the_text_is_not_a_stream_of_its_own(tmp_path: Path, large: str) -> None:
    small, many = [f"small {i}" for i in range(3)], [f"large {i}" for i in range(700)]
    if large.startswith("full"):
        files = [write_parquet(tmp_path / "a.parquet", many + small, rows_per_group=100)]  # 8 groups, 8 streams
    else:
        files = [write_jsonl(tmp_path / "a.jsonl", small), write_jsonl(tmp_path / "b.jsonl", many)]
    config = config_of(tmp_path, *files, n_streams=8 if len(files) == 1 else 2, val_fraction=1e-9)
    with opened(config, rows=64) as data:
        text = "".join(BYTES.decode(next(data).inputs.ravel()) for _ in range(20))
    assert 0 < text.count("small") < 0.03 * text.count("large")


def test_half_a_surrogate_pair_and_a_million_spaces_are_texts_like_any_other(tmp_path: Path) -> None:
    texts = ["half \ud800 a pair", "x" + " " * 1_500_000 + "y"]
    lowest = min(map(document_hash, texts))
    texts.append(next(text for text in map(str, range(1000)) if document_hash(text) < lowest))  # it is held out
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    with opened(config_of(tmp_path, path, n_streams=1, val_fraction=1e-9), rows=64, length=1024, epochs=1) as data:
        assert sum(b.n_targets for b in data) == 1_500_002 + len("half \ufffd a pair".encode()) + 1


def test_a_folder_may_hold_a_folder_with_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "f/x.txt").mkdir(parents=True)
    (tmp_path / "f/x.txt/y.txt").write_text("hello")
    assert documents_of(config_of(tmp_path, tmp_path / "f", val_fraction=1e-9)) == ["hello"]


def test_a_folder_and_a_file_in_it_are_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    file = write_jsonl(folder / "deep/er/a.jsonl", texts_of("d", 30))
    (folder / "notes.md").write_text("not data")
    config = config_of(tmp_path, folder, file, folder / "deep", n_streams=1)
    assert resolve_source("LOCAL", config).files == (str(file),)
    assert len(documents_of(config)) + len(documents_of(config, held_out=True)) == 30


# ---- resume -------------------------------------------------------------------------------------

STEPS = (0, 1, 2, 7, 30, 61, 62, 95)  # batches before the stop; an epoch is about 55


@pytest.fixture
def two_datasets(tmp_path: Path, register: Register) -> DataConfig:
    """Parquet and JSON lines, 0.6 and 0.4, for 4 streams."""
    a = [write_parquet(tmp_path / f"{k}.parquet", texts_of(f"a{k}x", 70), rows_per_group=9) for k in range(3)]
    b = [write_jsonl(tmp_path / f"{k}.jsonl.gz", texts_of(f"b{k}x", 50)) for k in range(5)]
    return register((0.6, 0.4), {"A": a, "B": b}, n_streams=4)


def after(config: DataConfig, state: dict[str, Any], n: int, **more: Any) -> tuple[list[Batch], dict[str, Any]]:
    """n batches behind a state that went through JSON, and the state after them."""
    with opened(config, rows=8, **more) as data:
        data.load_state_dict(json.loads(json.dumps(state)))
        return list(itertools.islice(data, n)), data.state_dict()


@pytest.fixture
def run(two_datasets: DataConfig) -> tuple[list[Batch], list[dict[str, Any]]]:
    """A run's 100 batches, and the states before the first and after each."""
    with opened(two_datasets, rows=8) as data:
        states, batches = [data.state_dict()], []
        for batch in itertools.islice(data, 100):
            batches.append(batch)
            states.append(data.state_dict())
    return batches, states


def test_a_resumed_run_gives_the_same_next_batches_bit_for_bit_in_any_epoch(
    two_datasets: DataConfig, run: tuple[list[Batch], list[dict[str, Any]]]
) -> None:
    batches, states = run
    epochs = [max(source[0] for stream in state["streams"].values() for source in stream) for state in states]
    assert epochs[STEPS[1]] == 0
    assert epochs[STEPS[-1]] >= 1
    for k in STEPS:
        resumed, state = after(two_datasets, states[k], 4)
        assert_same(resumed, batches[k : k + 4])
        assert state == states[k + 4]


def test_a_run_resumed_again_and_again_gives_the_same_batches_as_one_never_stopped(
    two_datasets: DataConfig, run: tuple[list[Batch], list[dict[str, Any]]]
) -> None:
    batches, states = run
    state, got = states[0], []
    for n in (1, 2, 3, 1, 5, 8, 13, 21, 0, 34):
        more, state = after(two_datasets, state, n)
        got += more
    assert_same(got, batches[: len(got)])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_run_can_go_on_at_another_world_size(
    two_datasets: DataConfig, run: tuple[list[Batch], list[dict[str, Any]]], world: int
) -> None:
    batches, states = run
    for k in (3, 62):
        merged = states[k]
        for size in (world, 4, 1, 2):  # each continues what the one before left, for two batches
            ranks = [after(two_datasets, merged, 2, rank=r, world=size) for r in range(size)]
            streams = {v: s for _, state in ranks for v, s in state["streams"].items()}  # as train.py does
            merged = {**ranks[0][1], "streams": streams}
            joined = [join([part[i] for part, _ in ranks], 4) for i in range(2)]
            assert_same(joined, batches[k : k + 2])
            k += 2


def test_the_state_is_that_of_the_batch_delivered_not_of_those_read_ahead(
    two_datasets: DataConfig, run: tuple[list[Batch], list[dict[str, Any]]]
) -> None:
    batches, states = run
    with opened(two_datasets, rows=8) as data:
        for k in range(4):
            assert data.state_dict() == states[k]
            next(data)
            deadline = time.monotonic() + 5
            while not data._queue.full() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert data._queue.full()
        assert data.state_dict() == states[4]
        data.close()
        assert data.state_dict() == states[4]
    assert_same(after(two_datasets, states[4], 3)[0], batches[4:7])


def test_a_last_epoch_ends_the_same_after_a_resume(two_datasets: DataConfig) -> None:
    with opened(two_datasets, rows=8, epochs=1) as data:
        states, batches = [data.state_dict()], []
        for batch in data:
            batches.append(batch)
            states.append(data.state_dict())
    assert any((batch.targets == prepare_data.IGNORED).any() for batch in batches)
    for k in (1, len(batches) // 2, len(batches) - 3, len(batches) - 1, len(batches)):
        assert_same(after(two_datasets, states[k], 1000, epochs=1)[0], batches[k:])


def test_the_iterator_stays_at_its_end(two_datasets: DataConfig) -> None:
    with opened(two_datasets, rows=8, epochs=1) as data:
        assert sum(1 for _ in data) > 10
        assert [next(data, None) for _ in range(5)] == [None] * 5


def test_a_state_of_16_streams_and_two_datasets_takes_less_than_20_kilobytes(
    tmp_path: Path, register: Register
) -> None:
    files = {n: [write_jsonl(tmp_path / f"{n}{k}.jsonl", texts_of(f"{n}{k}", 40)) for k in range(16)] for n in "AB"}
    with opened(register((0.5, 0.5), files, n_streams=16), rows=16) as data:
        for _ in range(20):
            next(data)
        assert len(json.dumps(data.state_dict())) < 20_000


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "seed"),
    "streams": ({"n_streams": 8}, "n_streams"),
    "split": ({"val_fraction": 0.1}, "val_fraction"),
    "samples": ({"max_samples": 77}, "max_samples"),
    "mixing": ({"mix_by": "documents"}, "mix_by"),
    "shares": ({"dataset_probabilities": (0.5, 0.5)}, "probabilities"),
}


@pytest.mark.parametrize(("change", "named"), CHANGES.values(), ids=list(CHANGES))
def test_a_state_refuses_other_settings_and_names_them(
    two_datasets: DataConfig, change: dict[str, Any], named: str
) -> None:
    with opened(two_datasets, rows=8) as data:
        next(data)
        state = json.loads(json.dumps(data.state_dict()))
    with opened(dataclasses.replace(two_datasets, **change), rows=8) as other:
        with pytest.raises(StateMismatch, match=rf": {named} changed") as error:
            other.load_state_dict(state)
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)


def test_a_state_refuses_another_context_length_tokenizer_files_and_format(
    tmp_path: Path, two_datasets: DataConfig
) -> None:
    with opened(two_datasets, rows=8) as data:
        state = json.loads(json.dumps(data.state_dict()))
    with opened(two_datasets, rows=8, length=T + 1) as data, pytest.raises(StateMismatch, match="max_length changed"):
        data.load_state_dict(state)
    other = Tokenizer("other", BPE_PATTERN, [bytes([255 - i]) for i in range(256)], {END_OF_TEXT: 256})
    with opened(two_datasets, rows=8, tokenizer=other) as data:
        with pytest.raises(StateMismatch, match="tokenizer changed"):
            data.load_state_dict(state)
    with opened(two_datasets, rows=8) as data, pytest.raises(StateMismatch, match="order of documents"):
        data.load_state_dict({**state, "format": 0})
    write_parquet(tmp_path / "1.parquet", texts_of("a1x", 71), rows_per_group=9)
    with opened(two_datasets, rows=8) as data, pytest.raises(StateMismatch, match=": files of A changed"):
        data.load_state_dict(state)


def test_a_state_of_a_later_pass_refuses_fewer_epochs(two_datasets: DataConfig) -> None:
    with opened(two_datasets, rows=8, epochs=3) as data:
        while any(source[0] < 1 for stream in data.state_dict()["streams"].values() for source in stream):
            next(data)
        state = json.loads(json.dumps(data.state_dict()))
    with opened(two_datasets, rows=8, epochs=1) as data:
        with pytest.raises(StateMismatch, match=r"a later pass over [AB] already; use more --train.epochs"):
            data.load_state_dict(state)
    with opened(two_datasets, rows=8, epochs=3) as data:
        data.load_state_dict(state)
        next(data)


def test_a_state_refuses_the_same_datasets_in_another_order_and_missing_streams(
    tmp_path: Path, register: Register
) -> None:
    files = {n: [write_jsonl(tmp_path / f"{n}.jsonl", texts_of(n, 90))] for n in "AB"}
    with opened(register((0.5, 0.5), files)) as data:
        state = json.loads(json.dumps(data.state_dict()))
    with opened(register((0.5, 0.5), dict(reversed(files.items())))) as data:
        with pytest.raises(StateMismatch, match="datasets"):
            data.load_state_dict(state)
    del state["streams"]["3"]
    with opened(register((0.5, 0.5), files)) as data, pytest.raises(StateMismatch, match="streams it holds"):
        data.load_state_dict(state)


def test_a_state_fits_the_same_files_in_another_folder(tmp_path: Path) -> None:
    texts = texts_of("d", 60)
    first, second = (config_of(tmp_path, write_jsonl(tmp_path / f / "a.jsonl", texts)) for f in ("here", "there"))
    with opened(first, rows=8) as data:
        state, batches = data.state_dict(), list(itertools.islice(data, 2))
    assert_same(after(second, state, 2)[0], batches)


# ---- mixing -------------------------------------------------------------------------------------


@pytest.fixture
def short_and_long(tmp_path: Path, register: Register) -> Register:
    """Two datasets of which one has documents ten times as long; they begin with s and l."""
    short = [f"s{i:05d}".ljust(60, "-") for i in range(800)]
    long = [f"l{i:05d}".ljust(600, "=") for i in range(400)]
    paths = {n: [write_jsonl(tmp_path / f"{n}.jsonl", t)] for n, t in (("SHORT", short), ("LONG", long))}
    return lambda probabilities, **changes: register(probabilities, paths, n_streams=4, **changes)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_shares_of_tokens_are_the_probabilities_however_long_the_documents(
    short_and_long: Register, share: float
) -> None:
    with opened(short_and_long((share, 1 - share)), rows=64) as data:
        batches = list(itertools.islice(data, 60))
    mix = np.sum([mix_of(batch) for batch in batches], axis=0)
    assert abs(mix[0] / mix.sum() - share) < 0.005
    assert all(mix_of(batch).min() > 0 for batch in batches), "a batch without one of the datasets"
    counted = sum(int((batch.inputs == ord("-")).sum()) for batch in batches)
    assert counted / mix.sum() == pytest.approx(share * 54 / 61, rel=0.02)  # 54 of a short one's 61 tokens


def test_shares_of_documents_are_the_probabilities_when_mixed_by_documents(short_and_long: Register) -> None:
    with opened(short_and_long((0.7, 0.3), mix_by="documents"), rows=64) as data:
        batches = list(itertools.islice(data, 120))
        told = data.mix()
    assert told["SHORT"] == pytest.approx(0.7, abs=0.02)  # in documents, as asked
    after_eot = [t for batch in batches for t in batch.targets[batch.inputs == EOT].tolist()]
    share = after_eot.count(ord("s")) / len(after_eot)
    assert len(after_eot) > 1000
    assert set(after_eot) == {ord("s"), ord("l")}
    assert abs(share - 0.7) < 0.005


def test_the_others_go_on_when_a_dataset_is_used_up(tmp_path: Path, register: Register) -> None:
    small, large = texts_of("a", 20), texts_of("b", 300)
    files = {"A": [write_jsonl(tmp_path / "a.jsonl", small)], "B": [write_jsonl(tmp_path / "b.jsonl", large)]}
    config = register((0.5, 0.5), files, n_streams=2, val_fraction=1e-9)
    with opened(config, rows=8, epochs=1) as data:
        batches = list(data)
    sizes = [
        sum(len(t.encode()) + 1 for t in trained_on(texts)) - 2 for texts in (small, large)
    ]  # 2 streams, whose first
    assert np.sum([mix_of(batch) for batch in batches], axis=0).tolist() == sizes  # token is no target
    assert mix_of(batches[0]).min() > 0
    assert mix_of(batches[-1])[0] == 0
    assert sum(batch.n_targets for batch in batches) == sum(sizes)


def test_the_others_keep_their_proportions_when_a_dataset_is_used_up(tmp_path: Path, register: Register) -> None:
    sizes = {"A": 100, "B": 8000, "C": 900}
    files = {n: [write_jsonl(tmp_path / f"{n}.jsonl", texts_of(n, k))] for n, k in sizes.items()}
    with opened(register((0.5, 0.45, 0.05), files, n_streams=1), rows=8, epochs=1) as data:
        later = np.sum([mix_of(batch, 3) for batch in itertools.islice(data, 200, 700)], axis=0)
    assert later[0] == 0
    assert later[1] / later.sum() == pytest.approx(0.9, abs=0.005)


# ---- order --------------------------------------------------------------------------------------


@pytest.fixture
def ordered(tmp_path: Path) -> DataConfig:
    texts = texts_of("d", 600, words=2)
    files = [write_jsonl(tmp_path / f"{k}.jsonl", texts[k::3]) for k in range(3)]
    return config_of(tmp_path, *files)


def test_the_order_is_that_of_the_seed(ordered: DataConfig) -> None:
    first = documents_of(ordered)
    assert documents_of(ordered) == first
    other = documents_of(dataclasses.replace(ordered, seed=ordered.seed + 1))
    assert other != first
    assert sorted(other) == sorted(first)
    number = {text: i for i, text in enumerate(sorted(first))}
    moved = sum(abs(number[text] - i) for i, text in enumerate(first)) / len(first)
    assert moved > len(first) / 10, "hardly shuffled"


@pytest.mark.parametrize("max_samples", [0, 90])
def test_each_epoch_has_the_same_documents_in_another_order(ordered: DataConfig, max_samples: int) -> None:
    config = dataclasses.replace(ordered, max_samples=max_samples)
    total = 0
    for v in range(V):
        drawn = documents_of(config, v, V, epochs=3)
        n = len(drawn) // 3
        epochs = [drawn[:n], drawn[n : 2 * n], drawn[2 * n :]]
        assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(sorted(epochs[0]))}
        assert len({tuple(epoch) for epoch in epochs}) == 3
        total += n
    assert total == pytest.approx(0.8 * (max_samples or 600), rel=0.15)


def test_max_samples_counts_documents_of_a_dataset_before_the_split(ordered: DataConfig) -> None:
    for max_samples in (1, 8, 9, 255, 599, 600, 601):
        config = dataclasses.replace(ordered, max_samples=max_samples)
        read = 0
        for v in range(V):
            for held_out in (False, True):
                with contextlib.suppress(EmptyStream):  # fewer samples than streams
                    read += len(documents_of(config, v, V, held_out=held_out))
        assert read == min(max_samples, 600)


# ---- held out -------------------------------------------------------------------------------------


def test_no_held_out_document_is_trained_on_in_any_epoch(
    tmp_path: Path, mixed_files: tuple[list[Path], list[str]]
) -> None:
    config = config_of(tmp_path, *mixed_files[0])
    with opened(config) as data:
        held_out = set(
            split_documents(np.concatenate([r[:-1] for r in data.validation_rows()["LOCAL"].rows]).tolist())[:-1]
        )
    streams = tokens_of_streams(list(global_batches(config, 1, epochs=4)))
    trained = {text for tokens in streams for text in split_documents(tokens)}
    assert len(held_out) > 20
    assert len(trained) > 200
    assert not held_out & trained


def test_held_out_rows_are_mapped_from_disk_and_the_same_for_every_process(
    tmp_path: Path, mixed_files: tuple[list[Path], list[str]]
) -> None:
    made = []
    for i, world in enumerate((1, 2, 8)):
        config = config_of(tmp_path, *mixed_files[0], cache_dir=str(tmp_path / f"cache {i}"))
        with opened(config, rank=world - 1, world=world) as data:
            rows = data.validation_rows()["LOCAL"].rows
            assert isinstance(rows, np.memmap)
            assert rows.dtype == np.uint32
            assert rows.shape[1] == T + 1
            made.append(np.array(rows))
    assert len(made[0]) > 20
    assert np.array_equal(made[0], made[1])
    assert np.array_equal(made[0], made[2])
    assert np.array_equal(made[0][:-1, -1], made[0][1:, 0])


def test_held_out_rows_are_made_again_where_they_cannot_be_kept(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts_of("d", 200))
    config = config_of(tmp_path, path)
    with opened(config) as data:
        rows, tokenizer = data.validation_rows()["LOCAL"].rows, data.tokenizer
    nowhere = dataclasses.replace(config, cache_dir=str(path / "cache"))  # as on a laptop, of a run on a box
    with opened(nowhere, tokenizer=tokenizer) as data:
        assert np.array_equal(data.validation_rows()["LOCAL"].rows, rows)


def test_held_out_rows_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts_of("d", 200))
    config = config_of(tmp_path, path)
    with opened(config) as data, opened(config) as other:
        rows = np.array(data.validation_rows()["LOCAL"].rows)
        path.unlink()
        assert np.array_equal(data.validation_rows()["LOCAL"].rows, rows)
        assert np.array_equal(other.validation_rows()["LOCAL"].rows, rows)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npy"]


def test_files_with_other_text_of_the_same_length_have_other_held_out_rows(tmp_path: Path) -> None:
    rows = []
    for letter in "xy":
        path = write_jsonl(tmp_path / "a.jsonl", [f"{letter * 20} {i:03d}" for i in range(200)])
        with opened(config_of(tmp_path, path)) as data:
            rows.append(data.validation_rows()["LOCAL"].rows.tolist())
    assert rows[0] != rows[1]


def test_there_are_at_most_val_tokens_of_held_out_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts_of("d", 300))
    for val_tokens, n_rows in ((1, 1), (T, 1), (10 * T, 10), (10 * T + T - 1, 10)):
        with opened(config_of(tmp_path, path, val_tokens=val_tokens)) as data:
            assert len(data.validation_rows()["LOCAL"].rows) == n_rows


def test_rows_of_every_seed_are_of_all_held_out_documents_at_equal_distances_each_text_once(
    tmp_path: Path, mixed_files: tuple[list[Path], list[str]]
) -> None:
    files, texts = mixed_files
    in_order = sorted({t for t in texts if t and is_held_out(t, 0.2)}, key=document_hash)
    ids = np.concatenate([encode(text, BYTES) for text in in_order])
    owners = np.repeat(np.arange(len(in_order)), [len(encode(text, BYTES)) for text in in_order])
    starts = np.arange(0, len(ids) - T, T)
    again = write_jsonl(tmp_path / "again.jsonl", texts[:50])
    for seed, val_tokens, more in ((1, 8 * T, []), (2, 8 * T, []), (1, 10**6, []), (1, 10**6, [again])):
        with opened(config_of(tmp_path, *files, *more, seed=seed, val_tokens=val_tokens)) as data:
            rows, documents = data.validation_rows()["LOCAL"]
        found = [next(i for i in starts if np.array_equal(ids[i : i + T + 1], row)) for row in rows]
        assert len(found) == min(len(starts), val_tokens // T)
        assert np.ptp(np.diff(found)) <= T
        assert abs(found[0] - (starts[-1] - found[-1])) <= T
        assert np.array_equal(documents - 1, np.stack([owners[i : i + T] for i in found]))


def test_of_a_large_dataset_only_the_beginning_is_read_for_its_held_out_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts_of("d", 3000))
    read: list[int] = []

    class Counted(DocumentStream):
        def _read_chunk(self, file: int, chunk: int) -> Any:
            read.append(chunk)
            return super()._read_chunk(file, chunk)

    monkeypatch.setattr(prepare_data, "DocumentStream", Counted)
    chunks, rows = [], []
    for i, (limit, seed) in enumerate(((10**9, 1), (0, 1), (0, 2))):
        monkeypatch.setattr(prepare_data, "_LOOKED_THROUGH", limit)
        read.clear()
        config = config_of(tmp_path, path, val_tokens=4 * T, cache_dir=str(tmp_path / str(i)), seed=seed)
        with opened(config) as data:
            rows.append(data.validation_rows()["LOCAL"].rows.tolist())
        chunks.append(max(read))
    assert chunks[0] > 4
    assert max(chunks[1:]) <= 1
    assert list(map(len, rows)) == [4, 4, 4]
    assert rows[0] != rows[1] == rows[2]


def test_the_trained_tokenizer_is_the_same_for_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_data, "_BPE_BYTES", 2000)  # it is trained on the first of many documents
    path = write_jsonl(tmp_path / "a.jsonl", texts_of("d", 3000))
    fingerprints = set()
    for seed in (1, 2):
        config = config_of(
            tmp_path, path, seed=seed, tokenizer="bpe", bpe_vocab_size=300, cache_dir=str(tmp_path / f"{seed}")
        )
        with opened(config, tokenizer=None) as data:
            fingerprints.add(data.tokenizer.fingerprint)
    assert len(fingerprints) == 1


# ---- mistakes, each told in one line ------------------------------------------------------------


def read_for_ever(config: DataConfig) -> None:
    with opened(config) as data:
        for _ in data:
            pass


def read_one_epoch(config: DataConfig) -> None:
    with opened(config, epochs=1) as data:
        for _ in data:
            pass


def complaint(config: DataConfig, kind: type[Exception], read: Callable[[DataConfig], Any] = read_for_ever) -> str:
    """The one line of stderr, with exit code 3, that comes of reading this."""
    with pytest.raises(DataError) as error:
        read(config)
    assert type(error.value) is kind
    message = " ".join(str(error.value).split())  # as exit_code_of does

    def fail() -> None:
        raise error.value

    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert exit_code_of(fail) == 3
    assert stderr.getvalue() == f"error: {message}\n"
    assert len(message) < 600
    return message


def broken(tmp_path: Path, name: str) -> Path:
    """A file of 100 documents that is damaged as its name says."""
    texts, path = texts_of("d", 100), tmp_path / name
    if name == "cut.parquet":
        write_parquet(path, texts, 10)
        path.write_bytes(path.read_bytes()[:-30])
    elif name == "empty.parquet":
        path.touch()
    elif name == "nonsense.parquet":
        path.write_text("not parquet at all, just a text under that name")
    elif name == "latin1.txt":
        path.write_bytes("naïve café\n".encode("latin-1"))
    elif name == "latin1.parquet":  # Arrow takes any bytes for a string when it writes, and when it reads
        pq.write_table(pa.table({"text": pa.array([b"na\xefve"] * 9).view(pa.string())}), path)
    elif name == "latin1.jsonl":
        write_jsonl(path, texts[:7])
        path.write_bytes(path.read_bytes() + b'{"text": "na\xefve"}\n')
    elif name == "half a line.jsonl":
        write_jsonl(path, texts[:7])
        path.write_bytes(path.read_bytes() + b'{"text": "half a li')
    elif name == "list.jsonl":
        path.write_text('["text", "in a list"]\n' * 20)
    elif name == "cut.jsonl.gz":
        write_jsonl(path, texts)
        path.write_bytes(path.read_bytes()[:-40])
    elif name == "plain.jsonl.gz":
        path.write_text("not gzipped")
    elif name == "footer.parquet":
        content = write_parquet(path, texts, 10).read_bytes()
        path.write_bytes(content[:-400] + b"\xff" * 100 + content[-300:])
    elif name == "schema.parquet":  # what Arrow adds to the footer, in base64
        content = write_parquet(path, texts, 10).read_bytes()
        path.write_bytes(content.replace(b"/////", b"!////", 1))
    elif name == "page.parquet":
        content = write_parquet(path, texts, 1000).read_bytes()
        path.write_bytes(content[:4] + b"\xff" * 1000 + content[1004:])
    elif name.endswith("texts.jsonl"):
        write_jsonl(path, ["a text", 5 if name == "number texts.jsonl" else ["a", "b"]])
    elif name.endswith("texts.parquet"):
        pq.write_table(pa.table({"text": [1, 2] if name == "number texts.parquet" else [b"a", b"b"]}), path)
    return path


BROKEN: dict[str, tuple[type[Exception], str]] = {
    "cut.parquet": (CorruptRecord, "truncated"),
    "empty.parquet": (CorruptRecord, "truncated"),
    "nonsense.parquet": (CorruptRecord, "not a parquet file"),
    "latin1.txt": (CorruptRecord, "not UTF-8 text at byte 2; convert it"),
    "latin1.parquet": (CorruptRecord, "row group 0, has a text that is not UTF-8"),
    "latin1.jsonl": (CorruptRecord, "record 8, is not JSON"),
    "half a line.jsonl": (CorruptRecord, "record 8, is not JSON"),
    "list.jsonl": (TextFieldMissing, "no field 'text'"),
    "cut.jsonl.gz": (CorruptRecord, "truncated"),
    "plain.jsonl.gz": (CorruptRecord, "Not a gzipped file"),
    "footer.parquet": (CorruptRecord, "not a parquet file, or a truncated one: Couldn't deserialize thrift"),
    "schema.parquet": (CorruptRecord, "base64"),
    "page.parquet": (CorruptRecord, "row group 0, cannot be decoded"),
    "number texts.jsonl": (CorruptRecord, "record 2, has a text that is int"),
    "list texts.jsonl": (CorruptRecord, "record 2, has a text that is list"),
    "number texts.parquet": (CorruptRecord, "has a text that is int"),
    "bytes texts.parquet": (CorruptRecord, "has a text that is bytes"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_named_with_its_fault(tmp_path: Path, name: str) -> None:
    kind, said = BROKEN[name]
    path = broken(tmp_path, name)
    message = complaint(config_of(tmp_path, path, n_streams=1), kind)
    assert str(path) in message
    assert said in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_missing_text_field_is_told_with_those_that_exist(tmp_path: Path, name: str) -> None:
    if name == "a.parquet":
        path = write_parquet(tmp_path / name, texts_of("d", 50), 10)
    else:
        path = write_jsonl(tmp_path / name, texts_of("d", 50))
    message = complaint(config_of(tmp_path, path, local_text_field="body"), TextFieldMissing)
    assert str(path) in message
    assert "'body'" in message
    assert "id, text" in message
    message = complaint(config_of(tmp_path, path, local_text_field="texts"), TextFieldMissing)
    assert "did you mean text?" in message
    assert "--data.local_text_field" in message


@pytest.mark.parametrize("texts", [[], [None, "", None]], ids=["no rows", "no text in them"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_files_without_documents_are_refused(tmp_path: Path, name: str, texts: list[Any]) -> None:
    path = write_parquet(tmp_path / name, texts, 1) if name == "a.parquet" else write_jsonl(tmp_path / name, texts)
    for read in (read_for_ever, read_one_epoch):
        message = complaint(config_of(tmp_path, path, n_streams=1), EmptyStream, read)
        assert message == "LOCAL has no documents with text in its files; give it others"


@pytest.mark.parametrize("read", [read_for_ever, read_one_epoch])
def test_fewer_documents_than_streams_are_refused_with_what_to_do(
    tmp_path: Path, read: Callable[[DataConfig], None]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts_of("d", 5))
    message = complaint(config_of(tmp_path, path, val_fraction=1e-9), EmptyStream, read)
    assert "smaller --data.n_streams, down to 1" in message
    assert "of 8" in message
    read_one_epoch(config_of(tmp_path, path, val_fraction=1e-9, n_streams=1))
    few = config_of(tmp_path, write_jsonl(tmp_path / "b.jsonl", texts_of("d", 500)), max_samples=5)
    assert "raise --data.max_samples, which is 5" in complaint(few, EmptyStream, read)


def test_a_dataset_without_held_out_documents_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", texts_of("d", 1500))

    def read(config: DataConfig) -> None:
        with opened(config) as data:
            data.validation_rows()

    message = complaint(config_of(tmp_path, path, val_fraction=1e-9), EmptyStream, read)
    assert "raise --data.val_fraction" in message
    config = config_of(tmp_path, path, val_fraction=1e-9, max_samples=2)
    assert "raise --data.max_samples, which is 2" in complaint(config, EmptyStream, read)
    path = write_jsonl(tmp_path / "b.jsonl", ["the one document"] * 3)
    message = complaint(config_of(tmp_path, path), EmptyStream, read)
    assert message == "LOCAL has no held-out documents (stream 0 of 1 read 3); use more documents"


def test_too_little_held_out_text_is_refused_with_a_length_that_works(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "b.jsonl", ["a short document", "another"])

    def read(config: DataConfig, length: int = T) -> None:
        with opened(config, length=length) as data:
            data.validation_rows()

    message = complaint(config_of(tmp_path, path), EmptyStream, read)
    assert "too little held-out text to fill a row of 32 tokens" in message
    length = int(message.rsplit(" ", 1)[1])
    read(config_of(tmp_path, path), length)
    with pytest.raises(EmptyStream):
        read(config_of(tmp_path, path), length + 1)


def test_files_that_are_not_there_or_of_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    message = complaint(config_of(tmp_path, tmp_path / "nowhere.txt"), DataError)
    assert "nowhere.txt, which does not exist" in message
    (tmp_path / "table.csv").write_text("text\nhello\n")
    message = complaint(config_of(tmp_path, tmp_path / "table.csv"), DataError)
    assert "table.csv" in message
    assert "*.txt, *.jsonl, *.jsonl.gz, *.json.gz, *.parquet" in message
    (tmp_path / "folder").mkdir()
    assert "holds none of" in complaint(config_of(tmp_path, tmp_path / "folder"), DataError)


def test_a_file_that_vanishes_during_the_run_ends_it_by_name(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{k}.jsonl", texts_of(f"d{k}x", 2000)) for k in range(2)]

    def read(config: DataConfig) -> None:
        with opened(config, rows=2) as data:
            next(data)
            for path in paths:
                path.unlink(missing_ok=True)
            for _ in range(10_000):
                next(data)

    assert "jsonl cannot be read" in complaint(config_of(tmp_path, *paths, n_streams=2), DataError, read)


def test_a_mistake_is_raised_again_when_asked_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*texts_of("d", 1500), 5])  # so many that they are not all read at first
    with opened(config_of(tmp_path, path, n_streams=1), rows=1024) as data:
        for _ in range(3):
            with contextlib.suppress(CorruptRecord):
                next(data)
        for _ in range(4):
            with pytest.raises(CorruptRecord):
                next(data)


def test_the_script_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = broken(tmp_path, "half a line.jsonl")
    options = ["--data.current_datasets", "LOCAL", "--data.dataset_probabilities", "1", "--data.n_streams", "1"]
    options += ["--data.local_files", str(path), "--data.cache_dir", str(tmp_path / "cache")]
    assert exit_code_of(lambda: prepare_data.main(options)) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert f"{path}, record 8" in lines[0]


# ---- the end ----------------------------------------------------------------------------------------


def test_close_returns_at_once_at_any_point(ordered: DataConfig) -> None:
    for n in (0, 1, 5):
        for pause in (0.0, 0.3):  # with the reader busy, and with the queue full
            with opened(ordered) as data:
                for _ in range(n):
                    next(data)
                time.sleep(pause)
                for _ in range(2):
                    started = time.monotonic()
                    data.close()
                    assert time.monotonic() - started < 2.5  # it would wait 3 for a reader that goes on


def test_a_closed_iterator_says_so(ordered: DataConfig) -> None:
    with opened(ordered) as data:
        next(data)
        data.close()
        with pytest.raises(RuntimeError, match="closed"):
            list(itertools.islice(data, 5))


def test_close_does_not_wait_for_a_read_that_never_ends(ordered: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, release = threading.Event(), threading.Event()

    def consume(data: DatasetPrep) -> None:
        with contextlib.suppress(Exception):
            next(data)

    def stuck(*_: Any, **__: Any) -> Iterator[Any]:
        reading.set()
        release.wait(30)
        yield from ()

    with opened(ordered) as data:
        monkeypatch.setattr(documents, "read_chunks", stuck)
        consumer = threading.Thread(target=consume, args=(data,), daemon=True)
        consumer.start()
        assert reading.wait(5)
        started = time.monotonic()
        data.close()
        assert time.monotonic() - started < 5
        release.set()


LEAVE_WHILE_READING = """
import collections, contextlib, sys, threading, time
from config import DataConfig
from prepare_data import DatasetPrep
from tokenizer import *
tokenizer = Tokenizer("bytes", BPE_PATTERN, [bytes([i]) for i in range(256)], {END_OF_TEXT: 256})
config = DataConfig(("LOCAL",), (1.0,), local_files=(sys.argv[1],), n_streams=2, cache_dir=sys.argv[1])
data = DatasetPrep(config, 32, 2, tokenizer=tokenizer)
next(data)
def take() -> None:
    with contextlib.suppress(RuntimeError):  # closed
        collections.deque(data, 0)
threading.Thread(target=take, daemon=True).start()
time.sleep(float(sys.argv[2]))
"""


def test_a_process_whose_reader_is_reading_exits_cleanly_ten_times_of_ten(tmp_path: Path) -> None:
    """Hardly any row has a text, so that the reader is in the middle of a row group nearly all the time."""
    write_parquet(tmp_path / "a.parquet", [None if i % 50 else f"document {i}" for i in range(20_000)], 200)
    results = []
    for i in range(0, 10, 2):  # two at a time
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", LEAVE_WHILE_READING, str(tmp_path), str(wait / 100)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for wait in (i, i + 1)
        ]
        results += [(process.communicate(timeout=100)[0], process.returncode) for process in processes]
    assert results == [("", 0)] * 10


@pytest.mark.parametrize("kind", ["two files", "one file", "many files", "row groups"])
def test_the_length_of_an_epoch_is_told_though_documents_differ_a_hundredfold(tmp_path: Path, kind: str) -> None:
    short, long = texts_of("s", 3000, words=2), texts_of("l", 150, words=600)
    if kind == "two files":
        files = [write_jsonl(tmp_path / "a.jsonl", short), write_parquet(tmp_path / "b.parquet", long, 10)]
    elif kind == "one file":
        files = [write_jsonl(tmp_path / "a.jsonl", short + long)]
    elif kind == "many files":
        files = [write_jsonl(tmp_path / f"{i}.jsonl", short[100 * i : 100 * i + 100]) for i in range(30)]
        files.insert(17, write_jsonl(tmp_path / "long.jsonl", long))
    else:
        files = [write_parquet(tmp_path / "a.parquet", short + long, 100)]
    config = config_of(tmp_path, *files, n_streams=2, val_fraction=0.001)
    truth = sum(len(text.encode()) + 1 for text in trained_on(short + long))
    with opened(config) as data:
        assert data.tokens_per_epoch()["LOCAL"] == pytest.approx(truth, rel=0.2)
    some = dataclasses.replace(config, max_samples=315)  # of 3,150, which are taken to be like all
    with opened(some) as data:
        assert data.tokens_per_epoch()["LOCAL"] == pytest.approx(truth / 10, rel=0.2)


def test_records_without_text_count_in_the_length_of_an_epoch(tmp_path: Path) -> None:
    texts = [text for text in texts_of("d", 300) for text in (text, "", "")]
    config = config_of(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), n_streams=1, val_fraction=0.001)
    with opened(config) as data:
        told = data.tokens_per_epoch()["LOCAL"]
    assert told == pytest.approx(sum(len(text.encode()) + 1 for text in trained_on(texts[::3])), rel=0.1)


def test_a_descriptions_tokens_are_gpt2s_and_another_tokenizers_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "LOCAL", dataclasses.replace(DATASETS["LOCAL"], tokens_per_document=7))
    texts = texts_of("d", 300)
    for tokenizer, length in (("gpt2", 7.0), ("bpe", sum(len(text.encode()) + 1 for text in texts) / 300)):
        config = config_of(tmp_path, write_jsonl(tmp_path / "a.jsonl", texts), n_streams=1, tokenizer=tokenizer)
        with opened(config) as data:
            assert data.tokens_per_epoch()["LOCAL"] == pytest.approx(300 * length * (1 - config.val_fraction), rel=0.02)


def test_a_preview_of_a_batch_that_the_streams_cannot_share_is_refused_with_resume_too(tmp_path: Path) -> None:
    for resume in ([], ["--resume"]):
        with pytest.raises(ConfigError, match=r"a step has 6 rows .* must divide by data.n_streams 4"):
            prepare_data.main(["--preset", "smoke", "--train.batch_size", "6", *resume])


def test_the_preview_can_show_a_batch_of_one_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)  # it looks for five seconds
    (tmp_path / "a.txt").write_text("some text " * 50)
    options = ["--preset", "smoke", "--data.current_datasets", "LOCAL", "--data.dataset_probabilities", "1"]
    options += ["--data.local_files", str(tmp_path / "a.txt"), "--data.n_streams", "1", "--train.batch_size", "1"]
    options += ["--data.cache_dir", str(tmp_path / "cache"), "--data.tokenizer", "gpt2"]
    assert prepare_data.main(options) == 0
    assert capsys.readouterr().out.count("--- row ") == 1


@pytest.mark.slow
def test_the_preview_prints_a_table_of_at_most_100_columns(tmp_path: Path) -> None:
    command = [sys.executable, "prepare_data.py", "--preset", "smoke", "--data.cache_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"COLUMNS": "80"}, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    table, *rows = done.stdout.decode().split("\n--- row ")
    assert len(rows) == 2
    assert max(map(len, table.splitlines())) <= 100
    for word in ("dataset", "SOTU", "WIKI", "tokens/s", "packing"):
        assert word in table
    assert re.search(r"SOTU (49\.9|50\.0)\d% of 50%, WIKI (49\.9|50\.0)\d% of 50%", table)
