"""One source's documents as a stream: shuffled, split, resumable from five integers, patient with the network."""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections.abc import Iterator, Sequence

from config import DataConfig
from hub import DataError, as_data_error, check_stop, seconds_to_wait
from sources import (
    ALL_HASHES,
    CHUNK,
    Chunk,
    Document,
    EmptyStream,
    Source,
    document_hash,
    files_of_share,
    read_chunks,
)

RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)  # waits after faults of the network, then the run ends
LONGEST_WAIT = 120  # seconds, if the hub asks for more


def is_held_out(document: Document, fraction: float, hash_range: tuple[int, int] = ALL_HASHES) -> bool:
    """Whether a document is for validation: decided by its text alone, the same in every epoch and process.

    hash_range: a small source's. The lowest of its hashes is held out and the highest is not, whatever the fraction.
    """
    lowest, highest = hash_range
    return document_hash(document) < min(max(fraction * 2**64, lowest + 1), highest)


def rng_of(*parts: object) -> random.Random:
    """A random generator that depends on these parts only: counter-based, so that no generator state is saved."""
    return random.Random(hashlib.sha256(repr(parts).encode()).digest())


class DocumentStream:
    """One source's training documents of one stream, epoch after epoch, in a repeatable shuffled order.

    The files come in an order drawn once for the stream; within a window of at least CHUNK documents (a few
    row groups) the order is drawn anew in each epoch. `position` is all there is to save:
    [epoch, file (in that order), chunk (in that file), offset (in the window), documents of this epoch so far].
    held_out=True gives the other documents, those for validation; None gives both. epochs=None repeats for ever.
    n_empty counts the records without text that were passed over.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        stream: int,
        n_streams: int,
        epochs: int | None,
        held_out: bool | None = False,
    ):
        self.source, self._config, self._epochs, self._held_out = source, config, epochs, held_out
        self._stream, self._n_streams = stream, n_streams
        self.n_empty = 0
        self._files = files_of_share(source.sizes, stream, n_streams)
        rng_of(config.seed, source.name, stream).shuffle(self._files)
        self._quota = (config.max_samples + n_streams - 1 - stream) // n_streams if config.max_samples else sys.maxsize
        self.seek([0, 0, 0, 0, 0])

    def seek(self, position: Sequence[int]) -> None:
        """Continue at a saved position."""
        self._epoch, self._file, self._chunk, self._offset, self._drawn = position
        self._next = (self._file, self._chunk)  # where the window after this one begins
        self._window: Sequence[Document] | None = None
        self._reader: Iterator[Chunk] | None = None
        self._barren = self._drawn == 0  # nothing to give in this epoch so far

    @property
    def position(self) -> list[int]:
        return [self._epoch, self._file, self._chunk, self._offset, self._drawn]

    def draw(self) -> Document | None:
        """The next document; None when the last epoch is over. Raises DataError."""
        while self._epochs is None or self._epoch < self._epochs:
            if self._window is None:
                self._window = self._read_window()
            while self._offset < len(self._window):
                document = self._window[self._offset]
                self._offset += 1
                self._drawn += 1
                if not document:
                    self.n_empty += 1
                elif self._held_out is None or self._held_out == is_held_out(
                    document, self._config.val_fraction, self.source.hash_range
                ):
                    self._barren = False
                    return document
            self._end_window()
        return None

    def __iter__(self) -> Iterator[Document]:
        """The documents from here to the end of the last epoch."""
        while (document := self.draw()) is not None:
            yield document

    def _read_window(self) -> list[Document]:
        """The window at (file, chunk), shuffled for this epoch; what max_samples cuts off is the same in each."""
        documents: list[Document] = []
        file, chunk = self._file, self._chunk
        while len(documents) < CHUNK and file < len(self._files):
            more = self._read_chunk(file, chunk)
            file, chunk = (file + 1, 0) if more is None else (file, chunk + 1)
            documents += more or []
        self._next = (file, chunk)
        documents = documents[: self._quota - (self._drawn - self._offset)]
        rng_of(self._config.seed, self.source.name, self._stream, self._epoch, self._file, self._chunk).shuffle(
            documents
        )
        return documents

    def _end_window(self) -> None:
        (self._file, self._chunk), self._offset, self._window = self._next, 0, None
        if self._file < len(self._files) and self._drawn < self._quota:
            return
        if self._barren:
            what = {True: "held-out documents", False: "training documents", None: "documents"}[self._held_out]
            raise EmptyStream(
                f"{self.source.name} has no {what} (stream {self._stream} of {self._n_streams} read {self._drawn}); "
                f"{self._remedy()}"
            )
        self.seek([self._epoch + 1, 0, 0, 0, 0])

    def _remedy(self) -> str:
        if self._drawn >= self._quota:
            return f"raise --data.max_samples, which is {self._config.max_samples}, or use 0: all"
        if self._n_streams > 1:
            return f"use a smaller {'--n_shards' if self._held_out is None else '--data.n_streams'}, down to 1"
        few = self.source.hash_range != ALL_HASHES  # then val_fraction has no say
        return "use more documents" if few or not self._held_out else "raise --data.val_fraction"

    def _read_chunk(self, file: int, chunk: int) -> Chunk | None:
        """One chunk's documents, None behind the file's last; reads again after a fault of the network."""
        index, whole = self._files[file]
        share = (0, 1) if whole else (self._stream, self._n_streams)
        path = self.source.files[index]
        for wait in (*RETRY_SECONDS, None):
            check_stop()
            try:
                if self._reader is None:
                    self._reader = read_chunks(self.source, index, *share, start=chunk)
                documents = next(self._reader, None)
                if documents is None:
                    self._reader = None
                return documents
            except DataError:
                raise
            except Exception as error:
                self._reader = None
                if not path.startswith("hf://"):
                    raise DataError(f"{path} cannot be read: {error}") from error
                asked = seconds_to_wait(error)
                if wait is None or asked is None:
                    raise as_data_error(error, path) from None
                time.sleep(max(wait * random.uniform(0.5, 1), min(asked, LONGEST_WAIT)))
        raise AssertionError("the loop above returns or raises")
