"""Copying checkpoints from a rented box over connections that break, beside a run that goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import checkpoint
from tests.loopback_box import SSHD, SUMMARY, Box, counts, damage, wait_until

REPO, MB = Path(__file__).resolve().parent.parent, 1_000_000
MISSING = ["openssh-server"] * (not Path(SSHD).is_file()) + ["rsync"] * (not shutil.which("rsync"))
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs Debian's {' and '.join(MISSING)}")


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    yield box
    box.stop()
    box.wire.listener.close()


def test_complete_checkpoints_and_the_runs_files_are_copied_once(box: Box) -> None:
    box.save(1), box.save(2, run="other.run-2"), box.save(3)
    shutil.copytree(box.folder / "run/step-00000003", box.folder / "run/.tmp-step-00000004")
    shutil.copytree(box.folder / "run/step-00000003", box.folder / "run/step-00000005")
    (box.folder / "run/step-00000005/manifest.json").unlink()
    first = box.sync()
    assert (first.stderr, first.returncode, counts(first)) == ("", 0, (3, 2 + 1, 0, 0))
    assert (box.here(), box.here("other.run-2")) == ([1, 3], [2])
    names = {path.name for path in (box.local / "run").iterdir()}
    small = {"config.json", "metrics.jsonl", "loss.png", "status.json", "eval-00000001.json", "eval-00000003.json"}
    assert names == small | {"step-00000001", "step-00000003"}
    assert (box.local / "run/metrics.jsonl").read_text().endswith("\nat 1\nat 3\n")
    box.save(6)
    second = box.sync("--local-dir", str(box.local))
    assert (second.returncode, counts(second)) == (0, (4, 1, 0, 0))
    assert box.here() == [1, 3, 6]
    wait_until(lambda: not box.sshd.children())  # it leaves no connection open


BREAKS = {
    "sshd killed": lambda box: box.signal(signal.SIGKILL, "sshd"),
    "sshd frozen": lambda box: box.signal(signal.SIGSTOP, "sshd"),
    "rsync frozen": lambda box: box.signal(signal.SIGSTOP, "rsync"),
}


def break_and_go_on(box: Box, how: str, at: int) -> tuple[float, int]:
    """Copy over a connection that breaks after `at` bytes, then again: seconds until that was noticed, bytes then."""
    box.wire.do(at, lambda: BREAKS[how](box))
    began = time.monotonic()
    broken = box.sync(SYNC_STALL_SECONDS="2")
    seconds = time.monotonic() - began
    assert (broken.stdout, broken.returncode) == ("", 1)
    assert re.fullmatch(r"error: .*; the next try goes on where this one stopped\n", broken.stderr)
    assert box.here() == []
    box.signal(signal.SIGKILL)
    box.wire.do(-1, lambda: None)
    again = box.sync()
    assert (again.stderr, again.returncode, counts(again)) == ("", 0, (1, 1, 0, 0))
    assert box.here() == [1]
    return seconds, box.wire.came


@pytest.mark.parametrize(("how", "at"), [("sshd killed", 6.8), ("sshd frozen", 1.2), ("rsync frozen", 10.5)])
def test_a_copy_goes_on_where_the_connection_broke(box: Box, how: str, at: float) -> None:
    box.save(1, size=12 * MB)
    seconds, came = break_and_go_on(box, how, int(at * MB))
    assert seconds < 30
    assert came < (12 - at + 3) * MB  # ssh keeps up to 2 MB for itself, and loses them


@pytest.mark.slow
def test_a_copy_goes_on_from_twenty_places(box: Box) -> None:
    size = 20 * MB
    box.save(1, size=size)
    for i in range(20):
        at, how = i * MB + 20_000, list(BREAKS)[i % 3]
        seconds, came = break_and_go_on(box, how, at)
        print(f"{how:<13} after {at / MB:5.2f} MB: noticed in {seconds:4.1f} s, then {came / MB:5.2f} MB more")
        assert came < size - at + 3 * MB
        shutil.rmtree(box.local / "run")


def test_a_damaged_file_on_the_box_is_refused_and_all_else_goes_on(box: Box) -> None:
    for step in range(1, 6):
        box.save(step, val_loss=5 - step)
    damage(box.folder / "run/step-00000002/model.safetensors")
    manifest = box.folder / "run/step-00000004/manifest.json"
    manifest.write_text(manifest.read_text().replace('"val_loss": 1', '"val_loss": 9'))
    result = box.sync("--delete")
    assert (result.returncode, counts(result)) == (4, (3, 3, 1, 2))
    refused = sorted(result.stderr.splitlines())
    assert [line.split(" on the box: ")[0] for line in refused] == [f"refused: run/step-0000000{i}" for i in (2, 4)]
    assert "model.safetensors is damaged" in refused[0]
    assert "manifest.json is damaged" in refused[1]
    assert box.here() == [1, 3, 5]
    assert box.there() == [2, 3, 4, 5]


def test_what_an_earlier_round_left_is_mended_although_size_and_date_agree(box: Box) -> None:
    saved = box.save(1)
    part = box.local / "run/.sync-step-00000001"
    shutil.copytree(saved, part)
    damage(part / "model.safetensors")
    assert (box.sync().returncode, box.here()) == (0, [1])


def test_a_checkpoint_that_vanishes_while_others_are_copied_is_no_error(box: Box) -> None:
    for step in (1, 2, 3):
        box.save(step, size=2 * MB)
    box.wire.do(MB, lambda: shutil.rmtree(box.folder / "run/step-00000002"))  # while 3 is copied
    result = box.sync()
    assert (result.stderr, result.returncode, counts(result)) == ("", 0, (3, 2, 0, 0))
    box.save(4, size=8 * MB)
    box.wire.do(MB, lambda: shutil.rmtree(box.folder / "run/step-00000004"))  # itself
    result = box.sync()
    assert (result.stderr, result.returncode, counts(result)) == ("", 0, (3, 0, 0, 0))
    assert box.here() == [1, 3]
    assert not list(box.local.glob("run/.sync-*"))


def test_delete_leaves_the_newest_two_and_the_best(box: Box) -> None:
    for step, val_loss in enumerate((3.0, 1.0, 1.5, 2.5), start=1):
        box.save(step, val_loss)
    shutil.copytree(box.folder, box.local)
    box.save(5), box.save(1, run="short"), box.save(2, run="short")
    (box.folder / "run/.deleting-step-00000009").mkdir()  # left by a deletion that was interrupted
    result = box.sync("--delete")
    assert (result.stderr, result.returncode, counts(result)) == ("", 0, (5, 3, 2, 0))
    assert (box.here(), box.here("short")) == ([1, 2, 3, 4, 5], [1, 2])
    assert (box.there(), box.there("short")) == ([2, 4, 5], [1, 2])
    assert not list((box.folder / "run").glob(".deleting-*"))
    assert counts(box.sync("--delete")) == (5, 0, 0, 0)


def test_delete_leaves_what_is_damaged_here(box: Box) -> None:
    for step in range(1, 6):
        box.save(step)
    shutil.copytree(box.folder, box.local)
    damage(box.local / "run/step-00000001/model.safetensors")
    (box.local / "run/step-00000002/state.json").unlink()
    result = box.sync("--delete")
    assert (result.returncode, counts(result)) == (4, (4, 0, 1, 2))
    assert re.fullmatch("(refused: .*; remove it to copy it again from the box\n){2}", result.stderr)
    assert box.there() == [1, 2, 4, 5]


def test_delete_looks_at_the_box_again_at_the_last_moment(box: Box) -> None:
    for step in range(1, 5):
        box.save(step)
    shutil.copytree(box.folder, box.local)
    box.save(1, run="prepared")
    (box.tmp / "tools").mkdir()
    (box.tmp / "tools/python3").write_text(  # when 1 and 2 have been verified here, the box has another 1, and no 4
        f'#!/bin/sh\n"{sys.executable}" "$@" || exit\ncd "{box.folder}"\ncase "$*" in\n'
        "*verify*step-00000001*) rm -r run/step-00000001 && mv prepared/step-00000001 run ;;\n"
        "*verify*step-00000002*) rm -r run/step-00000004 ;;\nesac\n"
    )
    (box.tmp / "tools/python3").chmod(0o755)
    result = box.sync("--delete", PATH=f"{box.tmp / 'tools'}:{os.environ['PATH']}")
    assert (result.stderr, result.returncode, counts(result)[2]) == ("", 0, 0)
    assert box.there() == [1, 2, 3]
    box.save(5)
    assert (box.sync("--delete").returncode, box.here(), box.there()) == (0, [1, 2, 3, 4, 5], [3, 5])
    (old,) = box.local.glob("run/replaced-step-00000001-*")
    checkpoint.verify_checkpoint(old)


def test_a_run_that_the_box_has_begun_anew_replaces_nothing_even_when_it_is_further_on(box: Box) -> None:
    box.save(10)
    assert box.sync().returncode == 0
    before = {path: path.read_bytes() for path in (box.local / "run").rglob("*") if path.is_file()}
    shutil.rmtree(box.folder / "run")
    for step in (5, 10, 11, 12, 13):
        box.save(step)
        result = box.sync("--delete")
        assert (result.returncode, counts(result)[1:]) == (0, (0, 0, 0))
        assert re.fullmatch(r"left alone: the box has begun run anew, .*; move \S.*/run away, and .*\n", result.stderr)
    assert {path: path.read_bytes() for path in (box.local / "run").rglob("*") if path.is_file()} == before
    assert box.there() == [5, 10, 11, 12, 13]
    (box.local / "run").rename(box.local / "the old run")
    assert (box.sync().stderr, box.here(), box.here("the old run")) == ("", [5, 10, 11, 12, 13], [10])


def test_a_run_that_the_box_has_at_an_earlier_step_goes_on_when_it_has_passed_ours(box: Box) -> None:
    box.save(5), box.save(10)
    assert box.sync().returncode == 0
    shutil.rmtree(box.folder / "run/step-00000010")
    result = box.sync("--delete")
    assert (result.returncode, counts(result)) == (0, (1, 0, 0, 0))
    assert "the box has run at step-00000005" in result.stderr
    box.save(11)
    assert (box.sync().returncode, box.here()) == (0, [5, 10, 11])


def test_a_run_that_is_a_link_to_a_larger_disk_is_copied_like_any_other(box: Box) -> None:
    for step in range(1, 5):
        box.save(step)
    (box.folder / "run").rename(box.tmp / "larger")
    (box.folder / "run").symlink_to(box.tmp / "larger")
    (box.tmp / "larger here").mkdir()
    box.local.mkdir()
    (box.local / "run").symlink_to(box.tmp / "larger here")
    result = box.sync("--delete")
    assert (result.stderr, result.returncode, counts(result)) == ("", 0, (2, 4, 2, 0))
    assert (box.here(), box.there(), (box.local / "run").is_symlink()) == ([1, 2, 3, 4], [3, 4], True)
    assert (box.tmp / "larger here/metrics.jsonl").exists()


def test_names_that_a_shell_would_mind_reach_none(box: Box) -> None:
    saved = box.save(1)
    names = ["a b", "-rf", "$(touch pwned)", "`touch pwned`", "x;touch pwned", "line\nline", "*", "ü"]
    for name in names:
        shutil.copytree(saved, box.folder / name / "step-00000001")
    for name in ("2", "00000001.old", "0000000x", *names):
        shutil.copytree(saved, box.folder / "run" / f"step-{name}")
    result = box.sync("--delete")
    assert (result.returncode, counts(result)) == (0, (1, 1, 0, 0))
    assert len(result.stderr.splitlines()) == len(names) + len(names) + 3
    assert not list(box.tmp.rglob("pwned"))
    assert {path.name for path in box.local.iterdir()} == {"run", ".sync-lock"}


def test_a_second_sync_ends_and_names_the_first(box: Box) -> None:
    box.save(1)
    first = box.watch()
    wait_until(lambda: box.here() == [1])
    second = box.sync()
    assert (second.stdout, second.returncode) == ("", 2)
    assert f"process {first.pid}, started 20" in second.stderr
    first.kill()  # a lock that outlived it would be in the way of the next
    first.communicate()
    assert box.sync().returncode == 0


def test_a_watcher_outlives_a_broken_connection_and_an_absent_box(box: Box) -> None:
    box.save(1, size=4 * MB)
    box.wire.do(2 * MB, lambda: box.signal(signal.SIGKILL, "sshd"))
    watcher = box.watch("--delete")
    assert watcher.stdout
    wait_until(lambda: box.here() == [1])
    box.stop()
    box.save(2), box.save(3)
    time.sleep(1.5)
    box.start()
    wait_until(lambda: box.here() == [1, 2, 3] and box.there() == [2, 3])
    copied = 0
    while copied < 3:
        copied += int(SUMMARY.findall(watcher.stdout.readline())[0][1])
    watcher.terminate()
    _, err = watcher.communicate(timeout=60)
    assert watcher.returncode == 143
    assert re.fullmatch(r"(\d\d:\d\d:\d\d .*; trying again in \d+ s\n){2,}", err)


@pytest.mark.parametrize("when", ["copying", "waiting"])
def test_ctrl_c_ends_it_quietly(box: Box, when: str) -> None:
    box.save(1, size=4 * MB)
    if when == "copying":
        box.wire.do(2 * MB, lambda: box.signal(signal.SIGSTOP, "sshd"))
    watcher = box.watch("--interval", "60")
    if when == "copying":
        wait_until(lambda: box.hurt)
    else:
        assert watcher.stdout
        assert SUMMARY.match(watcher.stdout.readline())
    began = time.monotonic()
    os.killpg(watcher.pid, signal.SIGINT)
    out, err = watcher.communicate(timeout=60)
    assert (out, err, watcher.returncode) == ("", "", 130)
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):  # it leaves nothing behind
        wait_until(lambda: os.killpg(watcher.pid, 0), 30)
    box.signal(signal.SIGKILL)
    assert (box.sync().stderr, box.here()) == ("", [1])


def test_options_come_before_the_environment_and_that_before_the_file(box: Box) -> None:
    box.save(1)
    right, wrong = box.settings, {"REMOTE_PORT": "1", "REMOTE_DIR": "/nowhere"}
    file, box.settings = box.project / ".sync.env", {}
    lines = [f'{name}="{value}"' if name == "SSH_KEY" else f"{name}={value}" for name, value in right.items()]
    file.write_text("# a box\r\n\r\n" + "  # rented\r\n".join(lines))
    assert box.sync().returncode == 0
    file.write_text("\n".join(f"export {name}='{value}'" for name, value in (right | wrong).items()))
    assert box.sync().returncode == 1
    assert box.sync(**{name: right[name] for name in wrong}).returncode == 0
    options = [f"--remote-port={right['REMOTE_PORT']}", "--remote-dir", right["REMOTE_DIR"]]
    assert box.sync(*options, **wrong).returncode == 0


@pytest.mark.parametrize(
    ("options", "lines", "words"),
    [
        (["--remote-port", "1"], [], "REMOTE_HOST is not set; put REMOTE_HOST=... and REMOTE_PORT=... into .sync.env"),
        (["--wach"], [], "unknown option --wach; see"),
        (["--remote-port"], [], "--remote-port needs a value"),
        (["--remote-host", "-oProxyCommand=touch pwned"], ["REMOTE_PORT=1"], "REMOTE_HOST is"),
        ([], ["REMOTE_HOST=box; touch pwned", "REMOTE_PORT=1"], "REMOTE_HOST is 'box; touch pwned'"),
        ([], ["REMOTE_HOST=box", "REMOTE_PORT=1", "REMOTE_DIR=/a/$(touch pwned)"], "REMOTE_DIR is"),
        ([], ["REMOTE_HOST=box", "REMOTE_PORT=1", "SSH_KEY=~/none"], "none', which is not a private key"),
        ([], ["REMOTE_HOST=box", "PASSWORD=hunter2"], ".sync.env line 2: there is no setting PASSWORD, only"),
        ([], ["touch pwned"], ".sync.env line 1 is not of the form NAME=value"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(box: Box, options: list[str], lines: list[str], words: str) -> None:
    box.settings = {}
    (box.project / ".sync.env").write_text("\n".join(lines))
    result = box.sync(*options)
    assert (result.stdout, result.returncode) == ("", 2)
    assert re.fullmatch(r"error: [^\n]*\n", result.stderr)
    assert words in result.stderr
    assert "hunter2" not in result.stderr
    assert not list(box.tmp.rglob("pwned"))


def without_rsync(box: Box) -> None:
    (box.tmp / "tools").mkdir()
    for name in ("sh", "cat", "sha256sum"):
        (box.tmp / "tools" / name).symlink_to(f"/usr/bin/{name}")
    box.restart(path=str(box.tmp / "tools"))


@pytest.mark.parametrize(
    ("what", "code", "words", "ticks"),
    [
        (lambda box: box.settings.update(REMOTE_PORT="1"), 1, "is still its port? (a restart changes it)", 3),
        (lambda box: box.make_key("my key"), 2, "set SSH_KEY to the private half", 4),
        (lambda box: (box.tmp / "my key").chmod(0o644), 2, "chmod 600", 2),
        (lambda box: (box.tmp / "my key").rename(box.tmp / "key"), 2, "give the file without .pub", 1),
        (lambda box: (box.sync(), box.make_key("host"), box.restart()), 2, "remove .sync.known_hosts", 4),
        (without_rsync, 2, "apt-get", 5),
        (lambda box: box.restart('ForceCommand=echo Hi; exec sh -c "$SSH_ORIGINAL_COMMAND"'), 2, "no_auto_tmux", 9),
        (lambda box: shutil.rmtree(box.folder), 2, "set REMOTE_DIR to the folder checkpoints", 6),
    ],
    ids=["port", "key", "mode", "no key", "host key", "rsync", "greeting", "folder"],
)
def test_both_scripts_say_what_to_do(box: Box, what: Callable[[Box], Any], code: int, words: str, ticks: int) -> None:
    box.save(1)
    what(box)
    result = box.sync()
    assert (result.stdout, result.returncode) == ("", code)
    assert re.fullmatch(r"error: [^\r\n]*\n", result.stderr)
    assert words in result.stderr
    check = box.check()
    assert (check.returncode, words in check.stderr) == (code, True), check
    assert [line[2] for line in check.stdout.splitlines()] == ["✓"] * ticks + ["✗"]


def test_a_tool_that_is_missing_here_and_a_file_that_cannot_be_read_are_told_as_such(box: Box) -> None:
    box.save(1)
    tools = box.tmp / "here"
    tools.mkdir()
    for folder in ("/bin", "/usr/bin"):
        for path in Path(folder).iterdir():
            if path.name != "rsync" and not (tools / path.name).is_symlink():
                (tools / path.name).symlink_to(path)
    result = box.sync(PATH=str(tools))
    assert (result.returncode, result.stderr) == (
        2,
        "error: no rsync here; ./scripts/test_remote_sync.sh says how to install it\n",
    )
    script = f"""
        source scripts/remote.sh
        tmp={box.tmp} REMOTE_HOST=box REMOTE_PORT=1 REMOTE_USER=root REMOTE_DIR=/x
        end_child() {{ :; }}
        echo 'rsync: [sender] send_files failed to open "/x/demo/loss.png": Permission denied (13)' >{box.tmp}/errors
        echo 'rsync error: some files could not be transferred (code 23)' >>{box.tmp}/errors
        explain 23; echo "$? $problem"
        echo 'root@box: Permission denied (publickey,password).' >{box.tmp}/errors
        explain 255; echo "$? $problem"
    """
    done = subprocess.run(["bash", "-c", script], cwd=REPO, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    failed = 'rsync: [sender] send_files failed to open "/x/demo/loss.png": Permission denied'
    assert lines[0] == f"2 a file cannot be read or written: {failed}"
    assert lines[1].startswith("2 box port 1 knows no key of yours for root; set SSH_KEY")


def test_the_check_ticks_all_that_the_sync_needs(box: Box) -> None:
    none_yet = box.check()
    assert (none_yet.returncode, "wait until the run has saved one" in none_yet.stderr) == (1, True)
    box.save(1)
    before = sorted(box.folder.rglob("*"))
    done = box.check()
    assert (done.stderr, done.returncode) == ("", 0)
    *lines, last = done.stdout.splitlines()
    whats = "tools here, settings, key, port, login, tools there, folder, checkpoint, disk here, round trip"
    assert [line.split(": ")[0] for line in lines] == [f"  ✓ {what}" for what in whats.split(", ")]
    assert last == "All is well. Now: ./scripts/sync_checkpoints.sh --watch"
    assert sorted(box.folder.rglob("*")) == before


def test_a_runs_retention_does_not_stumble_over_a_checkpoint_that_has_just_gone(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 5):
        box.save(step)
    found = checkpoint.list_checkpoints(box.folder / "run")
    shutil.rmtree(found[0].path)
    monkeypatch.setattr(checkpoint, "list_checkpoints", lambda run: found)
    checkpoint._remove_old(box.folder / "run", 2, 0)
    assert box.there() == [3, 4]


TRAINING = """
import random, shutil, sys, time
from pathlib import Path
import torch, checkpoint
from config import PRESETS
from tokenizer import train_bpe

def rmtree(path, *rest, real=shutil.rmtree, **options):
    if Path(path).name.startswith(".tmp-old-") and Path(path).exists():
        print(int(Path(path).name[-8:]), flush=True)
    real(path, *rest, **options)

checkpoint.shutil.rmtree = rmtree  # only to print what the run's own retention removes
run, config, tokenizer = Path(sys.argv[1]), PRESETS["smoke"], train_bpe(["to be or not to be"], 260)
config.train.keep_checkpoints = 6
lock = checkpoint.open_run(run)
for step in range(1, 51):
    tensors = {name: {"w": torch.randn(100_000)} for name in ("model", "optimizer")}
    checkpoint.save_checkpoint(run, step, tensors, {}, config, tokenizer, random.uniform(2, 4))
    time.sleep(random.uniform(0, 1.2))
"""


@pytest.mark.slow
def test_beside_a_run_with_its_own_retention_nothing_is_lost(box: Box) -> None:
    run, fewest, over = box.folder / "run", [99], threading.Event()
    command, pipe = [sys.executable, "-c", TRAINING, str(run)], subprocess.PIPE
    writer = subprocess.Popen(command, cwd=REPO, stdout=pipe, stderr=pipe, text=True)
    wait_until(lambda: len(list(run.glob("step-*"))) >= 2)

    def observe() -> None:  # twice: a folder that is read while names change may miss a new one
        while not over.wait(0.002):
            fewest.append(max(sum(name.startswith("step-") for name in os.listdir(run)) for _ in range(2)))

    observer = threading.Thread(target=observe)
    observer.start()
    watcher = box.watch("--delete")
    assert watcher.stdout
    removed, error = writer.communicate(timeout=150)
    assert (writer.returncode, error) == (0, "")
    wait_until(lambda: len(box.there()) <= 3 and 50 in box.here())
    rounds: list[list[int]] = []
    while sum(r[1] for r in rounds) < len(box.here()) or any(rounds[-1][1:]):  # until nothing was left to do
        rounds += [[int(n) for n in found] for found in SUMMARY.findall(watcher.stdout.readline())]
    watcher.send_signal(signal.SIGINT)
    _, err = watcher.communicate(timeout=60)
    over.set()
    observer.join()
    own, here, deleted = {int(n) for n in removed.split()}, set(box.here()), sum(r[2] for r in rounds)
    print(f"{len(rounds)} rounds, {len(here)} of 50 copied, {deleted} deleted; {len(own)} removed by the run itself, "
          f"{len(own - here)} not copied before; fewest on the box {min(fewest)}")  # fmt: skip
    assert here | own == set(range(1, 51))
    assert (err, sum(r[1] for r in rounds)) == ("", len(here))
    assert min(deleted, len(own)) > 0
    assert min(fewest) >= 2
    everywhere = checkpoint.list_checkpoints(box.local / "run") + checkpoint.list_checkpoints(run)
    best = min(everywhere, key=lambda c: c.val_loss or 9).step
    assert set(box.there()) == {best, 49, 50}
    assert not list(box.local.glob("run/.sync-*"))
