"""Shards hold exactly the documents of the text, and training on them keeps every promise that test_data.py tests."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pty
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import documents
import prepare_data
import sources
from config import DataConfig
from documents import DocumentStream
from errors import ConfigError, exit_code_of
from files import lock_folder
from hub import DataError
from prepare_data import DatasetPrep
from sources import SHARD_INDEX, CorruptRecord, Source, Tokenized, document_hash, read_chunks, resolve_source
from tests.test_data import (
    BYTES,
    ROOT,
    V,
    after,
    assert_same,
    complaint,
    config_of,
    documents_of,
    global_batches,
    join,
    no_test_hangs,
    opened,
    split_documents,
    texts_of,
    tokens_of_streams,
    write_jsonl,
    write_mixed_files,
)
from tokenizer import Tokenizer, without_surrogates

__all__ = ["no_test_hangs"]  # for every test of this file as well

N_SHARDS = 3
NO_SHARDS: dict[str, Any] = {"write_shards": None, "n_shards": None, "processes": None}  # options to leave out
HALF_A_PAIR = "half \ud800 a pair"  # of surrogates, as broken JSON has it


def options(folder: Path, *files: Path, **changes: Any) -> list[str]:
    """What prepare_data.py needs to write folder/shards with a tokenizer whose tokens are bytes."""
    values = {
        "current_datasets": "LOCAL", "dataset_probabilities": 1, "n_streams": 4, "tokenizer": "bpe",
        "bpe_vocab_size": 257, "max_samples": 0, "cache_dir": folder / "cache",
    }  # fmt: skip
    others = {"write_shards": folder / "shards", "n_shards": N_SHARDS, "processes": 2}
    settings: dict[str, Any] = {f"data.{key}": changes.pop(key, value) for key, value in values.items()} | others
    settings |= {key if key in others else f"data.{key}": value for key, value in changes.items()}
    words = [word for key, value in settings.items() if value is not None for word in (f"--{key}", str(value))]
    return ["--preset", "smoke", *words, "--data.local_files", *map(str, files)]


def write(folder: Path, *files: Path, **changes: Any) -> int:
    """The exit code of writing shards."""
    return exit_code_of(lambda: prepare_data.main(options(folder, *files, **changes)))


def test_on_a_terminal_each_dataset_has_one_bar(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n\n".join(f"{n} " * 50 for n in range(200)))
    words = options(tmp_path, tmp_path / "texts.txt")
    terminal, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with subprocess.Popen([sys.executable, str(ROOT / "prepare_data.py"), *words], stderr=its_end) as process:
        os.close(its_end)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: all who wrote to it have gone
            while piece := os.read(terminal, 10_000):
                shown += piece
    os.close(terminal)
    assert process.returncode == 0, shown
    assert shown.decode().count("LOCAL:   0%") == 1


def shards_in(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("shard-*")}


@dataclass(frozen=True)
class Made:
    """Files, the documents in them, and their shards; `text` and `shards` read the one and the other."""

    files: list[Path]
    documents: list[str]
    folder: Path
    text: DataConfig
    shards: DataConfig
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    files, texts = write_mixed_files(folder / "files")
    write_jsonl(folder / "files/odd.jsonl", [HALF_A_PAIR, "", None])
    assert write(folder, *files) == 0
    text = config_of(folder, *files, tokenizer="bpe", bpe_vocab_size=257)
    tokenizer = Tokenizer.from_dict(json.loads((folder / "shards/tokenizer.json").read_text()))
    shards = dataclasses.replace(text, shards_dir=str(folder / "shards"))
    return Made(files, [*texts, HALF_A_PAIR], folder / "shards/LOCAL", text, shards, tokenizer)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> tuple[Path, DataConfig]:
    """The shards once more, to damage: their folder, and what reads them."""
    shutil.copytree(made.folder.parent, tmp_path / "shards")
    return tmp_path / "shards/LOCAL", dataclasses.replace(made.shards, shards_dir=str(tmp_path / "shards"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these few documents are several chunks and windows."""
    monkeypatch.setattr(sources, "SHARD_CHUNK", 8)
    monkeypatch.setattr(documents, "CHUNK", 20)


def decoded(made: Made, config: DataConfig, held_out: bool | None) -> list[str]:
    stream = DocumentStream(resolve_source("LOCAL", config), config, 0, 1, epochs=1, held_out=held_out)
    return [made.tokenizer.decode(d.ids[1:]) for d in stream if isinstance(d, Tokenized)]


def read_for_ever(config: DataConfig) -> None:
    with opened(config, tokenizer=None) as data:
        for _ in data:
            pass


# ---- what is in them ----------------------------------------------------------------------------


def test_shards_hold_every_document_once_with_its_ids_and_the_hash_of_its_text(made: Made) -> None:
    names = [f"shard-{i:05d}-of-{N_SHARDS:05d}.{kind}" for i in range(N_SHARDS) for kind in ("bin", "npy")]
    assert sorted(path.name for path in made.folder.iterdir()) == sorted([*names, "settings.json"])
    found = []
    for path in sorted(made.folder.glob("*.bin")):
        ids, index = np.fromfile(path, dtype=np.uint16), np.load(path.with_suffix(".npy"))
        assert index.dtype == SHARD_INDEX
        assert index["end"][-1] == len(ids)
        assert np.flatnonzero(ids == made.tokenizer.eot_id).tolist() == [0, *index["end"][:-1].tolist()]
        found += list(zip(split_documents(ids.tolist(), made.tokenizer), index["hash"].tolist(), strict=True))
    assert len(found) > 300
    assert Counter(found) == Counter((without_surrogates(t), document_hash(t)) for t in made.documents)


@pytest.mark.parametrize("val_fraction", [0.01, 0.2, 0.4])
def test_the_held_out_documents_are_those_of_the_text_at_every_val_fraction(made: Made, val_fraction: float) -> None:
    text, shards = (dataclasses.replace(c, val_fraction=val_fraction) for c in (made.text, made.shards))
    for held_out in (True, False):
        expected = [without_surrogates(t) for t in documents_of(text, held_out=held_out)]
        assert len(expected) > 1
        assert Counter(decoded(made, shards, held_out)) == Counter(expected)
    assert resolve_source("LOCAL", shards).documents == len(made.documents)
    with opened(shards, tokenizer=None) as data:  # what is held out is no epoch's
        whole = sum(path.stat().st_size for path in made.folder.glob("*.bin")) / 2
        assert data.tokens_per_epoch() == {"LOCAL": pytest.approx(whole * (1 - val_fraction), abs=1)}


def test_validation_rows_are_of_held_out_documents_only(made: Made) -> None:
    with opened(made.shards, tokenizer=None) as data:
        rows = data.validation_rows()["LOCAL"].rows
    tokens = [*rows[:, :-1].ravel().tolist()]
    held_out = {without_surrogates(t) for t in documents_of(made.text, held_out=True)}
    seen = split_documents(tokens, made.tokenizer)
    assert set(seen[:-1]) <= held_out  # the last may be cut off
    assert len(seen) >= len(held_out) - 1


def test_validation_rows_of_text_and_of_its_shards_are_the_same(made: Made) -> None:
    for val_tokens in (320, 10**6):
        found = []
        for config in (made.text, made.shards):
            with opened(dataclasses.replace(config, val_tokens=val_tokens), tokenizer=None) as data:
                found.append(np.array(data.validation_rows()["LOCAL"].rows))
        assert len(found[0]) > 5
        assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize(
    ("tokenizer", "dtype", "eot"), [("gpt2", np.uint16, 50_256), ("cl100k_base", np.uint32, 100_257)]
)
def test_ids_take_two_bytes_in_a_small_vocabulary_and_four_in_a_large_one(
    tmp_path: Path, tokenizer: Any, dtype: Any, eot: int
) -> None:
    texts = [f"{text} Ürümqi 자연어 <|endoftext|> {i}" for i, text in enumerate(texts_of("d", 12))]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    assert write(tmp_path, file, tokenizer=tokenizer, n_shards=2) == 0
    sizes = [p.stat().st_size for p in (tmp_path / "shards/LOCAL").glob("*.bin")]
    ends = [int(np.load(p)["end"][-1]) for p in (tmp_path / "shards/LOCAL").glob("*.npy")]
    assert sum(sizes) == np.dtype(dtype).itemsize * sum(ends)
    changes = {"tokenizer": tokenizer, "n_streams": 2, "val_fraction": 1e-9, "shards_dir": str(tmp_path / "shards")}
    with opened(config_of(tmp_path, file, **changes), rows=2, epochs=1, tokenizer=None) as data:
        streams, used = tokens_of_streams(list(data), 2), data.tokenizer
    assert used.eot_id == max(map(max, streams)) == eot
    held_out = min(texts, key=document_hash)  # of a few documents it is at least one
    assert sorted(t for tokens in streams for t in split_documents(tokens, used)) == sorted(set(texts) - {held_out})


# ---- training on them ---------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2])
def test_every_document_is_trained_on_once_per_epoch_in_the_same_batches_at_every_world_size(
    made: Made, epochs: int
) -> None:
    alone = list(global_batches(made.shards, 1, epochs=epochs, tokenizer=None))
    seen = [t for tokens in tokens_of_streams(alone) for t in split_documents(tokens, made.tokenizer)]
    expected = Counter(without_surrogates(t) for t in documents_of(made.text))
    assert sum(expected.values()) > 200
    assert Counter(seen) == {text: n * epochs for text, n in expected.items()}
    for world in (2, 4):
        assert_same(alone, list(global_batches(made.shards, world, epochs=epochs, tokenizer=None)))


def test_a_resumed_run_gives_the_same_next_batches_bit_for_bit(made: Made) -> None:
    with opened(made.shards, rows=8, tokenizer=None) as data:
        states, batches = [data.state_dict()], []
        for _ in range(90):
            batches.append(next(data))
            states.append(data.state_dict())
    assert max(source[0] for stream in states[-4]["streams"].values() for source in stream) >= 1, "not an epoch"
    for k in (0, 1, 2, 17, 40, 86):
        resumed, state = after(made.shards, states[k], 4, tokenizer=None)
        assert_same(resumed, batches[k : k + 4])
        assert state == states[k + 4]
    for world in (2, 4):
        ranks = [after(made.shards, states[5], 3, rank=r, world=world, tokenizer=None)[0] for r in range(world)]
        assert_same([join([part[i] for part in ranks], V) for i in range(3)], batches[5:8])


def test_documents_in_turns_as_questions_and_answers_are_in_all_streams(tmp_path: Path) -> None:
    index = np.array([(3 * i, i) for i in range(1, 961)], dtype=SHARD_INDEX)
    ids = np.tile(np.array([9, 0, 1, 9, 2, 3], dtype=np.uint16), 480)
    ids.tofile(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", index)
    source = Source("LOCAL", (str(tmp_path / "a.bin"),), (ids.nbytes,), "", 960, "", n_vocab=10)
    for n_shares in (1, 4, 7, 16):
        chunks = [[*read_chunks(source, 0, share, n_shares, 0)] for share in range(n_shares)]
        shares = [[d for chunk in its for d in chunk if isinstance(d, Tokenized)] for its in chunks]
        assert sorted(d.hash for its in shares for d in its) == list(range(1, 961))
        for its in shares:
            assert [d.ids.tolist() for d in its] == [[[9, 2, 3], [9, 0, 1]][d.hash % 2] for d in its]
            assert sum(d.hash % 2 for d in its) / len(its) == pytest.approx(0.5, abs=0.15)


def test_a_saved_position_in_the_text_is_none_in_the_shards(made: Made) -> None:
    with opened(made.text, tokenizer=made.tokenizer) as data:
        state = data.state_dict()
    with opened(made.shards, tokenizer=None) as data, pytest.raises(prepare_data.StateMismatch, match="files of LOCAL"):
        data.load_state_dict(state)


def test_max_samples_counts_documents_of_the_shards(made: Made) -> None:
    config = dataclasses.replace(made.shards, max_samples=50)
    seen = decoded(made, config, None)
    assert len(seen) == 50
    assert Counter(decoded(made, config, True) + decoded(made, config, False)) == Counter(seen)


def test_the_preview_shows_shards_too(made: Made, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shown = options(tmp_path, *made.files, shards_dir=made.folder.parent, **NO_SHARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", iter(range(10**9)).__next__)  # it looks for five seconds
        assert prepare_data.main(shown) == 0
    out = capsys.readouterr().out
    assert f"LOCAL      {N_SHARDS:>8}{len(made.documents):>13}" in out
    assert "--- row 1" in out


# ---- making them --------------------------------------------------------------------------------


def test_writing_killed_midway_goes_on_to_the_same_bytes_and_leaves_finished_shards_alone(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{k}.jsonl", texts_of(f"d{k}x", 1200, words=120)) for k in range(3)]
    n, changes = 8, {"tokenizer": "gpt2", "n_shards": 8}
    process = subprocess.Popen(
        [sys.executable, "prepare_data.py", *options(tmp_path / "killed", *files, **changes)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    place = tmp_path / "killed/shards/LOCAL"
    try:
        while len(list(place.glob("*.npy"))) < 3:
            assert process.poll() is None
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # and its workers
        process.wait()
    finished, before = {path.stem for path in place.glob("*.npy")}, stamps(place)
    assert 3 <= len(finished) < n
    config = config_of(tmp_path, *files, tokenizer="gpt2", shards_dir=str(place.parent))
    assert f"{len(finished)} of {n} shards; run prepare_data.py --write_shards" in complaint(
        config, DataError, read_for_ever
    )
    (place / f".tmp-shard-00007-of-{n:05d}.bin.1").write_text("half a sh")  # one that was being written
    assert write(tmp_path / "killed", *files, **changes) == 0
    assert write(tmp_path / "whole", *files, **changes, processes=1) == 0
    assert shards_in(place.parent) == shards_in(tmp_path / "whole/shards")
    now = stamps(place)
    assert {name for name in before if now[name] == before[name]} >= {
        f"{stem}.{kind}" for stem in finished for kind in ("bin", "npy")
    }
    assert write(tmp_path / "killed", *files, **changes) == 0
    assert stamps(place) == now


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that write shards; not Python's own that keeps count of semaphores."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [pid for pid in found if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("killed", ["a worker", "the first process", "Ctrl-C"])
def test_a_killed_process_ends_them_all_and_writing_goes_on_where_it_was(tmp_path: Path, killed: str) -> None:
    files = [write_jsonl(tmp_path / f"{k}.jsonl", texts_of(f"d{k}x", 1200, words=120)) for k in range(3)]
    command = [sys.executable, "prepare_data.py", *options(tmp_path, *files, tokenizer="gpt2", n_shards=8)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        place = tmp_path / "shards/LOCAL"
        while not list(place.glob("*.npy")):
            assert process.poll() is None
            time.sleep(0.002)
        workers = workers_of(process)
        assert len(workers) == 2
        if killed == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(workers[0] if killed == "a worker" else process.pid, signal.SIGKILL)
        _, err = process.communicate(timeout=100)
        deadline = time.monotonic() + 60
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if killed == "a worker":
        assert process.returncode == 3
        (line,) = err.splitlines()
        assert line.startswith("error: a process that wrote shards was killed, often for want of memory; run the same")
    elif killed == "Ctrl-C":
        assert (process.returncode, err) == (130, "interrupted\n")
    assert len(list(place.glob("*.npy"))) < 8
    assert write(tmp_path, *files, tokenizer="gpt2", n_shards=8) == 0
    assert sorted(path.suffix for path in place.iterdir()) == [".bin"] * 8 + [".json"] + [".npy"] * 8


def test_a_disk_that_cannot_be_written_is_an_error_with_its_number_and_place(tmp_path: Path) -> None:
    """Raised by the process that writes, and whole again in the first one; nothing half made is left."""
    file = write_jsonl(tmp_path / "a.jsonl", texts_of("d", 400, words=120))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))  # which the processes inherit
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            prepare_data.main(options(tmp_path, file, n_shards=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert str(caught.value.filename).startswith(f"{tmp_path}/shards/LOCAL/.tmp-shard-0000")
    assert [path.name for path in (tmp_path / "shards/LOCAL").iterdir()] == ["settings.json"]


@pytest.mark.parametrize("words", [("--n_shards", "0"), ("--processes", "-1"), ("--plot", "lengths")])
def test_an_impossible_option_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str]
) -> None:
    assert exit_code_of(lambda: prepare_data.main([*options(tmp_path, tmp_path / "none.txt"), *words])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words[0].removeprefix('--')} is ")


@pytest.mark.parametrize("name", ["n_shards", "processes"])
def test_an_option_of_shards_without_their_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert write(tmp_path, tmp_path / "none.txt", **NO_SHARDS | {name: 3}) == 2
    assert f"{name} is for --write_shards" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
def test_a_shard_that_was_removed_is_made_again(
    made: Made, copy: tuple[Path, DataConfig], tmp_path: Path, suffix: str
) -> None:
    place, config = copy
    (place / f"shard-00001-of-{N_SHARDS:05d}{suffix}").unlink()
    message = complaint(config, DataError, read_for_ever)
    assert f"{place} holds 2 of 3 shards; run prepare_data.py --write_shards {place.parent} again" in message
    before = stamps(place)
    assert write(tmp_path, *made.files) == 0
    assert shards_in(place) == shards_in(made.folder)
    others = [name for name in before if "00001" not in name]
    assert {name: stamps(place)[name] for name in others} == {name: before[name] for name in others}


OTHERS: dict[str, dict[str, Any]] = {
    "n_shards": {"n_shards": 4},
    "max_samples": {"max_samples": 50},
    "seed": {"seed": 1},
    "tokenizer": {"tokenizer": "gpt2"},
    "source": {},
}


@pytest.mark.parametrize("named", OTHERS)
def test_other_settings_are_refused_by_name_and_change_nothing(
    made: Made, copy: tuple[Path, DataConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str], named: str
) -> None:
    files = [write_jsonl(tmp_path / "other.jsonl", texts_of("o", 90))] if named == "source" else made.files
    before = shards_in(tmp_path / "shards"), stamps(copy[0])
    assert write(tmp_path, *files, **OTHERS[named]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert f"made with another {named}; choose another folder" in line
    assert (shards_in(tmp_path / "shards"), stamps(copy[0])) == before


def test_a_dataset_of_another_tokenizer_does_not_go_into_the_same_folder(
    copy: tuple[Path, DataConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the folder's one tokenizer.json would be wrong for the dataset that was there first."""
    before = shards_in(tmp_path / "shards")
    words = ["--preset", "smoke", "--data.cache_dir", str(tmp_path), "--write_shards", str(tmp_path / "shards")]
    assert exit_code_of(lambda: prepare_data.main([*words, "--data.tokenizer", "gpt2"])) == 3
    assert "made with another tokenizer" in capsys.readouterr().err
    assert shards_in(tmp_path / "shards") == before


def test_a_damaged_record_ends_the_writing_by_name_and_its_shard_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*texts_of("d", 40), 5])
    assert write(tmp_path, file, tokenizer="gpt2") == 3
    assert f"{file}, record 41, has a text that is int" in capsys.readouterr().err
    assert len(list((tmp_path / "shards/LOCAL").glob("*.npy"))) < N_SHARDS


def test_more_shards_than_documents_are_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", texts_of("d", 2))
    assert write(tmp_path, file, tokenizer="gpt2") == 3
    assert "smaller --n_shards" in capsys.readouterr().err


# ---- reading what is not right --------------------------------------------------------------------


def test_a_folder_without_shards_is_told_with_how_to_make_them(made: Made, tmp_path: Path) -> None:
    message = complaint(dataclasses.replace(made.shards, shards_dir=str(tmp_path)), DataError, read_for_ever)
    assert f"holds no shards of LOCAL; make them with python prepare_data.py --write_shards {tmp_path}" in message


@pytest.mark.parametrize("changes", [{"tokenizer": "gpt2"}, {"bpe_vocab_size": 300}], ids=["name", "vocabulary"])
def test_training_with_another_tokenizer_is_a_mistake_in_the_settings(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    shown = options(tmp_path, *made.files, shards_dir=made.folder.parent, **NO_SHARDS | changes)
    assert exit_code_of(lambda: prepare_data.main(shown)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "use --data.tokenizer bpe --data.bpe_vocab_size 257" in line


def test_a_checkpoint_s_tokenizer_must_be_that_of_the_shards(made: Made) -> None:
    with pytest.raises(DataError, match="another tokenizer"):
        DatasetPrep(made.shards, 32, V, tokenizer=BYTES)  # as many entries, in another order
    with pytest.raises(DataError, match="leave --data"):  # the data options are those of the checkpoint
        DatasetPrep(dataclasses.replace(made.shards, tokenizer="gpt2"), 32, V, tokenizer=BYTES)
    DatasetPrep(made.shards, 32, V, tokenizer=made.tokenizer)


@pytest.mark.parametrize("document", [0, 8, 30, -1])
def test_a_bad_id_is_named_with_its_file_document_and_vocabulary(copy: tuple[Path, DataConfig], document: int) -> None:
    place, config = copy
    path = place / f"shard-00002-of-{N_SHARDS:05d}.bin"
    ends = np.load(path.with_suffix(".npy"))["end"]
    document %= len(ends)
    ids = np.memmap(path, dtype=np.uint16, mode="r+")
    for where in (int(ends[document]) - 1, int(ends[document - 1]) if document else 0):  # its last id, its first
        ids[where] = 257
        message = complaint(config, CorruptRecord, read_for_ever)
        assert message == f"{path}, document {document}, has the id 257 in a vocabulary of 257"
        ids[where] = 0


@pytest.mark.parametrize(
    ("suffix", "how"),
    [(s, h) for s in (".bin", ".npy") for h in ("half", "an id", "a byte", "all")] + [(".bin", "too long")],
)
def test_a_truncated_shard_is_refused_by_name(copy: tuple[Path, DataConfig], suffix: str, how: str) -> None:
    place, config = copy
    path = place / f"shard-00000-of-{N_SHARDS:05d}{suffix}"
    content = path.read_bytes()
    size = {"half": len(content) // 4 * 2, "an id": len(content) - 2, "a byte": len(content) - 1, "all": 0}
    path.write_bytes(content[: size[how]] if how in size else content[:-16] + content[-32:])
    kind = DataError if suffix == ".bin" and how in ("a byte", "all") else CorruptRecord
    message = complaint(config, kind, read_for_ever)
    assert message.startswith(str(path))


def test_shards_of_another_tokenizer_of_the_same_size_are_refused(copy: tuple[Path, DataConfig]) -> None:
    _, config = copy
    path = Path(config.shards_dir) / "tokenizer.json"
    values = json.loads(path.read_text())
    values["tokens"][65], values["tokens"][66] = values["tokens"][66], values["tokens"][65]
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match="made with another tokenizer"):
        DatasetPrep(config, 16, 4)


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "\x00", '{"n_shards": 3, "n_vocab": null, "tokenizer": ""}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "LOCAL/settings.json"])
def test_damaged_settings_of_shards_are_one_line(copy: tuple[Path, DataConfig], name: str, content: str) -> None:
    _, config = copy
    (Path(config.shards_dir) / name).write_text(content)
    with pytest.raises(DataError, match="damaged"):
        DatasetPrep(config, 16, 4)


def test_a_second_writer_of_the_same_folder_is_sent_away(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", texts_of("d", 60))
    (tmp_path / "shards").mkdir()
    lock = lock_folder(tmp_path / "shards", "choose another folder")
    with pytest.raises(
        ConfigError, match=rf"shards is in use by process {os.getpid()}; stop it or choose another folder"
    ):
        prepare_data.main(options(tmp_path, file, n_shards=2))
    lock.close()
    assert prepare_data.main(options(tmp_path, file, n_shards=2)) == 0


def test_shards_are_not_made_of_shards(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", texts_of("d", 60))
    with pytest.raises(ConfigError, match="leave one of them out"):
        prepare_data.main([*options(tmp_path, file, n_shards=2), "--data.shards_dir", str(tmp_path)])
