"""Documents -> rows of tokens: split, mix, tokenize, pack, prefetch; every step repeatable from a small state.

As a script it previews what the model will see:  python prepare_data.py [--preset demo]

The idea: the data is divided into `n_streams` logical streams, whatever the number of processes. Each stream is
a deterministic pipeline whose position is a few integers:

    DocumentStream  one source's documents of one stream: shuffled, held-out ones left out
    PackedStream    the sources of one stream: tokenized, packed without padding, mixed row by row
    DatasetPrep     a process's streams, read ahead by a thread

Process r of W reads the streams r, r + W, r + 2W, ...; so the global batch is the same at any W that divides
n_streams, and a run can be resumed, bit for bit, at another W.

Shapes: T context length; a row is T inputs and, one further on, T targets.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import itertools
import json
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import DATASETS, ConfigError, DataConfig, exit_code_of, load_config
from hub import DataError, as_data_error, seconds_to_wait
from sources import CHUNK, Chunk, EmptyStream, Source, files_of_share, read_chunks, resolve_source
from tokenizer import Tokenizer, load_tiktoken, train_bpe

IGNORED = -1  # a target that is none: behind the last document of a run's last epoch
STATE_FORMAT = 1
_BPE_BYTES = 20_000_000  # of text that a tokenizer is trained on, at most
_RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)  # waits after faults of the network, then the run ends
_LONGEST_WAIT = 120  # seconds, if the hub asks for more


class StateMismatch(DataError):
    """A saved data position belongs to other data."""


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is for validation: a property of its text alone, the same in every epoch and process."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _key(*parts: object) -> random.Random:
    """A random generator that depends on these parts only: counter-based, so that no generator state is saved."""
    return random.Random(hashlib.sha256(repr(parts).encode()).digest())


class DocumentStream:
    """One source's training documents of one stream, epoch after epoch, in a repeatable shuffled order.

    The files come in an order drawn once for the stream; within a window of at least CHUNK documents (a few
    row groups) the order is drawn anew in each epoch. `position` is all there is to save:
    [epoch, file (in that order), chunk (in that file), offset (in the window), documents of this epoch so far].
    held_out=True gives the other documents, those for validation. epochs=None repeats for ever.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        stream: int,
        n_streams: int,
        epochs: int | None,
        held_out: bool = False,
    ):
        self.source, self._config, self._epochs, self._held_out = source, config, epochs, held_out
        self._stream, self._n_streams = stream, n_streams
        self._files = files_of_share(len(source.files), stream, n_streams)
        _key(config.seed, source.name, stream).shuffle(self._files)
        self._quota = (config.max_samples + n_streams - 1 - stream) // n_streams if config.max_samples else sys.maxsize
        self.seek([0, 0, 0, 0, 0])

    def seek(self, position: Sequence[int]) -> None:
        """Continue at a saved position."""
        self._epoch, self._file, self._chunk, self._offset, self._drawn = position
        self._next = (self._file, self._chunk)  # where the window after this one begins
        self._window: list[str] | None = None
        self._reader: Iterator[Chunk] | None = None
        self._barren = self._drawn == 0  # nothing to give in this epoch so far

    @property
    def position(self) -> list[int]:
        return [self._epoch, self._file, self._chunk, self._offset, self._drawn]

    def draw(self) -> str | None:
        """The next document; None when the last epoch is over. Raises DataError."""
        while self._epochs is None or self._epoch < self._epochs:
            if self._window is None:
                self._window = self._read_window()
            while self._offset < len(self._window):
                text = self._window[self._offset]
                self._offset += 1
                self._drawn += 1
                if text and is_held_out(text, self._config.val_fraction) == self._held_out:
                    self._barren = False
                    return text
            self._end_window()
        return None

    def _read_window(self) -> list[str]:
        """The window at (file, chunk), shuffled for this epoch; what max_samples cuts off is the same in each."""
        texts: list[str] = []
        file, chunk = self._file, self._chunk
        while len(texts) < CHUNK and file < len(self._files):
            more = self._read_chunk(file, chunk)
            file, chunk = (file + 1, 0) if more is None else (file, chunk + 1)
            texts += more or []
        self._next = (file, chunk)
        texts = texts[: self._quota - (self._drawn - self._offset)]
        _key(self._config.seed, self.source.name, self._stream, self._epoch, self._file, self._chunk).shuffle(texts)
        return texts

    def _end_window(self) -> None:
        (self._file, self._chunk), self._offset, self._window = self._next, 0, None
        if self._file < len(self._files) and self._drawn < self._quota:
            return
        if self._barren:
            what = "held-out documents" if self._held_out else "training documents"
            remedy = "raise --data.val_fraction" if self._held_out else "use a smaller --data.n_streams, or more text"
            raise EmptyStream(
                f"{self.source.name} has no {what} "
                f"(stream {self._stream} of {self._n_streams} read {self._drawn}); {remedy}"
            )
        self.seek([self._epoch + 1, 0, 0, 0, 0])

    def _read_chunk(self, file: int, chunk: int) -> list[str] | None:
        """One chunk's texts, None behind the file's last; reads again after a fault of the network."""
        index, whole = self._files[file]
        share = (0, 1) if whole else (self._stream, self._n_streams)
        path = self.source.files[index]
        for wait in (*_RETRY_SECONDS, None):
            try:
                if self._reader is None:
                    self._reader = read_chunks(self.source, index, *share, start=chunk)
                item = next(self._reader, None)
                if item is None:
                    self._reader = None
                    return None
                return item.texts
            except DataError:
                raise
            except Exception as error:
                self._reader = None
                if not path.startswith("hf://"):
                    raise DataError(f"{path} cannot be read: {error}") from error
                asked = seconds_to_wait(error)
                if wait is None or asked is None:
                    raise as_data_error(error, path) from None
                time.sleep(max(wait * random.uniform(0.5, 1), min(asked, _LONGEST_WAIT)))
        raise AssertionError("the loop above returns or raises")


class PackedSource:
    """A document stream as rows of tokens: end-of-text, document, end-of-text, document ... cut every T tokens.

    Nothing is padded and nothing dropped: a row's last target is the next row's first input. Between two rows,
    what is left over is the tail of the last document drawn, so that document's position and how much of it is
    used up are the state.
    """

    def __init__(self, documents: DocumentStream, tokenizer: Tokenizer, length: int):
        self.name = documents.source.name
        self._documents, self._tokenizer, self._length = documents, tokenizer, length
        self.load_state([*documents.position, -1, 0, 0])

    def load_state(self, state: Sequence[int]) -> None:
        """The inverse of `state`; reads the last document again."""
        *position, used, self.n_rows, self.n_documents = state
        self._last_position, self._last_length = position, 0
        self._tail = np.empty(0, dtype=np.uint32)
        self._documents.seek(position)
        if used >= 0:
            text = self._documents.draw()
            if text is None:
                raise StateMismatch(f"{self.name} has fewer documents than when this state was saved")
            ids = self._encode(text)
            self._tail, self._last_length = ids[used:], len(ids)

    @property
    def state(self) -> list[int]:
        """[position of the last document (5 integers), its tokens used (-1: none drawn yet), rows, documents]."""
        used = self._last_length - len(self._tail) if self._last_length else -1
        return [*self._last_position, used, self.n_rows, self.n_documents]

    def next_row(self) -> np.ndarray | None:
        """(T+1,) ids; fewer, but at least 2, at the end of the last epoch; None when nothing is left."""
        parts, n = [self._tail], len(self._tail)
        while n <= self._length:
            position = self._documents.position
            text = self._documents.draw()
            if text is None:
                break
            ids = self._encode(text)
            self._last_position, self._last_length = position, len(ids)
            self.n_documents += 1
            parts.append(ids)
            n += len(ids)
        if n < 2:
            return None
        flat = np.concatenate(parts) if len(parts) > 1 else parts[0]
        self._tail = flat[self._length :]  # with the token that is both a target now and an input next; or empty
        self.n_rows += 1
        return flat[: self._length + 1]

    def _encode(self, text: str) -> np.ndarray:
        return np.concatenate((np.array([self._tokenizer.eot_id], dtype=np.uint32), self._tokenizer.encode(text)))


class PackedStream:
    """The rows of one stream: each row from one source, the sources taking turns by their probabilities.

    Mixing whole rows makes the shares of tokens exact however long the documents are, and gives every batch its
    share of each source. The next row is from the source that is furthest behind: counting rows (mix_by tokens)
    or documents (mix_by documents). An exhausted source drops out and the others keep their proportions.
    """

    def __init__(self, sources: list[PackedSource], config: DataConfig, stream: int):
        self.sources = sources
        self._probabilities, self._by_tokens = config.dataset_probabilities, config.mix_by == "tokens"
        phase = _key(config.seed, "mix", stream)  # so that the streams do not all take the same turn
        self._phases = [phase.random() for _ in sources]

    def next_row(self) -> tuple[int, np.ndarray] | None:
        """(index of the source, row as of PackedSource); None when all sources are exhausted."""
        counts = [
            phase + (s.n_rows if self._by_tokens else s.n_documents)
            for phase, s in zip(self._phases, self.sources, strict=True)
        ]
        total = sum(counts)
        behind = [p * total - count for p, count in zip(self._probabilities, counts, strict=True)]
        for i in sorted(range(len(counts)), key=behind.__getitem__, reverse=True):
            row = self.sources[i].next_row()
            if row is not None:
                return i, row
        return None


@dataclass(frozen=True)
class Batch:
    """This process's part of one optimizer step: inputs and targets (rows, T) int64; IGNORED targets do not count.

    n_targets: targets that do count. mix: of these, how many came from each source.
    """

    inputs: np.ndarray
    targets: np.ndarray
    n_targets: int
    mix: np.ndarray

    def split(self, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(inputs, targets) of so many rows at a time."""
        for start in range(0, len(self.inputs), batch_size):
            yield self.inputs[start : start + batch_size], self.targets[start : start + batch_size]


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
        self._rows_per_stream = rows_per_step // config.n_streams
        self._streams = {
            v: PackedStream([self._packed(source, v) for source in self.sources], config, v)
            for v in range(rank, config.n_streams, world_size)
        }
        self._delivered = self._stream_states()
        self._queue: queue.Queue[tuple[Batch, Any] | Exception | None] = queue.Queue(maxsize=2)
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
        item = self._queue.get()
        self.seconds_waited += time.perf_counter() - started
        if item is None or isinstance(item, Exception):
            self._queue.put(item)  # asked again, it answers the same
            raise StopIteration if item is None else item
        batch, self._delivered = item
        return batch

    def _produce(self) -> None:
        try:
            while (batch := self._next_batch()) is not None:
                if not self._put((batch, self._stream_states())):
                    return
            self._put(None)
        except Exception as error:  # shown by the thread that trains
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
        mix = np.zeros(len(self.sources), dtype=np.int64)
        return Batch(np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64), 0, mix)

    def _next_batch(self) -> Batch | None:
        batch = self.empty_batch()
        order = itertools.product(range(self._rows_per_stream), self._streams.values())
        for inputs, targets, (_, stream) in zip(batch.inputs, batch.targets, order, strict=True):
            drawn = stream.next_row()
            if drawn is not None:
                source, row = drawn
                inputs[: len(row) - 1], targets[: len(row) - 1] = row[:-1], row[1:]
                batch.mix[source] += len(row) - 1
        return dataclasses.replace(batch, n_targets=int(batch.mix.sum())) if batch.mix.any() else None

    def close(self) -> None:
        """Stop reading ahead; waits for the thread, which may be in the middle of a read."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=3)

    # ---- state --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the batches delivered so far end, for the streams of this process; small, ready for JSON."""
        return {"format": STATE_FORMAT, "identity": self._identity(), "streams": self._delivered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind a saved state, which may hold the streams of more processes than this one.

        Raises StateMismatch naming what differs. Call it before the first batch.
        """
        identity = self._identity()
        changed = [k for k, value in identity.items() if state["identity"].get(k) != value]
        if state["format"] != STATE_FORMAT or changed:
            raise StateMismatch(
                f"the saved data position does not fit: {', '.join(changed) or 'its format'} changed; "
                f"use the data and settings of the saved run, or start a new one with another --train.run_name"
            )
        for v, stream in self._streams.items():
            for source, saved in zip(stream.sources, state["streams"][str(v)], strict=True):
                source.load_state(saved)
        self._delivered = self._stream_states()

    def _stream_states(self) -> dict[str, list[list[int]]]:
        return {str(v): [source.state for source in stream.sources] for v, stream in self._streams.items()}

    def _identity(self) -> dict[str, Any]:
        c = self.config
        return {
            "n_streams": c.n_streams, "seed": c.seed, "max_length": self._length, "val_fraction": c.val_fraction,
            "max_samples": c.max_samples, "mix_by": c.mix_by, "probabilities": list(c.dataset_probabilities),
            "tokenizer": self.tokenizer.fingerprint, **{f"files of {s.name}": s.identity for s in self.sources},
        }  # fmt: skip

    # ---- held-out rows, the tokenizer, the plan -----------------------------------------

    def validation_rows(self) -> dict[str, np.ndarray]:
        """Held-out rows (N, T+1) uint32 of each source, memory-mapped: made once and kept in data.cache_dir.

        The same for every process and every run with these data settings. Raises EmptyStream when there are
        too few held-out documents to fill a row.
        """
        return {source.name: self._validation_rows_of(source) for source in self.sources}

    def _validation_rows_of(self, source: Source) -> np.ndarray:
        c = self.config
        key = [source.identity, self.tokenizer.fingerprint, self._length, c.val_fraction, c.val_tokens, c.max_samples]
        path = self._cached("heldout", [*key, c.seed], ".npy")
        if not path.exists():
            documents = DocumentStream(source, c, stream=0, n_streams=1, epochs=1, held_out=True)
            packed = PackedSource(documents, self.tokenizer, self._length)
            rows: list[np.ndarray] = []
            while len(rows) < max(1, c.val_tokens // self._length):
                row = packed.next_row()
                if row is None or len(row) <= self._length:
                    break
                rows.append(row)
            if not rows:
                raise EmptyStream(
                    f"{source.name} has too little held-out text to fill a row of {self._length} tokens; "
                    f"raise --data.val_fraction, or lower --model.max_length"
                )
            _write_atomically(path, lambda partial: np.save(partial, np.stack(rows)))
        rows_on_disk: np.ndarray = np.load(path, mmap_mode="r")
        return rows_on_disk

    def _load_tokenizer(self) -> Tokenizer:
        c = self.config
        if c.tokenizer != "bpe":
            return load_tiktoken(c.tokenizer, c.cache_dir)
        identities = [source.identity for source in self.sources]
        key = [identities, c.dataset_probabilities, c.bpe_vocab_size, c.val_fraction, c.seed, c.max_samples]
        path = self._cached("bpe", key, ".json")
        if not path.exists():
            tokenizer = train_bpe(self._tokenizer_texts(), c.bpe_vocab_size)
            _write_atomically(path, lambda partial: Path(partial).write_text(json.dumps(tokenizer.to_dict())))
        return Tokenizer.from_dict(json.loads(path.read_text()))

    def _tokenizer_texts(self) -> Iterator[str]:
        """Training documents of each source, as much of each as its probability says."""
        for source, probability in zip(self.sources, self.config.dataset_probabilities, strict=True):
            documents = DocumentStream(source, self.config, stream=0, n_streams=1, epochs=1)
            n_bytes = 0
            while n_bytes < probability * _BPE_BYTES and (text := documents.draw()) is not None:
                n_bytes += len(text.encode())
                yield text

    def tokens_per_epoch(self, sample: int = 500) -> dict[str, int]:
        """About how many training tokens each source gives per epoch: its documents x their mean length.

        The length is that of the dataset's description, or else of a sample. Raises ConfigError when the
        documents are unknown and data.max_samples is 0.
        """
        tokens = {}
        for source in self.sources:
            length: float = DATASETS[source.name].tokens_per_document
            if not length:
                stream = DocumentStream(source, self.config, stream=0, n_streams=1, epochs=1)
                texts = itertools.islice(iter(stream.draw, None), sample)
                length = float(np.mean([len(self.tokenizer.encode(text)) + 1 for text in texts]))
            tokens[source.name] = planned_tokens(source.name, self.config, source.documents, length)
        return tokens

    def _packed(self, source: Source, stream: int) -> PackedSource:
        documents = DocumentStream(source, self.config, stream, self.config.n_streams, self._epochs)
        return PackedSource(documents, self.tokenizer, self._length)

    def _cached(self, kind: str, key: list[Any], suffix: str) -> Path:
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
        return Path(self.config.cache_dir).expanduser() / f"{kind}-{digest}{suffix}"


def planned_tokens(name: str, config: DataConfig, documents: int, tokens_per_document: float) -> int:
    """Training tokens of one epoch of a dataset with about so many documents (0: unknown) of about this length."""
    documents = min(documents or sys.maxsize, config.max_samples or sys.maxsize)
    if documents == sys.maxsize:
        raise ConfigError(f"how many documents {name} has is unknown: set --train.max_steps, or --data.max_samples")
    return int(documents * tokens_per_document * (1 - config.val_fraction))


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under another name first, so that a file of this name is always whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    write(partial)
    partial.replace(path)


# --------------------------------------------------------------------------------------
# Preview
# --------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Show the sources, the mix and a few rows as the model will see them, and how fast they come."""
    config = load_config(argv, "Preview the training data: sources, speed, realised mix, and decoded rows.")
    data = DatasetPrep(config.data, config.model.max_length, config.rows_per_step())
    tokenizer = data.tokenizer
    print(f"tokenizer {tokenizer.name}, {tokenizer.n_vocab} entries, end-of-text is {tokenizer.eot_id}\n")

    columns = (
        ("files", 7),
        ("documents", 13),
        ("held out", 10),
        ("bytes/doc", 11),
        ("tokens/doc", 12),
        ("bytes/token", 13),
    )
    print(f"{'dataset':<12}" + "".join(f"{name:>{width}}" for name, width in columns))
    for source in data.sources:
        stream = DocumentStream(source, config.data, stream=0, n_streams=1, epochs=1)
        texts = list(itertools.islice(iter(stream.draw, None), 500))
        n_bytes, n_tokens = sum(len(t.encode()) for t in texts), sum(len(tokenizer.encode(t)) for t in texts)
        print(
            f"{source.name:<12}{len(source.files):>7,}{source.documents or '?':>13,}"
            f"{config.data.val_fraction:>10.1%}{n_bytes / len(texts):>11,.0f}"
            f"{n_tokens / len(texts):>12,.0f}{n_bytes / n_tokens:>13.2f}"
        )

    started, n_targets, mix, n_batches = time.perf_counter(), 0, np.zeros(len(data.sources)), 0
    batch = None
    for batch in data:
        n_targets, mix, n_batches = n_targets + batch.n_targets, mix + batch.mix, n_batches + 1
        if time.perf_counter() - started > 5:
            break
    seconds = time.perf_counter() - started
    data.close()
    if batch is None:
        raise DataError("the datasets gave no batch")
    documents = sum(source[-1] for stream in data.state_dict()["streams"].values() for source in stream)
    print(
        f"\n{n_batches} steps of {len(batch.inputs)} rows x {config.model.max_length} tokens in {seconds:.1f} s: "
        f"{n_targets / seconds / 1e6:.2f} M tokens/s, {documents / seconds:,.0f} documents/s"
    )
    shares = ", ".join(
        f"{s.name} {share:.1%} (asked {p:.1%})"
        for s, share, p in zip(data.sources, mix / mix.sum(), config.data.dataset_probabilities, strict=True)
    )
    print(f"share of tokens: {shares}")
    for i in range(2):
        text = tokenizer.decode(batch.inputs[i])
        print(f"\n--- row {i}, its first 600 characters ---\n{text[:600]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code_of(main))
