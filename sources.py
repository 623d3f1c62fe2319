"""Where text comes from: the hub, files inside installed packages, files of your own.

`resolve_source` turns a dataset's description (config.DATASETS) into a Source: a pinned, sorted list of files.
`read_chunks` reads one file's documents for one of several equal shares, from any chunk on. Nothing is kept
between calls, so a reader can be dropped at any fault and opened again where it was.
"""

from __future__ import annotations

import difflib
import functools
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from config import DATASETS, DataConfig, Dataset
from hub import DataError, HubFile, find_files

HUB_BLOCK = 4 * 2**20  # bytes fetched at once from a line file on the hub
CHUNK = 512  # documents read at once from files without row groups
LONG_TEXT = 256 * 1024  # bytes: a longer .txt file is divided into several documents
TEXT_PIECE = 16 * 1024  # bytes: the size of these, about


class TextFieldMissing(DataError):
    """The records have no such column."""


class EmptyStream(DataError):
    """A source, or one stream's share of it, has no documents."""


class CorruptRecord(DataError):
    """A file or a record in it cannot be decoded."""


@dataclass(frozen=True)
class Source:
    """A dataset whose files are known.

    files       local paths, or "hf://datasets/<repository>@<commit>/<path>", sorted
    sizes       their bytes
    documents   how many there are, about; 0: unknown
    identity    equal for equal content: compared when a run is resumed
    """

    name: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    text_field: str
    documents: int
    identity: str


@dataclass(frozen=True)
class Chunk:
    """Documents that are read together: a row group, or CHUNK lines. `index` counts within file and share."""

    index: int
    texts: list[str]


def resolve_source(name: str, config: DataConfig) -> Source:
    """Find a dataset's files; for the hub, pin its newest commit. Raises DataError within 15 seconds."""
    dataset = DATASETS[name]
    if dataset.kind == "hub":
        return _resolve_hub(name, dataset)
    if dataset.kind == "package":
        files, text_field = _package_files(name, dataset), dataset.text_field
    else:
        files, text_field = _local_files(config.local_files), config.local_text_field
    sizes = tuple(Path(f).stat().st_size for f in files)
    # Names and sizes, not whole paths: the same run may go on on another machine.
    identity = _digest([Path(f).name for f in files], sizes, text_field)
    return Source(name, tuple(files), sizes, text_field, _count_documents(files), identity)


def _resolve_hub(name: str, dataset: Dataset) -> Source:
    commit, files = find_files(dataset.location, dataset.name or "default", dataset.revision)
    paths = sorted(files)
    sizes = tuple(files[path] for path in paths)
    # The files' names and sizes, not the commit: a new commit of the card alone does not change the data.
    identity = _digest(dataset.location, paths, sizes, dataset.text_field)
    located = tuple(f"hf://datasets/{dataset.location}@{commit}/{path}" for path in paths)
    return Source(name, located, sizes, dataset.text_field, dataset.documents, identity)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _package_files(name: str, dataset: Dataset) -> list[str]:
    """Files inside an installed package, without importing it: its code need not run."""
    folder, _, pattern = dataset.location.partition("/")
    for distribution in importlib.metadata.packages_distributions().get(folder, ()):
        root = Path(str(importlib.metadata.distribution(distribution).locate_file(folder)))
        files = sorted(str(path) for path in root.glob(pattern))
        if files:
            return files
    raise DataError(f"the text of {name} is in the Python package {folder}; run pip install -r requirements.txt")


def _local_files(paths: Iterable[str]) -> list[str]:
    known = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
    files: list[Path] = []
    for path in (Path(p).expanduser() for p in paths):
        if not path.exists():
            raise DataError(f"data.local_files names {path}, which does not exist")
        found = sorted(f for f in path.rglob("*") if f.name.endswith(known)) if path.is_dir() else [path]
        if not found or not found[0].name.endswith(known):
            raise DataError(f"data.local_files: {path} is or holds none of {', '.join('*' + k for k in known)}")
        files += found
    return [str(f) for f in dict.fromkeys(files)]


def _count_documents(files: list[str]) -> int:
    """Documents of local files, counted: parquet from its footer, the others by reading."""
    total = 0
    for path in files:
        if path.endswith(".parquet"):
            total += _parquet_footer(path, Path(path).stat().st_size).num_rows
        else:
            total += sum(1 for _ in _rows(path, Path(path).stat().st_size))
    return total


# --------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------


def files_of_share(n_files: int, share: int, n_shares: int) -> list[tuple[int, bool]]:
    """The files that a share reads: (index, whole). A file that is not whole is divided among all shares.

    As many files as divide evenly are dealt out whole; the rest is shared, so that all shares are about equal.
    """
    dealt = n_files - n_files % n_shares
    return [(i, True) for i in range(share, dealt, n_shares)] + [(i, False) for i in range(dealt, n_files)]


def read_chunks(source: Source, file: int, share: int, n_shares: int, start: int) -> Iterator[Chunk]:
    """The chunks of one file, from chunk `start` on, that belong to `share` of `n_shares` (0 of 1: all).

    Parquet files are read by row group, whose others are not even fetched; in line files, what comes before
    `start` has to be read over. Raises TextFieldMissing, CorruptRecord, or one of TRANSIENT_ERRORS.
    """
    path, size = source.files[file], source.sizes[file]
    read = _parquet_chunks if path.endswith(".parquet") else _row_chunks
    # Shared files begin with another share each, so that short files do not all fall to the first.
    return read(source, path, size, (share + file) % n_shares, n_shares, start)


def _parquet_chunks(source: Source, path: str, size: int, share: int, n_shares: int, start: int) -> Iterator[Chunk]:
    footer = _parquet_footer(path, size)
    names = footer.schema.to_arrow_schema().names
    if source.text_field not in names:
        raise TextFieldMissing(_missing(source.text_field, names, path))
    by_group = footer.num_row_groups >= n_shares
    groups = range(share, footer.num_row_groups, n_shares) if by_group else range(footer.num_row_groups)
    # No threads of Arrow's: one that is reading from Python while the interpreter exits aborts the process.
    with closing(pq.ParquetFile(_open(path, size), metadata=footer, pre_buffer=False)) as file:
        first_row = 0
        for index, group in enumerate(groups):
            if index >= start:
                try:
                    table = file.read_row_group(group, columns=[source.text_field], use_threads=False)
                except pa.ArrowException as error:
                    raise CorruptRecord(f"{path}, row group {group}, cannot be decoded: {error}") from None
                texts = table.column(0).to_pylist()
                yield Chunk(index, texts if by_group else texts[(share - first_row) % n_shares :: n_shares])
            first_row += footer.row_group(group).num_rows


@functools.lru_cache(maxsize=4096)
def _parquet_footer(path: str, size: int) -> pq.FileMetaData:
    """Read once for all streams: 2 MB in a file of 1,000 row groups."""
    try:
        with closing(_open(path, size)) as file:
            return pq.read_metadata(file)
    except pa.ArrowInvalid as error:
        raise CorruptRecord(f"{path} is not a parquet file, or a truncated one: {error}") from None


def _row_chunks(source: Source, path: str, size: int, share: int, n_shares: int, start: int) -> Iterator[Chunk]:
    rows = itertools.islice(enumerate(_rows(path, size)), share + start * CHUNK * n_shares, None, n_shares)
    for index in itertools.count(start):
        batch = list(itertools.islice(rows, CHUNK))
        if not batch:
            return
        yield Chunk(index, [_text_of(source, path, i, row) for i, row in batch])


def _rows(path: str, size: int) -> Iterator[Any]:
    """A file's records: bytes of a JSON line, an object of a JSON file, or a piece of plain text."""
    if path.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
        with _open(path, size) as raw, gzip.open(raw) if path.endswith(".gz") else raw as lines:
            for line in lines:
                if line.strip():
                    yield line
    elif path.endswith(".json"):
        yield from _json_records(path)
    else:
        with _open(path, size) as file:
            if size <= LONG_TEXT:
                yield _decode(file.read(), path)
            else:
                yield from _pieces(file, path)


def _pieces(file: IO[bytes], path: str) -> Iterator[str]:
    """Cut a long text at blank lines, or else at line ends, into documents of about TEXT_PIECE bytes."""
    piece: list[bytes] = []
    size = 0
    for line in file:
        piece.append(line)
        size += len(line)
        if size >= TEXT_PIECE and (not line.strip() or size >= 2 * TEXT_PIECE):
            yield _decode(b"".join(piece), path)
            piece, size = [], 0
    if piece:
        yield _decode(b"".join(piece), path)


@functools.lru_cache(maxsize=2)
def _json_records(path: str) -> list[Any]:
    values = json.loads(Path(path).read_bytes())
    return list(values.values()) if isinstance(values, dict) else values


def _text_of(source: Source, path: str, row: int, record: Any) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, bytes):
        try:
            record = json.loads(record)
        except ValueError as error:
            raise CorruptRecord(f"{path}, record {row}, is not JSON: {error}") from None
    if not isinstance(record, dict) or source.text_field not in record:
        raise TextFieldMissing(_missing(source.text_field, list(record) if isinstance(record, dict) else [], path))
    return record[source.text_field]


def _missing(text_field: str, columns: list[str], path: str) -> str:
    near = difflib.get_close_matches(text_field, columns, n=1)
    hint = (
        f"did you mean --data.local_text_field {near[0]}?" if near else f"its fields are {', '.join(columns) or 'none'}"
    )
    return f"{path} has no field {text_field!r}; {hint}"


def _decode(content: bytes, path: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptRecord(f"{path} is not UTF-8 at byte {error.start}; convert it, as with iconv") from None


def _open(path: str, size: int) -> IO[bytes]:
    if not path.startswith("hf://"):
        return open(path, "rb")
    file = HubFile(path, size)
    if path.endswith(".parquet"):
        return file  # type: ignore[return-value]  # Arrow asks for just the ranges it needs
    return io.BufferedReader(file, HUB_BLOCK)
