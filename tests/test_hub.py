"""The hub as it is on a bad day: dropped, reset and short answers, limits, refusals, silence.

A loopback hub (tests/loopback_hub.py) answers the real client. That client reads HF_ENDPOINT when it is imported,
so what reads runs in a process of its own: the script, or one worker that the tests of this file share.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import documents
import prepare_data
from config import DATASETS, DataConfig, Dataset
from documents import DocumentStream
from hub import ConfigOrSplitMissing, DataError, DatasetGated, DatasetMissing, HubUnreachable, as_data_error
from prepare_data import DatasetPrep, StateMismatch
from sources import CorruptRecord, Source, resolve_source
from tests.loopback_hub import (
    GATED,
    MISSING,
    NO_FILE,
    NO_REVISION,
    RATE_LIMITED,
    Fault,
    Hub,
    document,
    make_fineweb_and_c4,
    write_card,
)
from tokenizer import BPE_PATTERN, END_OF_TEXT, Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_NotToBeSeenAnywhere0123456789"
DOCUMENTS = 640  # of each dataset
FINEWEB = DATASETS["FINEWEB"].location


# ---- what the worker does: these functions run in the other process ------------------------------


def read_batches(n: int, folder: str, seed: int = 1337, state: Any = None, local: str = "") -> tuple[str, Any]:
    """A digest of the next n batches of FINEWEB and C4, and the state behind them as JSON.

    local: read the same files below this folder in place of the hub's.
    """
    documents.RETRY_SECONDS = (0,) * 10
    patch = pytest.MonkeyPatch()
    config = DataConfig(n_streams=8, val_fraction=0.05, seed=seed, cache_dir=folder)
    tokenizer = Tokenizer("bytes", BPE_PATTERN, [bytes([i]) for i in range(256)], {END_OF_TEXT: 256})
    try:
        if local:
            patch.setattr(prepare_data, "resolve_source", lambda name, c: on_disk(resolve_source(name, c), Path(local)))
        data = DatasetPrep(config, 64, 64, tokenizer=tokenizer)
        digest = hashlib.sha256()
        try:
            if state:
                data.load_state_dict(json.loads(state))
            for _ in range(n):
                batch = next(data)
                digest.update(batch.inputs.tobytes() + batch.targets.tobytes() + batch.sources.tobytes())
        finally:
            data.close()
        return digest.hexdigest(), json.dumps(data.state_dict())
    finally:
        patch.undo()
        forget()


def forget() -> None:
    """Footers of parquet files are kept for a process's life."""
    import sources

    sources._parquet_footer.cache_clear()


def on_disk(source: Source, root: Path) -> Source:
    located = [f.removeprefix("hf://datasets/").partition("@") for f in source.files]
    files = tuple(str(root / repository / rest.partition("/")[2]) for repository, _, rest in located)
    return dataclasses.replace(source, files=files)


def held_out_digest(folder: str) -> str:
    documents.RETRY_SECONDS = (0,) * 10
    data = DatasetPrep(DataConfig(n_streams=8, val_fraction=0.05, cache_dir=folder), 64, 64)
    rows = [its.rows for its in data.validation_rows().values()]
    forget()
    return hashlib.sha256(b"".join(array.tobytes() for array in rows)).hexdigest()


def documents_behind(location: str, position: list[int] | None, n: int) -> tuple[list[str], list[int]]:
    """n documents of a dataset in one stream from a position on, and the position behind them."""
    DATASETS["BIG"] = Dataset("hub", location, "default")
    config = DataConfig(("BIG",), (1.0,), n_streams=1)
    stream = DocumentStream(resolve_source("BIG", config), config, 0, 1, None)
    stream.seek(position or [0, 0, 0, 0, 0])
    texts = [str(text) for text in itertools.islice(stream, n)]
    forget()
    return texts, stream.position


# ---- the hub and its clients ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    make_fineweb_and_c4(root, DOCUMENTS)
    return root


@pytest.fixture(scope="module")
def running_hub(root: Path) -> Iterator[Hub]:
    with Hub(root) as hub:
        yield hub


@pytest.fixture
def hub(running_hub: Hub) -> Iterator[Hub]:
    """The hub without faults, and nothing asked yet."""
    running_hub.faults = lambda path: None
    running_hub.requests.clear()
    running_hub.tokens.clear()
    yield running_hub
    running_hub.faults = lambda path: None


Work = Callable[..., Any]


@pytest.fixture(scope="module")
def work(running_hub: Hub) -> Iterator[Work]:
    """Calls a function of this file in the worker, whose hub is the loopback hub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", running_hub.endpoint)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result(60)  # the worker is started, with this environment

    def call(function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        return pool.submit(function, *arguments, **more).result(timeout=60)

    yield call
    for process in pool._processes.values():
        process.kill()  # it may hang in a read
    pool.shutdown()


@dataclass
class Finished:
    code: int
    out: str
    err: str
    seconds: float


def script(endpoint: str, *options: str, **environment: str) -> Finished:
    """python prepare_data.py as a user starts it."""
    command = [sys.executable, "prepare_data.py", *options]
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN} | environment
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


def assert_refused(done: Finished, *said: str, code: int = 3) -> None:
    """This exit code and one line, soon, that says this and no secret."""
    assert done.code == code, done.err
    assert done.err.startswith("error: ")
    assert len(done.err.splitlines()) == 1, done.err
    for words in said:
        assert words in done.err
    assert TOKEN not in done.err
    assert done.seconds < 15


class Bursts:
    """Faults: a share of the answers with content is spoiled, two or three in a row, by each kind in turn."""

    def __init__(self, kinds: list[Fault], share: float = 0.4) -> None:
        self.met = 0
        self._kinds, self._share, self._left = kinds, share, 0
        self._rng, self._lock = random.Random(0), threading.Lock()

    def __call__(self, path: str) -> Fault | None:
        if "/resolve/" not in path:
            return None
        with self._lock:
            if not self._left and self._rng.random() < self._share / 2.5:
                self._left = self._rng.choice((2, 3))
            if not self._left:
                return None
            self._left -= 1
            self.met += 1
            return self._kinds[self.met % len(self._kinds)]


def resolved(hub: Hub) -> list[list[Any]]:
    """The requests for content of files."""
    return [request for request in hub.requests if "/resolve/" in request[1]]


# ---- the same batches, whatever happens -----------------------------------------------------------

N = 60  # batches; an epoch is about 100


@pytest.fixture(scope="module")
def clean(work: Work, root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """The batches of the files themselves, read from disk."""
    result: tuple[str, Any] = work(read_batches, N, str(tmp_path_factory.mktemp("cache")), local=str(root))
    return result


def test_the_hub_gives_the_batches_that_its_files_give_each_time(
    hub: Hub, work: Work, clean: tuple[str, Any], tmp_path: Path
) -> None:
    for _ in range(2):
        assert work(read_batches, N, str(tmp_path)) == clean
    assert {path.rsplit(".", 1)[1] for _, path, _ in resolved(hub)} == {"parquet", "gz"}
    assert work(read_batches, N, str(tmp_path), seed=1)[0] != clean[0]


FAULTS: dict[str, list[Fault]] = {
    "connections dropped before the answer": [Fault(drop_after=0)],
    "connections dropped in the answer": [Fault(drop_after=1), Fault(drop_after=1000), Fault(drop_after=9000)],
    "connections reset before the answer": [Fault(drop_after=0, reset=True)],
    "connections reset in the answer": [Fault(drop_after=1, reset=True), Fault(drop_after=9000, reset=True)],
    "answers cut short": [Fault(truncate_to=0), Fault(truncate_to=1), Fault(truncate_to=9000)],
    "server errors": [Fault(500), Fault(502), Fault(503), Fault(504), Fault(408)],
    "rate limits": [Fault(429, {"Retry-After": "0.02"}), Fault(429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})],
    "all of it": [
        Fault(drop_after=10),
        Fault(drop_after=10, reset=True),
        Fault(truncate_to=10),
        Fault(503),
        Fault(429),
    ],
}


@pytest.mark.parametrize("kinds", FAULTS.values(), ids=list(FAULTS))
def test_faults_do_not_change_the_batches(
    hub: Hub, work: Work, clean: tuple[str, Any], tmp_path: Path, kinds: list[Fault]
) -> None:
    bursts = hub.faults = Bursts(kinds)
    assert work(read_batches, N, str(tmp_path)) == clean
    assert bursts.met > 20


def test_a_rate_limit_is_waited_for_as_long_as_the_hub_asks(
    hub: Hub, work: Work, clean: tuple[str, Any], tmp_path: Path
) -> None:
    times: list[float] = []

    def faults(path: str) -> Fault | None:
        if path.endswith(".gz"):
            times.append(time.monotonic())
            return RATE_LIMITED if len(times) <= 2 else None
        return None

    hub.faults = faults
    assert work(read_batches, N, str(tmp_path)) == clean
    assert times[1] - times[0] >= 1.0
    assert times[2] - times[1] >= 1.0


def test_a_run_stopped_on_one_day_goes_on_from_the_hub_on_the_next(
    hub: Hub, work: Work, clean: tuple[str, Any], tmp_path: Path
) -> None:
    for k in (1, 31):
        _, state = work(read_batches, k, str(tmp_path))
        digest, end = work(read_batches, N - k, str(tmp_path), state=state)
        hub.faults = Bursts(FAULTS["all of it"])
        assert work(read_batches, N - k, str(tmp_path), state=state) == (digest, end)
        hub.faults = lambda path: None
        assert end == clean[1]
        assert TOKEN not in state


def test_held_out_rows_from_the_hub_are_the_same_with_faults(hub: Hub, work: Work, tmp_path: Path) -> None:
    first = work(held_out_digest, str(tmp_path / "a"))
    bursts = hub.faults = Bursts(FAULTS["all of it"], share=0.8)
    assert work(held_out_digest, str(tmp_path / "b")) == first
    assert bursts.met > 5


# ---- never tried again, or not for ever -------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (Fault(401), DatasetGated),
        (MISSING, DatasetMissing),
        (Fault(403), DatasetGated),
        (GATED, DatasetGated),
        (Fault(404), DatasetMissing),
        (NO_FILE, DatasetMissing),
        (NO_REVISION, DatasetMissing),
    ],
    ids=["401", "401 missing", "403", "403 gated", "404", "404 file", "404 revision"],
)
@pytest.mark.parametrize("where", ["/api/datasets/", "/resolve/"])
def test_a_refusal_is_asked_for_once(
    hub: Hub, work: Work, tmp_path: Path, where: str, fault: Fault, kind: type[Exception]
) -> None:
    hub.faults = lambda path: fault if where in path else None
    with pytest.raises((DatasetGated, DatasetMissing)) as error:
        work(read_batches, 1, str(tmp_path))
    assert type(error.value) is kind or fault.status == 401
    assert TOKEN not in str(error.value)
    assert len([path for _, path, _ in hub.requests if where in path]) == 1


def test_faults_that_last_end_the_run_after_all_tries(hub: Hub, work: Work, tmp_path: Path) -> None:
    for fault in (Fault(503), Fault(drop_after=0, reset=True)):
        hub.requests.clear()
        hub.faults = lambda path, fault=fault: fault if "/resolve/" in path else None  # type: ignore[misc]
        with pytest.raises(HubUnreachable, match="Check the network"):
            work(read_batches, 1, str(tmp_path))
        assert len(resolved(hub)) == 11


# ---- which data it is ---------------------------------------------------------------------------------


def test_a_new_commit_of_the_card_alone_is_the_same_data_and_of_a_file_is_not(
    hub: Hub, work: Work, tmp_path: Path, root: Path
) -> None:
    digest, state = work(read_batches, 2, str(tmp_path))
    card, file = root / "allenai/c4/README.md", root / "allenai/c4/en/c4-train.00001-of-00004.json.gz"
    before = card.read_text(), file.read_bytes()
    try:
        card.write_text(before[0] + "\nMore words.\n")
        hub.requests.clear()
        assert work(read_batches, 2, str(tmp_path))[0] == digest
        work(read_batches, 1, str(tmp_path), state=state)
        file.write_bytes(before[1][:-1])
        with pytest.raises(StateMismatch, match="files of C4 changed"):
            work(read_batches, 1, str(tmp_path), state=state)
    finally:
        card.write_text(before[0])
        file.write_bytes(before[1])


def test_a_configuration_that_is_missing_is_told_with_those_that_exist(hub: Hub, work: Work, root: Path) -> None:
    write_card(root / "org/other", configs=[{"config_name": n, "data_files": "*.parquet"} for n in ("small", "large")])
    with pytest.raises(ConfigOrSplitMissing, match="no configuration 'default'; it has small, large"):
        work(documents_behind, "org/other", None, 1)
    splits = [{"split": name, "path": f"{name}.parquet"} for name in ("test", "dev")]
    write_card(root / "org/test-only", configs=[{"config_name": "default", "data_files": splits}])
    with pytest.raises(ConfigOrSplitMissing, match="no split train, only test, dev"):
        work(documents_behind, "org/test-only", None, 1)
    write_card(root / "org/nothing")
    with pytest.raises((ConfigOrSplitMissing, DatasetMissing)):
        work(documents_behind, "org/nothing", None, 1)
    assert not resolved(hub)


@pytest.mark.parametrize(
    "configs",
    [
        [],
        [{"config_name": "default", "data_files": "data/train-*"}],
        [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
        [{"config_name": "default", "data_files": {"train": "data/*", "test": "other/*"}}],
        [
            {
                "data_files": [
                    {"split": "test", "path": "x"},
                    {"split": "train", "path": ["**/train-00000*", "data/*1-of-*"]},
                ]
            }
        ],
    ],
    ids=["no configuration", "one pattern", "splits", "splits by name", "patterns in a list"],
)
def test_a_card_may_say_in_any_of_the_usual_ways_where_its_files_are(
    hub: Hub, work: Work, root: Path, configs: list[Any]
) -> None:
    repo = f"org/card{hashlib.sha1(repr(configs).encode()).hexdigest()[:8]}"
    write_card(root / repo, **({"configs": configs} if configs else {}))
    (root / repo / "data").mkdir()
    texts = [f"document {i}" for i in range(10)]
    for k in range(2):
        pq.write_table(pa.table({"text": texts[k::2]}), root / repo / f"data/train-0000{k}-of-00002.parquet")
    drawn, _ = work(documents_behind, repo, None, 9)
    assert len(set(drawn)) == 9
    assert set(drawn) <= set(texts)


def test_resuming_at_90_percent_of_a_parquet_file_reads_less_than_5_percent_of_it(
    hub: Hub, work: Work, root: Path
) -> None:
    rng = random.Random(0)
    texts = [rng.randbytes(200).hex() for _ in range(40_000)]
    path = root / "org/big/data/train-0.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=200)
    _, position = work(documents_behind, "org/big", None, 36_000 * 995 // 1000)
    assert position[4] == pytest.approx(36_000, rel=0.01)
    assert sum(sent for _, _, sent in resolved(hub)) > 0.8 * path.stat().st_size
    hub.requests.clear()
    drawn, _ = work(documents_behind, "org/big", position, 50)
    assert set(drawn) <= set(texts)
    assert sum(sent for _, _, sent in resolved(hub)) < 0.05 * path.stat().st_size


def test_a_damaged_parquet_footer_is_named_and_not_taken_for_a_network_that_failed(
    hub: Hub, work: Work, root: Path
) -> None:
    write_card(root / "org/damaged", configs=[{"config_name": "default", "data_files": "*.parquet"}])
    path = root / "org/damaged/train.parquet"
    pq.write_table(pa.table({"text": ["a text"] * 100}), path)
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[:start] + b"\xff" * 20 + content[start + 20 :])
    with pytest.raises(CorruptRecord, match=r"train\.parquet is not a parquet file, or a truncated one"):
        work(documents_behind, "org/damaged", None, 1)
    assert len(resolved(hub)) < 6  # of ten tries, with pauses, some 20


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (gzip.BadGzipFile("CRC check failed"), 3),
        (zlib.error("invalid distance"), 3),
        (EOFError("ended before the end-of-stream marker"), 3),
        (ConnectionError("10 bytes came instead of 20"), 7),
        (httpx2.ConnectError("refused"), 7),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_damaged_file_ends_a_run_and_a_connection_that_fails_is_worth_another_start(error: Exception, code: int):
    explained = as_data_error(error, "allenai/c4")
    assert isinstance(explained, DataError)
    assert explained.exit_code == code
    assert "allenai/c4" in str(explained)


# ---- the script -----------------------------------------------------------------------------------------


def test_an_unreachable_hub_is_told_with_what_to_do_without_it(root: Path) -> None:
    with Hub(root) as gone:
        pass
    done = script(gone.endpoint)
    assert_refused(done, f"cannot read HuggingFaceFW/fineweb from {gone.endpoint}", "--preset demo", "LOCAL", code=7)
    assert done.seconds < 10


def test_a_proxy_s_own_page_is_an_unreachable_hub(hub: Hub) -> None:
    hub.faults = lambda path: Fault(truncate_to=10)
    assert_refused(script(hub.endpoint), "cannot read HuggingFaceFW/fineweb", "Check the network", code=7)


@pytest.mark.slow
def test_a_hub_that_never_answers_is_unreachable_within_15_seconds(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, Hub(root) as hub:
        hub.faults = lambda path: Fault(stall=60) if "/tree/" in path else None
        with ThreadPoolExecutor() as pool:
            for done in pool.map(script, [f"http://127.0.0.1:{silent.getsockname()[1]}", hub.endpoint]):
                assert_refused(done, "cannot read HuggingFaceFW/fineweb", "Check the network", code=7)


def test_hub_offline_is_said_to_be_the_reason(hub: Hub) -> None:
    assert_refused(script(hub.endpoint, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE is set", "unset it")
    assert not hub.requests


def test_a_dataset_that_does_not_exist_is_told_from_one_that_is_gated(hub: Hub, tmp_path: Path) -> None:
    hub.faults = lambda path: MISSING if FINEWEB in path else None
    assert_refused(script(hub.endpoint), "has no dataset HuggingFaceFW/fineweb", "check its name")
    hub.faults = lambda path: GATED if FINEWEB in path else None
    assert_refused(script(hub.endpoint), "HuggingFaceFW/fineweb is gated", "accept its terms", "HF_TOKEN")
    hub.faults = lambda path: GATED if "/resolve/" in path else None
    assert_refused(script(hub.endpoint, "--data.cache_dir", str(tmp_path)), "is gated", "accept its terms")


@pytest.mark.parametrize("environment", [{"HF_ENDPOINT": "127.0.0.1"}, {"HF_TOKEN": "hf_abc…"}], ids=str)
def test_what_is_mistyped_in_the_environment_is_named(hub: Hub, environment: dict[str, str]) -> None:
    assert_refused(script(hub.endpoint, **environment), "Check the network, HF_ENDPOINT and HF_TOKEN")


def test_a_configuration_that_does_not_exist_is_told_with_those_that_do(tmp_path: Path) -> None:
    make_fineweb_and_c4(tmp_path, 8)
    names = ("default", "sample-350BT", "CC-MAIN-2013-20")
    configs = [{"config_name": n, "data_files": [{"split": "train", "path": "data/*/*"}]} for n in names]
    write_card(tmp_path / FINEWEB, configs=configs)
    with Hub(tmp_path) as hub:
        assert_refused(script(hub.endpoint), "no configuration 'sample-10BT'", "default, sample-350BT, CC-MAIN-2013-20")


@pytest.mark.slow
def test_the_preview_of_the_default_preset_reads_the_hub(hub: Hub, tmp_path: Path) -> None:
    options = ["--preset", "fineweb", "--model.max_length", "64", "--data.cache_dir", str(tmp_path)]
    done = script(hub.endpoint, *options)
    assert done.code == 0, done.err
    table, *rows = done.out.split("\n--- row ")
    assert len(rows) == 2
    assert max(map(len, table.splitlines())) <= 100
    for word in ("FINEWEB", "C4", "14,868,862"):
        assert word in table
    assert re.search(r"FINEWEB (59\.[5-9]|60\.[0-4])\d% of 60%", table)  # of what it reads in some seconds
    assert any(word in done.out for word in document("fineweb", 0).split()[3:])
    assert TOKEN not in done.out + done.err
    assert f"Bearer {TOKEN}" in hub.tokens, "gated data could not be read"


LEAVE_WHILE_READING = """
import collections, contextlib, sys, threading, time
from config import DataConfig
from prepare_data import DatasetPrep
from tokenizer import *
tokenizer = Tokenizer("bytes", BPE_PATTERN, [bytes([i]) for i in range(256)], {END_OF_TEXT: 256})
data = DatasetPrep(DataConfig(n_streams=8, cache_dir=sys.argv[1]), 512, 64, tokenizer=tokenizer)
def take() -> None:
    with contextlib.suppress(RuntimeError):  # closed
        collections.deque(data, 0)
threading.Thread(target=take, daemon=True).start()
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("silence", [0.0, 0.1, 0.2], ids=["a quick hub", "a slow hub", "a slower hub"])
def test_a_process_that_reads_the_hub_exits_cleanly_and_soon(hub: Hub, tmp_path: Path, silence: float) -> None:
    hub.faults = lambda path: Fault(stall=silence) if "/resolve/" in path else None
    env = os.environ | {"HF_ENDPOINT": hub.endpoint}
    options: dict[str, Any] = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    commands = [[sys.executable, "-c", LEAVE_WHILE_READING, str(tmp_path), wait] for wait in ("0.2", "0.6", "1")]
    processes = [subprocess.Popen(command, **options) for command in commands]
    assert [(p.communicate(timeout=100)[0], p.returncode) for p in processes] == [(b"", 0)] * 3
