"""Files that are whole or not there, folders that one process has to itself, and how a run stands."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from errors import ConfigError

PARTIAL = ".tmp-"  # what names of unfinished files and folders begin with; a process that was killed leaves them


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that has its name, or replaces the one that had it, when all of it is on the disk.

    Creates its folder. An OSError always names a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's number alone: two containers that share a disk may count alike.
    partial = path.with_name(f"{PARTIAL}{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = error.filename or str(partial)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which gets its name when all of it is on the disk.

    What a killed process left of it is taken away. Raises ConfigError when the name is taken (by more than an empty
    folder), or while another process is at it.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"{path} exists already; choose another name, or remove it first")
    partial = path.with_name(f"{PARTIAL}{path.name}")
    partial.mkdir(parents=True, exist_ok=True)
    with lock_folder(partial, "choose another name") as lock:
        try:
            for leftover in partial.iterdir():
                if leftover.name != ".lock":
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield partial
            for file in partial.iterdir():
                flush(file)
            Path(lock.name).unlink()
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path, remedy: str) -> IO[str]:
    """Hold folder/.lock, until the returned file is closed or the process ends. Raises ConfigError if another does."""
    lock = (folder / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # any other error: a disk that has no locks
        lock.seek(0)
        owner = lock.read().strip() or "?"
        raise ConfigError(f"{folder} is in use by process {owner}; stop it or {remedy}") from None
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def check_lock(lock: IO[str]) -> None:
    """Raises ConfigError when a lock_folder's folder was removed, and another process has one in its place."""
    path = Path(lock.name)
    owner = path.read_text() if path.exists() else ""
    if owner not in ("", str(os.getpid())):
        raise ConfigError(f"{path.parent} was removed, and process {owner} has begun another there")


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """A whole file of JSON. Raises ValueError for a NaN, which JSON does not have."""
    text = json.dumps(value, indent=indent, allow_nan=False) + "\n"
    with whole_file(path) as file:
        file.write(text.encode())


def write_status(run_dir: Path, outcome: str, step: int, **details: Any) -> None:
    """status.json: how the run stands or ended, for scripts (launchers do not pass exit codes on).

    outcome: running, complete, stopped (resume it) or failed (with the exit code and the error). A run that was killed,
    or ended by its watchdog, still says running, with the number of a process that is gone.
    """
    status = {"outcome": outcome, "step": step, "time": round(time.time(), 3), "process": os.getpid(), **details}
    write_json(run_dir / "status.json", status)


def write_failure(run_dir: Path, message: str, exit_code: int) -> None:
    """Note in status.json that this process's run failed; nothing if the status is another process's."""
    try:
        status = json.loads((run_dir / "status.json").read_text())
        if status["outcome"] == "running" and status["process"] == os.getpid():
            write_status(run_dir, "failed", status["step"], exit_code=exit_code, error=message)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the error itself, perhaps of this very disk, is what the person should see
