"""Mistakes a person can mend, and how a script ends: one line on stderr and an exit code, never a traceback.

Only the standard library is imported here, as in config.py, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import TextIO


class UserError(Exception):
    """A mistake a person can mend: shown as one line, without a traceback, with `exit_code`."""

    exit_code = 1


class ConfigError(UserError):
    """A setting that is impossible or contradicts another one."""

    exit_code = 2


def exit_code_of(main: Callable[[], int | None]) -> int:
    """Run a script's main; turn what a person can mend into one line on stderr and an exit code.

    Codes: 2 usage or settings (too large for the memory among them), 3 data, 4 checkpoint, 5 non-finite numbers,
    6 disk, 7 the hub cannot be reached, 75 stopped by a signal with everything saved (run again with --resume), 129,
    130 or 143 ended by a signal before training or by the third one, 141 the reader of the output has gone.
    Any other error keeps its traceback: it is a mistake of the code.
    """
    if sys.stdout is None:  # closed by the caller, as with >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # text that the terminal's encoding lacks is no reason to end
    # Read when torch is imported. Threads that wait for each other by spinning for long slow each other down as soon as
    # another program needs a core: a training step took 3.0 s; with this, 0.7; and 0.5 either way on a quiet machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:  # before or after the training loop, which has its own way to stop
        complain("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`; what was to follow is not done
        drop(sys.stdout)
        return 128 + 13  # as for a program that SIGPIPE ends
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        message, code = explained
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not isinstance(error, ConfigError):  # all processes find the same settings wrong
            complain(f"error{'' if rank == '0' else f' (process {rank})'}: {message}")
        drop(sys.stdout)  # its buffer may hold what could not be written
        return code


def explain(error: BaseException) -> tuple[str, int] | None:
    """One line and the exit code of an error that a person can mend; None for any other."""
    if isinstance(error, UserError):
        return " ".join(str(error).split()), error.exit_code
    cut_short = type(error) is OSError and error.errno is None  # numpy's, for an array that had no room
    if isinstance(error, OSError) and (cut_short or error.errno in _DISK_ERRORS):
        place = f"{error.filename}: " if error.filename else ""
        gone = error.errno == errno.ENOENT
        remedy = "has another program removed it?" if gone else "free some space, or choose a place that can be written"
        return f"{place}{error.strerror or error}; {remedy}", 6
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's, for ~name
        return "a path begins with ~ and a name that no user here has; write the whole path", 2
    # torch's own classes, by name: this module imports the standard library only.
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in _TOO_LARGE)
    if out_of_memory or isinstance(error, MemoryError):
        first = (str(error).splitlines() or ["no message"])[0]
        return f"out of memory ({first}); use a smaller batch_size (with more accumulation), context or model", 2
    return None


# What is said of arrays that do not fit, or that no memory could ever hold: by torch's allocator and numpy; and by
# CUDA, Triton and NCCL ("out of memory") and cuBLAS, which take memory of a GPU beside the allocator.
_TOO_LARGE = (
    "DefaultCPUAllocator", "Storage size calculation overflowed", "array is too big", "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
_DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR,
    errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EMFILE, errno.EFBIG, errno.ELOOP,
    errno.ESTALE, errno.EBUSY, errno.ENOTEMPTY, errno.ENOLCK,
}  # fmt: skip


def complain(message: str) -> None:
    """A line on stderr, if there is one."""
    with contextlib.suppress(OSError, AttributeError):
        print(message, file=sys.stderr, flush=True)


def drop(stream: TextIO) -> None:
    """Send what this stream holds, and all that is to come, nowhere: its reader has gone, or its disk is full."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
