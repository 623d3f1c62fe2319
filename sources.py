"""Where text comes from: the hub, files inside installed packages, files of your own.

`resolve_source` turns a dataset's description (config.DATASETS) into a Source: a pinned, sorted list of files.
`read_chunks` reads one file's documents for one of several equal shares, from any chunk on. Nothing is kept
between calls, so a reader can be dropped at any fault and opened again where it was: `DocumentStream` does that.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from config import DATASETS, DataConfig, Dataset
from hub import DataError, HubFile, find_files

READABLE = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt")
HUB_BLOCK = 4 * 2**20  # bytes fetched at once from a line file on the hub
SHARD_CHUNK = 1024  # documents read at once from a shard
SHARD_INDEX = np.dtype([("end", "<u8"), ("hash", "<u8")])  # a record for each document of a shard: shards.py
CHUNK = 512  # documents read at once from files without row groups
TEXT_CUT = 256 * 1024, 16 * 1024  # bytes: a .txt file longer than this is cut into documents of about that
MANY_TEXTS = 100  # with fewer .txt files of your own, shorter ones are cut too, for this many documents or so
SMALLEST_PIECE = 512  # bytes: no document is cut to less
FEW_DOCUMENTS = 1000  # a hash of so many documents or more leaves some on both sides of every sensible val_fraction
ALL_HASHES = 0, 2**64


class TextFieldMissing(DataError):
    """The records have no such column."""


class EmptyStream(DataError):
    """A source, or one stream's share of it, has no documents."""


class CorruptRecord(DataError):
    """A file or a record in it cannot be decoded."""


@dataclass(frozen=True)
class Source:
    """A dataset whose files are known.

    files               local paths, or "hf://datasets/<repository>@<commit>/<path>", sorted
    sizes               their bytes
    documents           how many there are, about; 0: unknown
    documents_per_file  and in each; empty if that is not known
    tokens              of shards, in all; 0: not known
    n_vocab             of shards: their ids are below it
    identity            equal for equal content: compared when a run is resumed
    text_cut            a .txt file of more bytes than the first is cut into documents of about the second
    hash_range          the lowest and the highest hash of a small source's documents: with its text alone to decide,
                        all of them might be trained on, or held out
    """

    name: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    text_field: str
    documents: int
    identity: str
    text_cut: tuple[int, int] = TEXT_CUT
    hash_range: tuple[int, int] = ALL_HASHES
    documents_per_file: tuple[int, ...] = ()
    tokens: int = 0
    n_vocab: int = 0


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A document of a shard: its ids, end-of-text first, and the hash of the text that they were made from."""

    ids: np.ndarray
    hash: int


Document = str | Tokenized  # "": a record without text
Chunk = Sequence[Document]  # those that are read together: a row group, or CHUNK lines


def document_hash(document: Document) -> int:
    """64 bits that depend on the document's text alone, and so are the same for text and for shards made of it."""
    if isinstance(document, Tokenized):
        return document.hash
    # sha256: processors have instructions for it; 2.2 us for 3 kB against blake2b's 3.7, of 120 to tokenize them.
    return int.from_bytes(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def resolve_source(name: str, config: DataConfig) -> Source:
    """Find a dataset's files: on the hub at a pinned commit (its revision, or the newest), found or refused within 15
    seconds; files here are read once, to count documents and to know their content again. Raises DataError."""
    dataset = DATASETS[name]
    if config.shards_dir:
        return _resolve_shards(name, Path(config.shards_dir).expanduser() / name)
    if dataset.kind == "hub":
        return _resolve_hub(name, dataset)
    is_local = dataset.kind == "local"
    if is_local:
        files, text_field = _local_files(config.local_files), config.local_text_field
    else:
        files, text_field = _package_files(name, dataset), dataset.text_field
    sizes = tuple(Path(f).stat().st_size for f in files)
    text_sizes = [size for f, size in zip(files, sizes, strict=True) if f.endswith(".txt")]
    cut = _text_cut(text_sizes) if is_local else TEXT_CUT
    counts = _count_documents(files, cut)
    # Names and contents, not whole paths: the same run may go on on another machine.
    content = [Path(f).name for f in files], [_content(f) for f in files], text_field
    identity = digest(*content) if cut == TEXT_CUT else digest(*content, cut)
    source = Source(name, tuple(files), sizes, text_field, sum(counts), identity, cut, documents_per_file=counts)
    if is_local and source.documents < FEW_DOCUMENTS:
        return dataclasses.replace(source, hash_range=_hash_range(source))
    return source


def _text_cut(sizes: Sequence[int]) -> tuple[int, int]:
    """Source.text_cut for .txt files of so many bytes: a few files of one's own must give documents to divide."""
    if not 0 < len(sizes) < MANY_TEXTS:
        return TEXT_CUT
    piece = min(TEXT_CUT[1], max(SMALLEST_PIECE, sum(sizes) // MANY_TEXTS))
    return piece, piece


def _hash_range(source: Source) -> tuple[int, int]:
    """The lowest and the highest hash of a source's documents, all of which are read. Raises EmptyStream."""
    chunks = (chunk for i in range(len(source.files)) for chunk in read_chunks(source, i, 0, 1, 0))
    hashes = {document_hash(document) for chunk in chunks for document in chunk if document}
    if not hashes:
        raise EmptyStream(f"{source.name} has no documents with text in its files; give it others")
    return min(hashes), max(hashes)


def _resolve_hub(name: str, dataset: Dataset) -> Source:
    commit, files = find_files(dataset.location, dataset.name or "default", dataset.revision)
    paths = sorted(path for path in files if path.endswith(READABLE))  # not a README among them
    if not paths:
        raise DataError(
            f"{name} has no files of a kind that is read ({', '.join(READABLE)}): {', '.join(sorted(files)[:3])}"
        )
    sizes = tuple(files[path][0] for path in paths)
    # The files' names and hashes, not the commit: a new commit of the card alone does not change the data.
    identity = digest(dataset.location, [(path, files[path][1]) for path in paths], dataset.text_field)
    located = tuple(f"hf://datasets/{dataset.location}@{commit}/{path}" for path in paths)
    return Source(name, located, sizes, dataset.text_field, dataset.documents, identity)


def _resolve_shards(name: str, folder: Path) -> Source:
    """The shards that prepare_data.py --write_shards made of a dataset; `identity` is theirs."""
    settings = read_shard_settings(folder)
    if settings is None:
        raise DataError(
            f"{folder} holds no shards of {name}; make them with python prepare_data.py --write_shards {folder.parent} "
            f"and this run's preset and data options"
        )
    files = sorted(str(path) for path in folder.glob("shard-*.bin") if path.with_suffix(".npy").exists())
    if len(files) != settings["n_shards"]:
        raise DataError(
            f"{folder} holds {len(files)} of {settings['n_shards']} shards; run prepare_data.py --write_shards "
            f"{folder.parent} again, with the same options, to finish them"
        )
    sizes = tuple(Path(f).stat().st_size for f in files)
    tokens = sum(int(_shard_index(f)["end"][-1]) for f in files)
    documents = sum(len(_shard_index(f)) for f in files)
    identity, n_vocab = digest(settings, sizes), settings["n_vocab"]
    source = Source(name, tuple(files), sizes, "", documents, identity, tokens=tokens, n_vocab=n_vocab)
    if DATASETS[name].kind == "local" and documents < FEW_DOCUMENTS:
        hashes = np.concatenate([_shard_index(f)["hash"] for f in files])
        return dataclasses.replace(source, hash_range=(int(hashes.min()), int(hashes.max())))
    return source


def read_shard_settings(folder: Path) -> dict[str, Any] | None:
    """settings.json of a dataset's shards; None if there is none."""
    path = folder / "settings.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
        whole = type(settings["n_shards"]) is type(settings["n_vocab"]) is int and "tokenizer" in settings
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DataError(f"{path} is damaged; remove {folder} and make its shards again")
    return settings


def digest(*parts: object) -> str:
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
    known = (".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
    files: list[Path] = []
    for path in (Path(p).expanduser() for p in paths):
        if not path.exists():
            raise DataError(f"data.local_files names {path}, which does not exist")
        inside = path.rglob("*") if path.is_dir() else [path]
        try:
            found = sorted(f for f in inside if f.name.endswith(known) and f.is_file())
        except OSError as error:  # such as links in a circle
            raise DataError(f"data.local_files: {path} cannot be read ({error.strerror})") from None
        if not found:
            raise DataError(f"data.local_files: {path} is or holds none of {', '.join('*' + k for k in known)}")
        files += found
    return [str(f) for f in {f.resolve(): f for f in reversed(files)}.values()][::-1]  # a file once, by whatever names


def _content(path: str) -> str:
    """A digest of a local file, or of a parquet file's footer, which has the place and statistics of all columns."""
    with open(path, "rb") as file:
        if path.endswith(".parquet"):
            file.seek(-8, io.SEEK_END)
            file.seek(-8 - int.from_bytes(file.read(4), "little"), io.SEEK_END)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _count_documents(files: list[str], text_cut: tuple[int, int]) -> tuple[int, ...]:
    """Documents of local files, counted in each: parquet from its footer, the others by reading."""
    counts = []
    for path in files:
        size = Path(path).stat().st_size
        try:
            if path.endswith(".parquet"):
                counts.append(_parquet_footer(path, size).num_rows)
            else:
                counts.append(sum(1 for _ in _rows(path, size, text_cut)))
        except (OSError, EOFError, zlib.error) as error:
            raise CorruptRecord(f"{path} cannot be read, or is truncated: {error}") from None
    return tuple(counts)


# --------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------


def files_of_share(sizes: Sequence[int], share: int, n_shares: int) -> list[tuple[int, bool]]:
    """The files that a share reads: (index, whole). A file that is not whole is divided among all shares.

    The largest first, files are dealt out whole to the share that has least, as long as it then has no more than
    its part of all bytes; the others are divided. So all shares are about equal.
    """
    loads, dealt = [0] * n_shares, {}
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        if (loads[least] + sizes[i]) * n_shares <= sum(sizes):
            loads[least] += sizes[i]
            dealt[i] = least
    return [(i, i in dealt) for i in range(len(sizes)) if dealt.get(i, share) == share]


def read_chunks(source: Source, file: int, share: int, n_shares: int, start: int) -> Iterator[Chunk]:
    """The chunks of one file, from chunk `start` on, that belong to `share` of `n_shares` (0 of 1: all).

    Parquet files are read by row group; of a file with many, those of other shares are not even fetched. In line
    files, what comes before `start` has to be read over. Raises TextFieldMissing, CorruptRecord, or an error of the
    network or the disk.
    """
    path, size = source.files[file], source.sizes[file]
    if path.endswith(".bin"):
        return _shard_chunks(path, source.n_vocab, (share + file) % n_shares, n_shares, start)
    read = _parquet_chunks if path.endswith(".parquet") else _row_chunks
    # Shared files begin with another share each, so that short files do not all fall to the first.
    return read(source, path, size, (share + file) % n_shares, n_shares, start)


def row_of(turn: int, share: int, n_shares: int) -> int:
    """The row of a file that is a share's in a turn of n_shares rows: which of them is by a hash of the turn.

    In a file with a period, such as a question and its answer, no share then has the questions alone. (Whoever changes
    this order gives STATE_FORMAT and shards.FORMAT another number.)
    """
    x = turn * 2654435769 % 2**32
    x = (x ^ x >> 15) * 2246822519 % 2**32
    return turn * n_shares + (share + (x * n_shares >> 32)) % n_shares


def _numbers_of(share: int, n_shares: int, start: int, stop: int) -> list[int]:
    """Which of the rows (or row groups) range(start, stop) are a share's, ascending."""
    turns = range(start // n_shares, -(-stop // n_shares))
    return [row for turn in turns if start <= (row := row_of(turn, share, n_shares)) < stop]


def _parquet_chunks(source: Source, path: str, size: int, share: int, n_shares: int, start: int) -> Iterator[Chunk]:
    footer = _parquet_footer(path, size)
    names = footer.schema.to_arrow_schema().names
    if source.text_field not in names:
        raise TextFieldMissing(_missing(source.text_field, names, path))
    n_groups = footer.num_row_groups
    by_group = n_groups >= 8 * n_shares  # else shares might be very unequal
    groups = _numbers_of(share, n_shares, 0, n_groups) if by_group else [*range(n_groups)]
    # No threads of Arrow's: one that is reading from Python while the interpreter exits aborts the process.
    with closing(pq.ParquetFile(_open(path, size), metadata=footer, pre_buffer=False)) as file:
        first_row = 0
        for index, group in enumerate(groups):
            if index >= start:
                with _decoding(f"{path}, row group {group}, cannot be decoded"):
                    table = file.read_row_group(group, columns=[source.text_field], use_threads=False)
                try:
                    column = table.column(0).to_pylist()
                except UnicodeDecodeError as error:  # Arrow does not look when it reads
                    raise CorruptRecord(
                        f"{path}, row group {group}, has a text that is not UTF-8 ({error}); mend or remove it"
                    ) from None
                texts = [_checked(text, path, f"row group {group}") for text in column]
                if not by_group:
                    rows = _numbers_of(share, n_shares, first_row, first_row + len(texts))
                    texts = [texts[row - first_row] for row in rows]
                yield texts
            first_row += footer.row_group(group).num_rows


@functools.lru_cache(maxsize=64)
def _parquet_footer(path: str, size: int) -> pq.FileMetaData:
    """Read once for all streams: 2 MB in a file of 1,000 row groups."""
    with _decoding(f"{path} is not a parquet file, or a truncated one"), closing(_open(path, size)) as file:
        return pq.read_metadata(file)


@contextmanager
def _decoding(complaint: str) -> Iterator[None]:
    """What Arrow cannot decode is an error of the data; one of the network or the disk passes as it is."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # Arrow's own are plain, and have no number
        raise CorruptRecord(f"{complaint}: {error}") from None


def _row_chunks(source: Source, path: str, size: int, share: int, n_shares: int, start: int) -> Iterator[Chunk]:
    numbers = (row_of(turn, share, n_shares) for turn in itertools.count(start * CHUNK))
    rows = _numbered(_rows(path, size, source.text_cut), numbers)
    while batch := list(itertools.islice(rows, CHUNK)):
        yield [_text_of(source, path, i, row) for i, row in batch]


def _numbered(rows: Iterator[Any], numbers: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Those of the rows whose numbers, ascending, are given; with them."""
    n_read, end = 0, object()  # None may be a row
    for number in numbers:
        row = next(itertools.islice(rows, number - n_read, None), end)
        if row is end:
            return
        yield number, row
        n_read = number + 1


def _shard_chunks(path: str, n_vocab: int, share: int, n_shares: int, start: int) -> Iterator[Chunk]:
    index = _shard_index(path)
    ids = np.memmap(path, dtype=np.uint16 if n_vocab <= 2**16 else np.uint32, mode="r")
    ends, hashes = index["end"], index["hash"]
    if len(ids) != ends[-1]:
        raise CorruptRecord(
            f"{path} holds {len(ids)} tokens, not the {ends[-1]} of its index; remove and make it again"
        )
    for chunk in itertools.count(start):
        first = chunk * SHARD_CHUNK * n_shares
        rows = _numbers_of(share, n_shares, first, min(first + SHARD_CHUNK * n_shares, len(index)))
        if not rows:
            return
        begin = int(ends[rows[0] - 1]) if rows[0] else 0
        block = ids[begin : int(ends[rows[-1]])]
        if int(block.max()) >= n_vocab:  # a bad id would stop the run on the device, without a name
            bad = begin + int(np.argmax(block >= n_vocab))
            document = int(np.searchsorted(ends, bad, side="right"))
            raise CorruptRecord(f"{path}, document {document}, has the id {ids[bad]} in a vocabulary of {n_vocab}")
        starts = [int(ends[row - 1]) - begin if row else 0 for row in rows]
        stops = (ends[rows] - begin).tolist()
        its_hashes = hashes[rows].tolist()
        yield [Tokenized(block[a:b], h) for a, b, h in zip(starts, stops, its_hashes, strict=True)]


@functools.lru_cache(maxsize=4096)
def _shard_index(path: str) -> np.ndarray:
    file = Path(path).with_suffix(".npy")
    try:
        index: np.ndarray = np.load(file, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise CorruptRecord(f"{file} cannot be read: {error}; remove it and make the shard again") from None
    return index


def _rows(path: str, size: int, text_cut: tuple[int, int]) -> Iterator[Any]:
    """A file's records: bytes of a JSON line, an object of a JSON file, or a piece of plain text."""
    if path.endswith((".jsonl", ".jsonl.gz", ".json.gz")) or (path.startswith("hf://") and path.endswith(".json")):
        with _open(path, size) as raw, gzip.open(raw) if path.endswith(".gz") else raw as lines:
            for line in lines:
                if line.strip():
                    yield line
    elif path.endswith(".json"):
        yield from _json_records(path)
    else:
        longest, piece = text_cut
        with _open(path, size) as file:
            position = 0
            for content in [file.read()] if size <= longest else _pieces(file, piece):
                yield _decode(content, path, position)
                position += len(content)


def _pieces(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Cut a text at blank lines, or else at line ends, into documents of about so many bytes."""
    piece = bytearray()
    for line in _lines(file, size):
        piece += line
        if len(piece) >= size and (not line.strip() or len(piece) >= 2 * size):
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)


def _lines(file: IO[bytes], size: int) -> Iterator[bytes]:
    """A file's lines; one of more than 4 x size bytes in parts, cut at spaces or at least between characters."""
    rest = b""
    while line := rest + file.readline(4 * size - len(rest)):
        end = len(line)
        if end == 4 * size and not line.endswith(b"\n"):
            starts = (i for i in range(size, size - 4, -1) if line[i] & 0xC0 != 0x80)  # where characters begin
            end = line.rfind(b" ", 0, size) + 1 or next(starts, size)
        yield line[:end]
        rest = line[end:]


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
        except (ValueError, RecursionError) as error:
            raise CorruptRecord(f"{path}, record {row + 1}, is not JSON ({error}); mend or remove it") from None
    if not isinstance(record, dict) or source.text_field not in record:
        raise TextFieldMissing(_missing(source.text_field, list(record) if isinstance(record, dict) else [], path))
    return _checked(record[source.text_field], path, f"record {row + 1}")


def _checked(text: Any, path: str, where: str) -> str:
    """A document's text; "" for null."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise CorruptRecord(f"{path}, {where}, has a text that is {type(text).__name__}, not a string")
    return text


def _missing(text_field: str, columns: list[str], path: str) -> str:
    near = difflib.get_close_matches(text_field, columns, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return (
        f"{path} has no field {text_field!r}{hint}; its fields are {', '.join(columns) or 'none'}: set "
        f"--data.local_text_field, or text_field in config.DATASETS"
    )


def _decode(content: bytes, path: str, position: int) -> str:
    """Text of a file's bytes from a position on; a byte order mark at the file's beginning is none of it."""
    try:
        return content.decode("utf-8" if position else "utf-8-sig")
    except UnicodeDecodeError as error:
        where = position + error.start
        raise CorruptRecord(f"{path} is not UTF-8 text at byte {where}; convert it, as with iconv") from None


def _open(path: str, size: int) -> IO[bytes]:
    if not path.startswith("hf://"):
        return open(path, "rb")
    file = HubFile(path, size)
    if path.endswith(".parquet"):
        return file  # type: ignore[return-value]  # Arrow asks for just the ranges it needs
    return io.BufferedReader(file, HUB_BLOCK)
