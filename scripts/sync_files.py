"""What sync_checkpoints.sh leaves to Python: manifests, sha256, flushing to the disk.

Only the standard library, from Python 3.8 on: a laptop need not have what training needs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_LISTED = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*)/(?:config\.json|(step-[0-9]{8})/manifest\.json)")
_STAY = 2  # so many of the newest checkpoints stay on the box, and the best


class Remote(NamedTuple):
    """A complete checkpoint on the box. manifest: sha256 of manifest.json itself; size: bytes of the other files."""

    name: str
    manifest: str
    size: int
    val_loss: float


def plan(listing: bytes, local: Path) -> Iterator[tuple[Any, ...]]:
    """What is to be done. Of the names on the box, only those that no shell minds come through.

    listing: what list_script in remote.sh prints. Yields ("remote", how many are complete), ("run", run) to take its
    small files, ("copy" or "delete", run, step, manifest, size), ("note" or "refuse", text). First to copy: what was
    begun, then the newest. First to delete: the oldest.
    """
    runs: dict[str, list[Remote]] = {}
    began: dict[str, bytes] = {}
    fields = listing.split(b"\0")[1:]
    for path, content in zip(fields[::2], fields[1::2]):  # noqa: B905 (strict= came with 3.10)
        listed = _LISTED.fullmatch(path.decode("ascii", "replace"))
        if not listed:
            yield "note", f"left alone on the box: {ascii(path)[2:-1]}, by its name not a checkpoint of ours"
            continue
        run, step = listed.groups()
        runs.setdefault(run, [])
        if not step:
            began[run] = content
        if not step or not content:  # a checkpoint that vanished while it was listed
            continue
        manifest = read_manifest(content)
        if manifest is None or manifest["step"] != int(step[5:]):
            yield "refuse", f"{run}/{step} on the box: manifest.json is damaged"
            continue
        loss = float("inf") if manifest["val_loss"] is None else manifest["val_loss"]
        size = sum(file["size"] for file in manifest["files"].values())
        runs[run].append(Remote(step, hashlib.sha256(content).hexdigest(), size, loss))
    yield "remote", sum(map(len, runs.values()))
    for run, checkpoints in sorted(runs.items()):
        theirs = max((c.name for c in checkpoints), default="")
        ours = max((p.parent.name for p in local.glob(f"{run}/step-????????/manifest.json")), default="")
        where = local / run
        if ours and began.get(run) and _first_line(where / "metrics.jsonl") not in (b"", began[run]):
            yield (
                "note",
                f"left alone: the box has begun {run} anew, and {where} is of the run before; move {where} away, and "
                f"the new one is copied",
            )
        elif theirs < ours:  # its metrics.jsonl would replace ours
            yield (
                "note",
                f"left alone: the box has {run} at {theirs or 'no checkpoint'}, {where} is at {ours}. If that is "
                f"another run of the same name, move {where} away; otherwise it goes on when the box has passed it",
            )
        else:
            yield "run", run
            yield from _plan_run(run, sorted(checkpoints), local)


def _plan_run(run: str, checkpoints: list[Remote], local: Path) -> Iterator[tuple[Any, ...]]:
    best = min(checkpoints, key=lambda c: (c.val_loss, -int(c.name[5:])), default=None)
    missing = []
    for c in checkpoints:
        ours = local / run / c.name
        if _manifest_hash(ours) != c.manifest:  # not here, or since written anew, as a run does after a spike
            missing.append(c)
        elif c not in checkpoints[-_STAY:] and c != best:
            yield "delete", run, c.name, c.manifest, c.size
    missing.sort(key=lambda c: ((local / run / f".sync-{c.name}").exists(), c.name), reverse=True)
    yield from (("copy", run, c.name, c.manifest, c.size) for c in missing)


def read_manifest(content: bytes) -> dict[str, Any] | None:
    """A manifest as checkpoint.py writes it, naming only files of its own folder; else None."""
    try:
        manifest: dict[str, Any] = json.loads(content)
        rest = {key: value for key, value in manifest.items() if key != "sha256"}
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
        plain = all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) for name in manifest["files"])
        plain &= all(type(file["size"]) is int and type(file["sha256"]) is str for file in manifest["files"].values())
        plain &= type(manifest["step"]) is int and isinstance(manifest["val_loss"], (int, float, type(None)))
        return manifest if plain and manifest["sha256"] == digest else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def damage(folder: Path, expected: str) -> str:
    """How a checkpoint differs from its manifest, whose own sha256 is `expected`; empty: not at all."""
    manifest = read_manifest((folder / "manifest.json").read_bytes()) if _manifest_hash(folder) == expected else None
    if manifest is None:
        return "manifest.json is not the one that was listed"
    for name, written in manifest["files"].items():
        file = folder / name
        if file.is_symlink() or not file.is_file() or file.stat().st_size != written["size"]:
            return f"{name} is missing or not as long as it was written"
        if _sha256(file) != written["sha256"]:
            return f"{name} is damaged: its bytes are not those that were written"
    return ""


def _first_line(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.readline()


def _manifest_hash(folder: Path) -> str:
    path = folder / "manifest.json"
    return _sha256(path) if path.is_file() and not path.is_symlink() else ""


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main(command: str, *arguments: str) -> int:
    """plan LISTING LOCAL_DIR | verify FOLDER MANIFEST | commit PART MANIFEST FOLDER | lock DESCRIPTOR OWNER

    verify also flushes to the disk, and commit then gives the folder its name; what has it is put aside.
    0: done; 2: locked by another (its name is printed); 4: damaged (how); 6: disk.
    """
    if command == "plan":
        for words in plan(Path(arguments[0]).read_bytes(), Path(arguments[1])):
            print(*words, sep="\t")
    elif command == "lock":  # an open file of the calling shell, which keeps the lock
        try:
            fcntl.flock(int(arguments[0]), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(os.pread(int(arguments[0]), 100, 0).decode(errors="replace"))
            return 2
        os.ftruncate(int(arguments[0]), 0)
        os.pwrite(int(arguments[0]), arguments[1].encode(), 0)
    else:
        folder = Path(arguments[0])
        found = damage(folder, arguments[1])
        if found:
            print(found)
            return 4
        for path in (*folder.iterdir(), folder):
            _flush(path)
        if command == "commit":
            final = Path(arguments[2])
            if final.exists():
                final.rename(final.with_name(f"replaced-{final.name}-{_manifest_hash(final)[:8]}"))
            folder.rename(final)
        _flush(folder.parent)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main(*sys.argv[1:]))
    except OSError as error:
        print(f"{error.filename}: {error.strerror}")
        raise SystemExit(6) from None
