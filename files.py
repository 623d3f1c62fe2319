"""Files that are whole or not there: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

PARTIAL = ".tmp-"  # what names of unfinished files and folders begin with; a process that was killed leaves them


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that has its name, or replaces the one that had it, when all of it is on the disk.

    Creates its folder. An OSError always names a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{PARTIAL}{path.name}.{os.getpid()}")
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


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """A whole file of JSON. Raises ValueError for a NaN, which JSON does not have."""
    text = json.dumps(value, indent=indent, allow_nan=False) + "\n"
    with whole_file(path) as file:
        file.write(text.encode())
