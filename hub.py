"""The Hugging Face Hub: find a dataset's files at a pinned commit, and read them by ranges.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured: huggingface_hub reads them. `datasets` is not used
here: its builder lists a repository's other configurations too (1.6 MB against 0.4 KB for one of 10,000 files),
and its readers start a file again from its beginning.
"""

from __future__ import annotations

import gzip
import io
import json
import posixpath
import queue
import re
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec.utils
import httpx2
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from errors import UserError

PREFLIGHT_SECONDS = 12.0  # for both questions
READ_SECONDS = 20.0  # of silence in an answer
READ_MINUTES = 5.0  # for one answer, however it trickles

T = TypeVar("T")


class DataError(UserError):
    """The data cannot be read, or is not what the settings say."""

    exit_code = 3


class HubUnreachable(DataError):
    """No connection to the hub, or none that lasts: what start.sh's runs try again for as long as it takes."""

    exit_code = 7


class DatasetMissing(DataError):
    """The hub has no such repository, revision or file."""


class DatasetGated(DataError):
    """The repository wants a login or an accepted licence."""


class ConfigOrSplitMissing(DataError):
    """The repository has no such configuration, or no training split."""


Files = dict[str, tuple[int, str]]  # path -> bytes, git's hash of the content


def find_files(repository: str, name: str, revision: str | None) -> tuple[str, Files]:
    """The commit that a revision (None: the newest) is now, and the files of a configuration's training split.

    Two small questions, answered or refused within 15 seconds. Raises the DataErrors above.
    """
    api = HfApi()

    def ask() -> tuple[str, Files]:
        info = api.dataset_info(repository, revision=revision, expand=["sha", "cardData"], timeout=PREFLIGHT_SECONDS)
        card = info.card_data.to_dict() if info.card_data else {}
        files: Files = {}
        for pattern in _patterns(repository, name, card.get("configs") or []):
            folder = posixpath.dirname(re.split(r"[*?\[]", pattern)[0])
            matches = re.compile(fsspec.utils.glob_translate(pattern)).fullmatch
            deep = "**" in pattern or "/" in pattern[len(folder) :].strip("/")
            listing = api.list_repo_tree(
                repository, folder or None, recursive=deep, revision=info.sha, repo_type="dataset"
            )
            found = {e.path: (e.size, e.blob_id) for e in listing if isinstance(e, RepoFile) and matches(e.path)}
            if not found:
                raise ConfigOrSplitMissing(f"{repository} has no files {pattern} at commit {info.sha}")
            files |= found
        return str(info.sha), files

    try:
        return _within(PREFLIGHT_SECONDS, ask)  # list_repo_tree has no timeout of its own
    except Exception as error:
        raise as_data_error(error, repository) from None


def _patterns(repository: str, name: str, configs: list[dict[str, Any]]) -> list[str]:
    """The globs of a configuration's training split, from the `configs` of the dataset's card."""
    if not configs and name == "default":
        return ["data/train-*"]  # how the hub lays out a dataset that says nothing
    for config in configs:
        if config.get("config_name", "default") == name:
            files = config.get("data_files", [])
            if isinstance(files, dict):  # {split: pattern}
                files = [{"split": s, "path": p} for s, p in files.items()]
            elif isinstance(files, str) or (files and isinstance(files[0], str)):  # all of it is for training
                files = [{"split": "train", "path": files}]
            paths = {entry["split"]: entry["path"] for entry in files}
            if "train" not in paths:
                raise ConfigOrSplitMissing(f"{repository} {name} has no split train, only {', '.join(paths)}")
            path = paths["train"]
            return [path] if isinstance(path, str) else list(path)
    known = ", ".join(c.get("config_name", "default") for c in configs) or "default"
    raise ConfigOrSplitMissing(f"{repository} has no configuration {name!r}; it has {known}")


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that might never return; raises TimeoutError then, or ReadStopped when this thread has to.

    The call itself is left alone in a thread that waits for the network, in Python: that may die with the process,
    where one that waits inside Arrow aborts it.
    """
    answer: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            answer.put((call(), None))
        except Exception as error:
            answer.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    deadline = time.monotonic() + seconds
    while True:
        check_stop()
        try:
            result, error = answer.get(timeout=0.1)
            break
        except queue.Empty:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    check_stop()
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


class ReadStopped(Exception):
    """The process is closing its data; whoever reads gives up."""


reader = threading.local()  # reader.stop: an Event that ends the reads of this thread


def check_stop() -> None:
    if (stop := getattr(reader, "stop", None)) is not None and stop.is_set():
        raise ReadStopped


class HubFile(io.RawIOBase):
    """A file of the hub, read by HTTP ranges: each read fetches just the bytes it asks for, and holds no connection.

    path: hf://datasets/<repository>@<commit>/<path>. Raises httpx2's and huggingface_hub's errors as they are.
    """

    def __init__(self, path: str, size: int):
        location = re.fullmatch(r"hf://datasets/([^@]+)@([0-9a-f]+)/(.+)", path)
        assert location, path
        repository, commit, name = location.groups()
        self._url = hf_hub_url(repository, name, repo_type="dataset", revision=commit)
        self._size, self._position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        span = f"bytes={self._position}-{self._position + wanted - 1}"
        headers = build_hf_headers() | {"Range": span, "Accept-Encoding": "identity"}
        response = _within(
            READ_MINUTES * 60,
            lambda: get_session().get(self._url, headers=headers, timeout=READ_SECONDS, follow_redirects=True),
        )
        hf_raise_for_status(response)
        if len(response.content) != wanted:
            raise ConnectionError(f"{self._url}: {len(response.content)} bytes came instead of {wanted}")
        buffer[:wanted] = response.content
        self._position += wanted
        return wanted


def seconds_to_wait(error: Exception) -> float | None:
    """How long the hub asks to wait after this fault (0: it does not say); None if trying again cannot help."""
    if isinstance(error, OfflineModeIsEnabled):
        return None
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in (408, 429) and error.response.status_code < 500:
            return None
        try:
            return float(error.response.headers.get("Retry-After", 0))
        except ValueError:
            return 0.0
    transient = (OSError, EOFError, zlib.error, httpx2.TransportError)  # a dropped stream may show up inside gzip
    return 0.0 if isinstance(error, transient) else None


def as_data_error(error: Exception, what: str) -> Exception:
    """The DataError, with its remedy, that an exception of the hub's client means; others as they are."""
    if isinstance(error, OfflineModeIsEnabled):
        return DataError(
            f"HF_HUB_OFFLINE is set, so {what} cannot be read; unset it, or train on your own files with "
            f"--data.current_datasets LOCAL, or on the demo text with --preset demo"
        )
    if isinstance(error, GatedRepoError):  # a kind of RepositoryNotFoundError, so it comes first
        return DatasetGated(f"{what} is gated: accept its terms on the hub, then run hf auth login or set HF_TOKEN")
    if isinstance(error, (RevisionNotFoundError, EntryNotFoundError)):
        return DatasetMissing(f"{what} has no such revision or file on {constants.ENDPOINT}")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return DatasetMissing(
            f"{constants.ENDPOINT} has no dataset {what} that you may see: check its name, or set HF_TOKEN"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return DatasetGated(f"{constants.ENDPOINT} refuses {what} ({error.response.status_code}): set HF_TOKEN")
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 404:
        return DatasetMissing(f"{constants.ENDPOINT} has no {what}")
    if isinstance(error, (gzip.BadGzipFile, zlib.error, EOFError)):  # after all tries: not a fault of the network
        return DataError(f"{what} is damaged on {constants.ENDPOINT} ({error}); choose another revision, or other data")
    # A proxy's own page; a token with a letter that no header may have; redirections without end.
    misled = json.JSONDecodeError, UnicodeEncodeError, httpx2.RequestError
    if seconds_to_wait(error) is not None or isinstance(error, misled):
        mistyped = isinstance(error, (UnicodeEncodeError, httpx2.UnsupportedProtocol))  # no waiting mends that
        return (DataError if mistyped else HubUnreachable)(
            f"cannot read {what} from {constants.ENDPOINT} ({type(error).__name__}). Check the network, HF_ENDPOINT "
            f"and HF_TOKEN; or train without the hub: --preset demo, or your own files with "
            f"--data.current_datasets LOCAL --data.dataset_probabilities 1 --data.local_files FILE"
        )
    return error
