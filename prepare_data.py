"""Documents -> rows of tokens: split, mix, tokenize, pack, prefetch; every step repeatable from a small state.

As a script it previews what the model will see:  python prepare_data.py [--preset demo]

The idea: the data is divided into `n_streams` logical streams, whatever the number of processes. Each stream is
a deterministic pipeline whose position is a few integers:

    DocumentStream  one source's documents of one stream: shuffled, held-out ones left out
    PackedSource    those documents as rows: tokenized, packed without padding
    PackedStream    the sources of one stream, taking turns row by row
    DatasetPrep     a process's streams, read ahead by a thread

Process r of W reads the streams r, r + W, r + 2W, ...; so the global batch is the same at any W that divides
n_streams, and a run can be resumed, bit for bit, at another W.

Shapes: T context length; a row is T inputs and, one further on, T targets.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import json
import math
import os
import queue
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from config import DATASETS, RUNS_OPTIONS, Config, DataConfig, load_config
from documents import DocumentStream, rng_of
from errors import ConfigError, exit_code_of
from files import whole_file, write_json
from hub import DataError, reader
from shards import write_shards
from sources import Document, EmptyStream, Source, Tokenized, digest, document_hash, read_shard_settings, resolve_source
from tokenizer import Tokenizer, load_tiktoken, train_bpe, without_surrogates

IGNORED = -1  # a target that is none: behind the last document of a run's last epoch
STATE_FORMAT = 3
_BPE_BYTES = 20_000_000  # of text that a tokenizer is trained on, at most
_LOOKED_THROUGH = 2**27  # bytes of files: all of a dataset up to this large is looked through for held-out rows


class StateMismatch(DataError):
    """A saved data position belongs to other data."""


class PackedSource:
    """A document stream as rows of tokens: end-of-text, document, end-of-text, document ... cut every T tokens.

    Nothing is padded and nothing dropped: a row's last target is the next row's first input. Between two rows,
    what is left over is the tail of the last document drawn, so that document's position and how much of it is
    used up are the state.
    """

    def __init__(self, documents: DocumentStream, tokenizer: Tokenizer, length: int):
        self.name = documents.source.name
        self.documents, self._tokenizer, self._length = documents, tokenizer, length
        self.load_state([*documents.position, -1, 0, 0])

    def load_state(self, state: Sequence[int]) -> None:
        """The inverse of `state`; reads the last document again."""
        *position, used, self.n_rows, self.n_documents = state
        self._last_position, self._last_length = position, 0
        self._tail = np.empty(0, dtype=np.uint32)
        self.documents.seek(position)
        if used >= 0:
            document = self.documents.draw()
            if document is None:
                raise StateMismatch(
                    f"the run is in a later pass over {self.name} already; use more --train.epochs, or set "
                    f"--train.max_steps"
                )
            ids = encode(document, self._tokenizer)
            self._tail, self._last_length = ids[used:], len(ids)

    @property
    def state(self) -> list[int]:
        """[position of the last document (5 integers), its tokens used (-1: none drawn yet), rows, documents]."""
        used = self._last_length - len(self._tail) if self._last_length else -1
        return [*self._last_position, used, self.n_rows, self.n_documents]

    def next_row(self, row: np.ndarray) -> int:
        """Fill row (T+1,) with the next ids; returns how many: T+1, fewer at the end of the last epoch, 0 when none.

        A single id that is left has nothing to predict: it counts as none.
        """
        tail, n = self._tail, 0
        while True:
            take = min(len(tail), len(row) - n)
            row[n : n + take] = tail[:take]
            n += take
            if n == len(row):
                self._tail = tail[take - 1 :]  # the last id is a target now and an input next
                break
            position = self.documents.position
            document = self.documents.draw()
            if document is None:
                self._tail = tail[:0]
                break
            tail = encode(document, self._tokenizer)
            self._last_position, self._last_length = position, len(tail)
            self.n_documents += 1
        if n < 2:
            return 0
        self.n_rows += 1
        return n


def encode(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    """A document's ids, with end-of-text first."""
    if isinstance(document, Tokenized):
        return document.ids
    ids = tokenizer.encode(document)
    with_eot = np.empty(len(ids) + 1, dtype=np.uint32)
    with_eot[0], with_eot[1:] = tokenizer.eot_id, ids
    return with_eot


class PackedStream:
    """The rows of one stream: each row from one source, the sources taking turns by their probabilities.

    Mixing whole rows makes the shares of tokens exact however long the documents are, and gives every batch its
    share of each source. The next row is from the source that is furthest behind: counting rows (mix_by tokens)
    or documents (mix_by documents). An exhausted source drops out and the others keep their proportions.
    """

    def __init__(self, sources: list[PackedSource], config: DataConfig, stream: int):
        self.sources = sources
        self._probabilities, self._by_tokens = config.dataset_probabilities, config.mix_by == "tokens"
        phase = rng_of(config.seed, "mix", stream)  # so that the streams do not all take the same turn
        self._phases = [phase.random() for _ in sources]

    def next_row(self, row: np.ndarray) -> tuple[int, int]:
        """Fill row (T+1,) as PackedSource does; returns (index of the source, ids filled), 0 when all are exhausted."""
        for i in sorted(range(len(self.sources)), key=self._turn):
            n = self.sources[i].next_row(row)
            if n:
                return i, n
        return 0, 0

    def _turn(self, i: int) -> float:
        source = self.sources[i]
        return (self._phases[i] + (source.n_rows if self._by_tokens else source.n_documents)) / self._probabilities[i]


@dataclass(frozen=True)
class Batch:
    """This process's part of one optimizer step: inputs and targets (rows, T) int64; IGNORED targets do not count.

    n_targets: targets that do count. sources (rows,): the index of each row's dataset.
    """

    inputs: np.ndarray
    targets: np.ndarray
    n_targets: int
    sources: np.ndarray

    def split(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(inputs, targets) of so many rows at a time."""
        for start in range(0, len(self.inputs), batch_size):
            yield self.inputs[start : start + batch_size], self.targets[start : start + batch_size]


class HeldOut(NamedTuple):
    """Packed rows (N, T+1) uint32, and of each of their targets the number of its document, (N, T).

    End-of-text as a target is of the document that it ends.
    """

    rows: np.ndarray
    documents: np.ndarray


class DatasetPrep:
    """The data of one process of a run: an iterator of Batches, read ahead by a thread.

    length: context in tokens. rows_per_step: rows of one optimizer step over all processes. epochs: passes over
    each source; None repeats for ever. tokenizer: a checkpoint's, in place of the one that config names.
    Preflight happens here: raises DataError or ConfigError.
    With several processes, let rank 0 construct it first: it trains the tokenizer and writes the held-out rows,
    which the others then find in data.cache_dir.
    """

    def __init__(
        self,
        config: DataConfig,
        length: int,
        rows_per_step: int,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
        tokenizer: Tokenizer | None = None,
    ):
        self.config, self._length, self._epochs = config, length, epochs
        self.sources = [resolve_source(name, config) for name in config.current_datasets]
        self.tokenizer = tokenizer or self._load_tokenizer()
        if tokenizer and config.shards_dir and self._tokenizer_of_shards().fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"the shards in {config.shards_dir} are made with another tokenizer than the model's; "
                f"name shards made with that one, or, in a new run, leave --data.shards_dir out"
            )
        self._rows_per_stream = rows_per_step // config.n_streams
        self._streams = {
            v: PackedStream([self._packed(source, v) for source in self.sources], config, v)
            for v in range(rank, config.n_streams, world_size)
        }
        self._delivered = self._stream_states()
        self._queue: queue.Queue[tuple[Batch, Any] | BaseException | None] = queue.Queue(maxsize=2)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.seconds_waited = 0.0  # that the training loop waited for data so far

    # ---- the iterator -------------------------------------------------------------------

    def __iter__(self) -> DatasetPrep:
        return self

    def __next__(self) -> Batch:
        """The next step's rows; StopIteration when every source's last epoch is over in this process."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, name="data", daemon=True)
            self._thread.start()
            atexit.register(self.close)  # a thread that reads while the interpreter exits can abort it
        started = time.perf_counter()
        while True:
            try:
                item = self._queue.get(timeout=0.2)
                break
            except queue.Empty:
                if self._stop.is_set():
                    raise RuntimeError("this DatasetPrep is closed") from None
        self.seconds_waited += time.perf_counter() - started
        if item is None or isinstance(item, BaseException):
            self._queue.put(item)  # asked again, it answers the same
            raise StopIteration if item is None else item
        batch, self._delivered = item
        return batch

    def _produce(self) -> None:
        reader.stop = self._stop
        try:
            while (batch := self._next_batch()) is not None:
                if not self._put((batch, self._stream_states())):
                    return
            self._put(None)
        except BaseException as error:  # shown by the thread that trains; a panic of tiktoken's is no Exception
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def empty_batch(self) -> Batch:
        """Rows without targets: for a process whose documents are used up while others still have some."""
        shape = (self._rows_per_stream * len(self._streams), self._length)
        ids, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
        return Batch(ids, targets, 0, np.zeros(shape[0], dtype=np.int64))

    def _next_batch(self) -> Batch | None:
        rows = np.zeros((self._rows_per_stream * len(self._streams), self._length + 1), dtype=np.int64)
        sources = np.zeros(len(rows), dtype=np.int64)
        counts = np.zeros(len(rows), dtype=np.int64)  # of each row's targets
        for i, stream in enumerate([*self._streams.values()] * self._rows_per_stream):
            sources[i], n = stream.next_row(rows[i])
            counts[i] = max(0, n - 1)
        inputs, targets = rows[:, :-1], rows[:, 1:]  # views of the same ids
        if counts.min() < self._length:  # a last epoch ends here
            targets = np.where(np.arange(self._length) < counts[:, None], targets, IGNORED)
        n_targets = int(counts.sum())
        return Batch(inputs, targets, n_targets, sources) if n_targets else None

    def close(self) -> None:
        """Stop reading ahead; waits for the thread, which may be in the middle of a read."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=3)

    # ---- state --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the batches delivered so far end, for the streams of this process; small, ready for JSON."""
        return {"format": STATE_FORMAT, "identity": self.identity(), "streams": self._delivered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind a saved state, which may hold the streams of more processes than this one.

        Raises StateMismatch naming what differs. Call it before the first batch.
        """
        if self._thread is not None:
            raise RuntimeError("load_state_dict comes before the first batch")
        if changed := self.changed_since(state):
            raise StateMismatch(
                f"the saved data position does not fit: {', '.join(changed)} changed; "
                f"use the data, settings and code of the saved run, start a new one with another --train.run_name, or "
                f"continue with --restart_data"
            )
        for v, stream in self._streams.items():
            for source, saved in zip(stream.sources, state["streams"][str(v)], strict=True):
                source.load_state(saved)
        self._delivered = self._stream_states()

    def changed_since(self, state: dict[str, Any]) -> list[str]:
        """What a saved state has of other data, or of other code's division of it; empty if it can go on there."""
        saved = state.get("identity", {})
        if changed := [key for key, value in self.identity().items() if saved.get(key) != value]:
            return changed
        if state.get("format") != STATE_FORMAT:
            return ["the code's order of documents"]
        fits = all(self._is_position(state["streams"].get(str(v))) for v in self._streams)
        return [] if fits else ["the streams it holds"]

    def _is_position(self, saved: Any) -> bool:
        """Whether a stream's saved state is one of PackedSource for each source."""
        return (
            isinstance(saved, list)
            and [len(state) if isinstance(state, list) else 0 for state in saved] == [8] * len(self.sources)
            and all(type(n) is int for state in saved for n in state)
        )

    def totals(self) -> dict[str, int]:
        """Rows and documents delivered by this process's streams since the run began; records without text it met."""
        states = [state for stream in self._delivered.values() for state in stream]
        empty = sum(source.documents.n_empty for stream in self._streams.values() for source in stream.sources)
        return {"rows": sum(s[-2] for s in states), "documents": sum(s[-1] for s in states), "empty": empty}

    def mix(self) -> dict[str, float]:
        """Each source's share since the run began, in this process's streams: of what data.mix_by counts."""
        which = -2 if self.config.mix_by == "tokens" else -1  # all rows have the same number of tokens
        counts = np.array([[state[which] for state in stream] for stream in self._delivered.values()]).sum(axis=0)
        return dict(zip(self.config.current_datasets, (counts / max(1, counts.sum())).tolist(), strict=True))

    def _stream_states(self) -> dict[str, list[list[int]]]:
        return {str(v): [source.state for source in stream.sources] for v, stream in self._streams.items()}

    def identity(self) -> dict[str, Any]:
        """What decides the rows and the held-out documents: the settings, the tokenizer and a hash of each source."""
        c = self.config
        return {
            "datasets": [s.name for s in self.sources],
            "n_streams": c.n_streams, "seed": c.seed, "max_length": self._length, "val_fraction": c.val_fraction,
            "max_samples": c.max_samples, "mix_by": c.mix_by, "probabilities": list(c.dataset_probabilities),
            "tokenizer": self.tokenizer.fingerprint, **{f"files of {s.name}": s.identity for s in self.sources},
        }  # fmt: skip

    # ---- held-out rows, the tokenizer, the plan -----------------------------------------

    def validation_rows(self) -> dict[str, HeldOut]:
        """Held-out rows of each source: made once and kept in data.cache_dir.

        All its held-out documents are packed in the order of their hashes, each different text once, and of these rows
        data.val_tokens are taken at equal distances: the same for every process, every data.seed, and for texts and
        shards. Where its files are more than _LOOKED_THROUGH bytes, or data.max_samples cuts it, only its first
        documents are read, which differ in shards. Raises EmptyStream when there is too little held-out text to fill a
        row.
        """
        return {source.name: self._validation_rows_of(source) for source in self.sources}

    def _validation_rows_of(self, source: Source) -> HeldOut:
        c, T, eot_id = self.config, self._length, self.tokenizer.eot_id
        key = [source.identity, self.tokenizer.fingerprint, T, c.val_fraction, c.val_tokens, c.max_samples]
        path = self._cached("heldout", ["evenly", *key], ".npy")
        table = _read_rows(path, T, self.tokenizer.n_vocab)
        if table is None:
            n_rows, is_large = max(1, c.val_tokens // T), sum(source.sizes) > _LOOKED_THROUGH
            found: dict[int, np.ndarray] = {}  # ids by the text's hash
            n_ids = 0
            for document in DocumentStream(source, _in_one_order(c), stream=0, n_streams=1, epochs=1, held_out=True):
                if (its_hash := document_hash(document)) not in found:
                    found[its_hash] = encode(document, self.tokenizer)
                    n_ids += len(found[its_hash])
                if n_ids > n_rows * T and is_large:
                    break
            ids = np.concatenate([found[its_hash] for its_hash in sorted(found)])
            n_whole = (len(ids) - 1) // T
            if not n_whole:
                raise EmptyStream(
                    f"{source.name} has too little held-out text to fill a row of {T} tokens; "
                    f"raise --data.val_fraction, or use --model.max_length {max(1, len(ids) - 1)}"
                )
            number = np.cumsum(ids == eot_id)  # of each id's document
            n_rows = min(n_rows, n_whole)
            starts = T * ((np.arange(n_rows) + 0.5) * n_whole / n_rows).astype(int)
            table = np.stack([np.append(number[i], ids[i : i + T + 1]) for i in starts]).astype(np.uint32)
            with contextlib.suppress(OSError):  # where they cannot be kept, they are made again
                with whole_file(path) as file:
                    np.save(file, table)
                table = np.load(path, mmap_mode="r")
        rows = table[:, 1:]
        begins = np.cumsum(rows[:, 1:-1] == eot_id, axis=1)  # documents within the row
        return HeldOut(rows, table[:, :1].astype(int) + np.pad(begins, ((0, 0), (1, 0))))

    def _tokenizer_of_shards(self) -> Tokenizer:
        path = Path(self.config.shards_dir).expanduser() / "tokenizer.json"
        tokenizer = _read_tokenizer(path)
        if tokenizer is None:
            raise DataError(f"{path} is damaged or missing; make the shards again with prepare_data.py --write_shards")
        for name in self.config.current_datasets:
            made_with = (read_shard_settings(path.parent / name) or {}).get("tokenizer")
            if made_with != tokenizer.fingerprint:
                raise DataError(f"the shards in {path.parent / name} are made with another tokenizer than {path}")
        return tokenizer

    def _load_tokenizer(self) -> Tokenizer:
        c = self.config
        if c.shards_dir:
            tokenizer = self._tokenizer_of_shards()
            if (tokenizer.name, tokenizer.n_vocab) != (c.tokenizer, c.n_vocab):
                raise ConfigError(
                    f"the shards in {c.shards_dir} are made with the tokenizer {tokenizer.name} of {tokenizer.n_vocab} "
                    f"entries; use --data.tokenizer {tokenizer.name}"
                    + (f" --data.bpe_vocab_size {tokenizer.n_vocab}" if tokenizer.name == "bpe" else "")
                )
            return tokenizer
        if c.tokenizer != "bpe":
            return load_tiktoken(c.tokenizer, c.cache_dir)
        identities = [source.identity for source in self.sources]
        key = [identities, c.dataset_probabilities, c.bpe_vocab_size, c.val_fraction, c.max_samples]
        path = self._cached("bpe", key, ".json")
        cached = _read_tokenizer(path)
        if cached is None:
            cached = train_bpe(self._tokenizer_texts(), c.bpe_vocab_size)
            write_json(path, cached.to_dict(), indent=None)
        return cached

    def _tokenizer_texts(self) -> Iterator[str]:
        """Training documents of each source, as much of each as its probability says."""
        for source, probability in zip(self.sources, self.config.dataset_probabilities, strict=True):
            documents = DocumentStream(source, _in_one_order(self.config), stream=0, n_streams=1, epochs=1)
            n_bytes = 0
            while n_bytes < probability * _BPE_BYTES and (text := documents.draw()) is not None:
                assert isinstance(text, str)
                text = without_surrogates(text)
                n_bytes += len(text.encode())
                yield text

    def tokens_per_epoch(self, sample: int = 500) -> dict[str, int]:
        """About how many training tokens each source gives per epoch: its documents x their mean length.

        The length is that of shards, of the dataset's description, or else of a sample; those that data.max_samples
        leaves are taken to be like all. Raises ConfigError when the documents are unknown and data.max_samples is 0.
        """
        tokens = {}
        for source in self.sources:
            length: float = DATASETS[source.name].tokens_per_document
            if source.tokens:
                length = source.tokens / source.documents
            elif not length or self.config.tokenizer == "bpe":  # descriptions are in GPT-2's tokens
                length = self._mean_length(source, sample)
            tokens[source.name] = planned_tokens(source.name, self.config, source.documents, length)
        return tokens

    def _mean_length(self, source: Source, sample: int) -> float:
        """Mean tokens of a record, by a sample. Files may differ, and their ends from their beginnings: of local ones
        it is from all, one of every k records; or from 20 drawn by their bytes (Hansen and Hurwitz, 1943)."""
        c = dataclasses.replace(self.config, max_samples=0)

        def mean(of: Source, n: int, every: int = 1) -> float:
            documents = DocumentStream(of, c, stream=0, n_streams=every, epochs=1, held_out=None)
            lengths = [len(encode(document, self.tokenizer)) for document in itertools.islice(documents, n)]
            return sum(lengths) / (len(lengths) + documents.n_empty)

        if not source.documents_per_file:
            return mean(source, sample)
        sizes, total = source.sizes, 0.0
        drawn = Counter(range(len(sizes)))
        if len(sizes) > 20:
            points = (np.arange(20) + 0.5) / 20 * sum(sizes)
            drawn = Counter(np.searchsorted(np.cumsum(sizes), points, side="right").tolist())
        n_each = math.ceil(sample / len(drawn))
        for i, times in drawn.items():
            its = dataclasses.replace(source, files=(source.files[i],), sizes=(sizes[i],))
            stands_for = times * sum(sizes) / sizes[i] / 20 if len(sizes) > 20 else 1.0  # so many files like it
            with contextlib.suppress(EmptyStream):  # of records without text
                every = max(1, math.ceil(source.documents_per_file[i] / n_each))
                total += stands_for * source.documents_per_file[i] * mean(its, n_each, every)
        return total / source.documents or mean(source, sample)

    def _packed(self, source: Source, stream: int) -> PackedSource:
        documents = DocumentStream(source, self.config, stream, self.config.n_streams, self._epochs)
        return PackedSource(documents, self.tokenizer, self._length)

    def _cached(self, kind: str, key: list[Any], suffix: str) -> Path:
        return Path(self.config.cache_dir).expanduser() / f"{kind}-{digest(*key)[:16]}{suffix}"


def _in_one_order(config: DataConfig) -> DataConfig:
    """For what is to be the same in runs of every seed: the tokenizer, and which rows are held out."""
    return dataclasses.replace(config, seed=DataConfig.seed)


def planned_tokens(name: str, config: DataConfig, documents: int, tokens_per_document: float) -> int:
    """Training tokens of one epoch of a dataset with about so many documents (0: unknown) of about this length."""
    documents = min(documents or sys.maxsize, config.max_samples or sys.maxsize)
    if documents == sys.maxsize:
        raise ConfigError(f"how many documents {name} has is unknown: set --train.max_steps, or --data.max_samples")
    return int(documents * tokens_per_document * (1 - config.val_fraction))


def passes_over(sizes: dict[str, int], config: DataConfig, tokens: int, epochs: int | None) -> dict[str, float]:
    """How often a run of so many tokens reads each dataset, as far as that is known: 0 tokens per epoch are not known,
    nor is which share of the tokens belongs to a share of the documents (data.mix_by).

    In a run by epochs each is read as often: one that is used up before the others drops out.
    """
    if epochs:
        return dict.fromkeys(sizes, float(epochs))
    if config.mix_by == "documents" and len(sizes) > 1:
        return {}
    shares_of = zip(sizes.items(), config.dataset_probabilities, strict=True)
    return {name: tokens * share / size for (name, size), share in shares_of if size}


def too_often(passes: dict[str, float]) -> list[str]:
    """A warning of the datasets that a run passes over more than 4 times, if there are any."""
    often = ", ".join(f"{name} {n:.0f} times" for name, n in passes.items() if n > 4)
    return [f"{often}: more than about 4 passes teach it by heart (arXiv:2305.16264)"] if often else []


def _read_tokenizer(path: Path) -> Tokenizer | None:
    """A tokenizer from a file; None when there is none, or when the file is not whole."""
    try:
        return Tokenizer.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _read_rows(path: Path, length: int, n_vocab: int) -> np.ndarray | None:
    """The cached table of held-out rows, memory-mapped; None when there is none, or when the file is not whole."""
    try:
        table: np.ndarray = np.load(path, mmap_mode="r")
        return table if table.shape[1:] == (length + 2,) and int(table[:, 1:].max()) < n_vocab else None
    except (OSError, ValueError, EOFError):
        return None


# --------------------------------------------------------------------------------------
# Preview
# --------------------------------------------------------------------------------------


@dataclass
class PrepareConfig(Config):
    write_shards: str = ""  # tokenize the datasets into this folder, for training with --data.shards_dir
    n_shards: int = 64  # shards of each dataset, with write_shards
    processes: int = 0  # processes that write shards; 0: as many as there are processors
    plot: str = ""  # draw the length of the documents of each dataset into this PNG

    def validate(self, world_size: int = 1) -> Self:
        for name, least in (("n_shards", 1), ("processes", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; use {least} or more")
            if getattr(self, name) != getattr(PrepareConfig, name) and not self.write_shards:
                raise ConfigError(
                    f"{name} is for --write_shards, which names the shards' folder; give both, or neither"
                )
        if self.write_shards and self.data.shards_dir:
            raise ConfigError(
                "write_shards makes shards of text, and data.shards_dir holds some; leave one of them out"
            )
        if self.plot and self.write_shards:
            raise ConfigError("plot is for the preview, and write_shards is given; run the one, then the other")
        if self.plot and not self.plot.endswith(".png"):
            raise ConfigError(f"plot is {self.plot!r}; use a name that ends in .png")
        return super().validate(world_size)


def main(argv: Sequence[str] | None = None) -> int:
    """Show the sources, the mix and a few rows as the model will see them, and how fast they come; or write shards."""
    description = "Preview the training data: sources, speed, realised mix, decoded rows. Or write it as shards."
    config = load_config(argv, description + RUNS_OPTIONS, PrepareConfig)
    if not config.write_shards:
        config.check_layout(1)
    data = DatasetPrep(config.data, config.model.max_length, config.rows_per_step())
    tokenizer = data.tokenizer
    print(f"tokenizer {tokenizer.name}, {tokenizer.n_vocab} entries, end-of-text is {tokenizer.eot_id}\n")
    if config.write_shards:
        return write(config, data)

    columns = ("files", 7), ("documents", 13), ("held out", 10), ("bytes/doc", 11), ("tokens/doc", 12)
    print(f"{'dataset':<12}" + "".join(f"{name:>{width}}" for name, width in columns) + f"{'bytes/token':>13}")
    lengths: dict[str, list[int]] = {}
    for source in data.sources:
        stream = DocumentStream(source, config.data, stream=0, n_streams=1, epochs=1)
        encoded = [encode(document, tokenizer) for document in itertools.islice(stream, 1000)]
        lengths[source.name] = [len(ids) for ids in encoded]
        n_bytes, n_tokens = sum(int(tokenizer.token_byte_length[ids].sum()) for ids in encoded), sum(map(len, encoded))
        print(
            f"{source.name:<12}{len(source.files):>7,}{f'{source.documents:,}' if source.documents else '?':>13}"
            f"{config.data.val_fraction:>10.1%}{n_bytes / len(encoded):>11,.0f}"
            f"{n_tokens / len(encoded):>12,.0f}{n_bytes / n_tokens:>13.2f}"
        )

    started = time.perf_counter()
    first, n_targets, n_positions = None, 0, 0
    while first is None or time.perf_counter() - started < 5:
        batch = next(data, None)
        if batch is None:
            break
        first = first or batch
        n_targets, n_positions = n_targets + batch.n_targets, n_positions + batch.targets.size
    seconds = time.perf_counter() - started
    data.close()
    if first is None:
        raise DataError("the datasets gave no batch")
    totals = data.totals()
    n_tokens = totals["rows"] * config.model.max_length
    print(
        f"\n{totals['rows']:,} rows of {config.model.max_length} tokens from {totals['documents']:,} documents in "
        f"{seconds:.1f} s: {n_tokens / seconds / 1e6:.2f} M tokens/s"
    )
    asked = dict(zip(config.data.current_datasets, config.data.dataset_probabilities, strict=True))
    shares = ", ".join(f"{name} {share:.2%} of {asked[name]:.0%}" for name, share in data.mix().items())
    shares += f" of the {config.data.mix_by}"
    print(textwrap.fill(shares, 100, initial_indent="share     ", subsequent_indent=" " * 10))
    full = n_targets / n_positions
    print(f"packing   {full:.1%} of the positions are targets; met {totals['empty']:,} records without text")
    for i, row in enumerate(first.inputs[:2]):
        parts = np.split(row, np.flatnonzero(row == tokenizer.eot_id))
        texts = [tokenizer.decode(ids[ids != tokenizer.eot_id].tolist()) for ids in parts]
        shown = "\n=== a document begins ===\n".join(texts)
        part = ", its first 600 characters" if len(shown) > 600 else ""
        print(f"\n--- row {i} of the first step{part} ---\n{shown[:600]}")
    if config.plot:
        plot_lengths(lengths, Path(config.plot))
        print(f"\nlengths drawn in {config.plot}")
    return 0


def write(config: PrepareConfig, data: DatasetPrep) -> int:
    """--write_shards: a line for each dataset, and a bar on a terminal."""
    from tqdm import tqdm

    folder = Path(config.write_shards).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"write_shards is {folder}, which is a file; name a folder, which may be new")
    bars: dict[str, tqdm] = {}
    progress = write_shards(
        folder, data.sources, data.tokenizer, config.data, config.n_shards, config.processes or os.cpu_count() or 1
    )
    for name, ready in progress:
        if name not in bars:
            bars[name] = tqdm(total=config.n_shards, desc=name, unit="shard", disable=None)
        bar = bars[name]
        bar.update(ready - bar.n)
        if ready == config.n_shards:
            bar.close()
            n_bytes = sum(path.stat().st_size for path in (folder / name).glob("*.bin"))
            print(f"{name:<12}{config.n_shards} shards, {n_bytes / 1e6:,.1f} MB in {folder / name}")
    print(f"\ntrain on them with --data.shards_dir {folder}")
    return 0


def plot_lengths(lengths: dict[str, list[int]], path: Path) -> None:
    """Histograms of document lengths in tokens, a panel for each dataset, on one logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")  # no screen needed
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, NullFormatter

    figure, panels = plt.subplots(
        len(lengths), 1, figsize=(8, 1 + 2 * len(lengths)), sharex=True, squeeze=False, layout="constrained"
    )
    every = list(itertools.chain(*lengths.values()))
    bins = np.unique(np.geomspace(min(every), max(every) + 1, 60).round())  # none narrower than a token
    for (name, values), axes in zip(lengths.items(), panels[:, 0], strict=True):
        axes.hist(values, bins=bins)
        axes.axvline(float(np.mean(values)), color="black", linestyle="--", label=f"mean {np.mean(values):,.0f}")
        axes.set(xscale="log", ylabel="documents", title=f"{name}: a sample of {len(values):,} documents")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        within_a_decade = max(every) < 10 * min(every)  # then the powers of ten alone are too few labels
        axes.xaxis.set_minor_formatter(EngFormatter(sep="") if within_a_decade else NullFormatter())
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend()
    panels[-1, 0].set_xlabel("tokens per document")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
