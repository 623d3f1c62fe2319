"""Pre-tokenized shards: tokenize once, then read any number of epochs by memory map (sources.py reads them).

    DIR/tokenizer.json
    DIR/<DATASET>/settings.json              what they were made from; checked when making goes on, and when reading
    DIR/<DATASET>/shard-00000-of-00064.bin   ids, end-of-text before each document, uint16 or uint32
    DIR/<DATASET>/shard-00000-of-00064.npy   of each document: where its ids end, and the hash of its text

The hash decides, as for text, whether a document is held out; so every val_fraction works. Each shard is a share of
the dataset that one process writes on its own, under another name until it is whole: making goes on where it was.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np

from config import DataConfig
from documents import DocumentStream
from files import PARTIAL, lock_folder, whole_file, write_json
from hub import DataError, check_stop, reader
from sources import SHARD_INDEX, Source, Tokenized, document_hash, read_shard_settings
from tokenizer import Tokenizer

FORMAT = 3


def write_shards(
    folder: Path, sources: list[Source], tokenizer: Tokenizer, config: DataConfig, n_shards: int, processes: int
) -> Iterator[tuple[str, int]]:
    """Tokenize each source into n_shards shards; yields (dataset, shards that are ready) as they get ready.

    Shards that are there already are kept. Raises DataError when they were made with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder, "choose another folder")
    path = folder / "tokenizer.json"  # one for all datasets
    if path.exists() and path.read_text().rstrip() != json.dumps(tokenizer.to_dict()):
        raise DataError(f"{folder} holds shards made with another tokenizer; choose another folder, or remove it")
    write_json(path, tokenizer.to_dict(), indent=None)
    for source in sources:
        place = folder / source.name
        place.mkdir(exist_ok=True)
        settings = {
            "format": FORMAT, "n_shards": n_shards, "n_vocab": tokenizer.n_vocab, "tokenizer": tokenizer.fingerprint,
            "source": source.identity, "max_samples": config.max_samples, "seed": config.seed,
        }  # fmt: skip
        known = read_shard_settings(place)
        if known is not None and known != settings:
            changed = ", ".join(key for key in settings if known.get(key) != settings[key])
            raise DataError(f"{place} holds shards made with another {changed}; choose another folder, or remove it")
        write_json(place / "settings.json", settings)
        paths = [place / f"shard-{i:05d}-of-{n_shards:05d}.bin" for i in range(n_shards)]
        jobs = [
            (source, tokenizer, config, i, n_shards, path)
            for i, path in enumerate(paths)
            if not (path.exists() and path.with_suffix(".npy").exists())
        ]
        ready = n_shards - len(jobs)
        yield source.name, ready
        if jobs:
            for _ in _in_processes(jobs, min(processes, len(jobs))):
                ready += 1
                yield source.name, ready
        for leftover in place.glob(f"{PARTIAL}*"):  # of processes that were killed
            leftover.unlink(missing_ok=True)
    lock.close()


def _in_processes(jobs: list[tuple], processes: int) -> Iterator[None]:
    """Write these shards, by _write_shard's arguments, so many at a time; yields as each gets ready."""
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    pool = ProcessPoolExecutor(processes, spawn, initializer=_begin_process, initargs=(stop,))
    try:
        # The processes start here, and inherit this: Ctrl-C is the first one's business alone.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        work = [pool.submit(_write_shard, *job) for job in jobs]
        signal.signal(signal.SIGINT, interrupt)
        for done in as_completed(work):
            done.result()
            yield
    except BrokenProcessPool:
        raise DataError(
            "a process that wrote shards was killed, often for want of memory; "
            "run the same command again to go on, with fewer --processes"
        ) from None
    finally:  # after a mistake or Ctrl-C the others end at their next document
        stop.set()
        pool.shutdown(cancel_futures=True)


def _begin_process(stop: Event) -> None:
    """End with the first process: when it says so, and when it is killed."""
    reader.stop = stop

    def follow() -> None:
        parent = multiprocessing.parent_process()
        assert parent
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _write_shard(
    source: Source, tokenizer: Tokenizer, config: DataConfig, shard: int, n_shards: int, path: Path
) -> None:
    """Write one shard's .bin file and its index, which comes last: a shard with an index is whole."""
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    eot = np.array([tokenizer.eot_id], dtype=dtype).tobytes()
    stream = DocumentStream(source, config, shard, n_shards, epochs=1, held_out=None)
    index: list[tuple[int, int]] = []
    end = 0
    with whole_file(path) as file:
        for document in stream:
            assert not isinstance(document, Tokenized)
            check_stop()
            ids = tokenizer.encode(document)
            file.write(eot + ids.astype(dtype).tobytes())
            end += 1 + len(ids)
            index.append((end, document_hash(document)))
    with whole_file(path.with_suffix(".npy")) as file:
        np.save(file, np.array(index, dtype=SHARD_INDEX))
