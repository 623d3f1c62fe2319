"""A rented box on loopback: a real sshd, behind a wire that can break after so many bytes; beside it, a laptop."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped] # accelerate brings it

from checkpoint import _digest, list_checkpoints, verify_checkpoint
from files import write_json

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SSHD = "/usr/sbin/sshd"
Result = subprocess.CompletedProcess[str]
SUMMARY = re.compile(
    r"^\d\d:\d\d:\d\d on the box (\d+), copied (\d+)(?: \([\d.]+ \w?B, [\d.]+ \w?B/s\))?, "
    r"deleted (\d+)(?: \([\d.]+ \w?B\))?, refused (\d+)$",
    re.MULTILINE,
)


def wait_until(what: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def counts(result: Result) -> tuple[int, ...]:
    """Of a round's only line: checkpoints on the box, copied, deleted, refused."""
    (found,) = SUMMARY.findall(result.stdout)
    return tuple(map(int, found))


def damage(file: Path) -> None:
    """Change a byte; size and date stay."""
    before, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


class Wire:
    """Passes bytes between laptop and box; calls `then` once, when `at` of them have come from the box."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.listener = target, socket.create_server(("127.0.0.1", 0))
        self.do(-1, lambda: None)
        threading.Thread(target=self._accept, daemon=True).start()

    def do(self, at: int, then: Callable[[], Any]) -> None:
        self.came, self.at, self.then = 0, at, then

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                laptop, box = self.listener.accept()[0], socket.socket()
                if box.connect_ex(self.target):
                    laptop.close()
                    continue
                for source, target in ((laptop, box), (box, laptop)):
                    threading.Thread(target=self._pass, args=(source, target, source is box), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                self.came += counted * len(data)
                if counted and 0 <= self.at <= self.came:
                    self.at = -1
                    self.then()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Box:
    """A rented box, and beside it a laptop with the scripts."""

    def __init__(self, tmp: Path) -> None:
        self.tmp, self.folder, self.project = tmp, tmp / "box/checkpoints", tmp / "a laptop"
        self.local, self.hurt = self.project / "checkpoints", list[psutil.Process]()
        self.folder.mkdir(parents=True)
        (self.project / "scripts").mkdir(parents=True)
        for name in ("lib.sh", "remote.sh", "sync_checkpoints.sh", "test_remote_sync.sh", "sync_files.py"):
            shutil.copy(SCRIPTS / name, self.project / "scripts" / name)
        self.make_key("host")
        self.make_key("my key")
        (tmp / "my key.pub").rename(tmp / "authorized_keys")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = free.getsockname()
            self.wire = Wire(self.address)  # while that port is taken, so that it gets another
        self.settings = {
            "REMOTE_HOST": "127.0.0.1", "REMOTE_PORT": str(self.wire.listener.getsockname()[1]),
            "REMOTE_USER": psutil.Process().username(), "REMOTE_DIR": str(self.folder), "SSH_KEY": str(tmp / "my key"),
        }  # fmt: skip
        self.start()

    def make_key(self, name: str) -> None:
        (self.tmp / name).unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.tmp / name], check=True)

    def restart(self, *more: str, path: str = "/usr/bin:/bin") -> None:
        self.stop()
        self.start(*more, path=path)

    def start(self, *more: str, path: str = "/usr/bin:/bin") -> None:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        options = [
            "ListenAddress={}:{}".format(*self.address), f"HostKey={self.tmp / 'host'}", "PidFile=none", "UsePAM=no",
            f"AuthorizedKeysFile={self.tmp / 'authorized_keys'}", "StrictModes=no", "PasswordAuthentication=no",
            "PermitRootLogin=prohibit-password", *more,
            f"SetEnv=HOME={self.tmp} PATH={path}",  # not this machine's ~/.bashrc, which may wait for anything
        ]  # fmt: skip
        words = [word for option in options for word in ("-o", option)]
        self.sshd = psutil.Popen([SSHD, "-D", "-e", "-f", "/dev/null", *words], stderr=(self.tmp / "log").open("a"))
        wait_until(lambda: not socket.socket().connect_ex(self.address))
        assert self.sshd.poll() is None, (self.tmp / "log").read_text()

    def signal(self, which: signal.Signals, name: str = "") -> None:
        """To all that sshd has started, or only to the processes called `name`."""
        for process in self.sshd.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in process.name():
                    process.send_signal(which)
                    self.hurt.append(process)

    def stop(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.signal(signal.SIGKILL)
            self.sshd.kill()
        self.sshd.wait()
        for process in self.hurt:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def save(self, step: int, val_loss: float | None = None, run: str = "run", size: int = 20_000) -> Path:
        """A checkpoint as save_checkpoint writes it, of random bytes."""
        folder, final = self.folder / run / f".tmp-step-{step:08d}", self.folder / run / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(os.urandom(size))
        for name in ("optimizer.safetensors", "state.json", "config.json", "tokenizer.json"):
            (folder / name).write_text("{}\n")
        contents = {file.name: file.read_bytes() for file in folder.iterdir()}
        files = {name: {"size": len(data), "sha256": sha256(data).hexdigest()} for name, data in contents.items()}
        manifest: dict[str, Any] = {"format": 1, "step": step, "val_loss": val_loss, "files": files}
        write_json(folder / "manifest.json", manifest | {"sha256": _digest(manifest)})
        for name in ("config.json", "loss.png", "status.json", f"eval-{step:08d}.json"):
            (self.folder / run / name).write_text(f"{name} at {step}")
        with (self.folder / run / "metrics.jsonl").open("a") as metrics:
            metrics.write(f"at {step}\n" if metrics.tell() else f"begun at {time.time_ns()}\nat {step}\n")
        return folder.rename(final)

    def command(self, script: str, *options: str, **settings: str) -> dict[str, Any]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.tmp), "SYNC_STALL_SECONDS": "20"} | self.settings | settings
        command = [str(self.project / "scripts" / script), *options]
        return {"args": command, "env": environment, "cwd": "/", "stdin": subprocess.DEVNULL, "text": True}

    def sync(self, *options: str, script: str = "sync_checkpoints.sh", **settings: str) -> Result:
        return subprocess.run(**self.command(script, *options, **settings), capture_output=True, timeout=100)

    def check(self) -> Result:
        return self.sync(script="test_remote_sync.sh")

    def watch(self, *options: str) -> subprocess.Popen[str]:
        command = self.command("sync_checkpoints.sh", "--watch", "--interval", "1", *options)
        pipe = subprocess.PIPE
        return subprocess.Popen(**command, stdout=pipe, stderr=pipe, start_new_session=True)

    def here(self, run: str = "run") -> list[int]:
        """The steps of the checkpoints on the laptop; every byte of them is as it was written."""
        checkpoints = list_checkpoints(self.local / run)
        for checkpoint in checkpoints:
            verify_checkpoint(checkpoint.path)
        return [checkpoint.step for checkpoint in checkpoints]

    def there(self, run: str = "run") -> list[int]:
        return [checkpoint.step for checkpoint in list_checkpoints(self.folder / run)]
