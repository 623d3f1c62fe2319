"""A loopback Hugging Face Hub, so that tests exercise the real client code offline and with faults.

with Hub(root) as hub:  # the clients read HF_ENDPOINT when they are imported, so set it for a subprocess
    hub.faults = lambda path: GATED if "/resolve/" in path else None
    subprocess.run([...], env=os.environ | {"HF_ENDPOINT": hub.endpoint})
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer; a status of 200 keeps the answer and spoils its delivery."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stall: float = 0.0  # seconds of silence before the answer; with drop_after, before the drop
    drop_after: int | None = None  # bytes of the body, then the connection is closed
    reset: bool = False  # the drop is a reset (RST), as of a crashed proxy, and not an orderly end (FIN)
    truncate_to: int | None = None  # bytes of the body, announced as if they were all


MISSING = Fault(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})
GATED = Fault(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this dataset is restricted."})
NO_REVISION = Fault(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
NO_FILE = Fault(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
RATE_LIMITED = Fault(429, {"Retry-After": "1"})


class Hub:
    """Serves every folder root/<org>/<name> as a dataset repository whose only branch is main.

    endpoint  the URL, for HF_ENDPOINT
    requests  [method, unquoted path, bytes of body sent] of every answer, from before its first byte: what a client
              has an answer to is here
    tokens    what clients sent as Authorization
    faults    called with the path of each request; a Fault replaces or spoils the answer
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.requests: list[list[Any]] = []
        self.tokens: set[str] = set()
        self.faults: Callable[[str], Fault | None] = lambda path: None
        self.connections: set[socket.socket] = set()
        self.closing = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Refuse new connections and cut those that clients keep open: the hub is unreachable from now on."""
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def tree(self, repo: str) -> dict[str, dict[str, Any]]:
        """The hub's description of every file and folder, by name."""
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted((self.root / repo).rglob("*")):
            name, stat = path.relative_to(self.root / repo).as_posix(), path.stat()
            oid = hashlib.sha1(f"{name} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
            kind, size = ("directory", 0) if path.is_dir() else ("file", stat.st_size)
            entries[name] = {"type": kind, "path": name, "size": size, "oid": oid}
        return entries

    def answer(self, path: str, query: dict[str, list[str]]) -> Any:
        """JSON, a Fault, or (commit, description, path) of a file."""
        parts = path.removeprefix("/api").removeprefix("/datasets/").split("/", 4)
        repo, (verb, revision, file) = "/".join(parts[:2]), (*parts[2:], "", "", "")[:3]
        if not (self.root / repo).is_dir():
            return MISSING
        tree = self.tree(repo)
        sha = hashlib.sha1(repr([(e["path"], e["oid"]) for e in tree.values()]).encode()).hexdigest()
        if revision not in ("", "main", sha):
            return NO_REVISION
        if verb in ("", "revision"):
            readme = self.root / repo / "README.md"
            card = json.loads(readme.read_text().split("---\n")[1]) if readme.exists() else {}
            siblings = [{"rfilename": name} for name, entry in tree.items() if entry["type"] == "file"]
            info = {"id": repo, "sha": sha, "gated": False, "cardData": card, "siblings": siblings}
            return {key: info[key] for key in ["id", *query.get("expand", info)] if key in info}
        if verb == "tree":
            prefix = f"{file}/" if file else ""
            below = [name for name in tree if name.startswith(prefix)]
            recursive = query.get("recursive") == ["true"]
            return [tree[n] for n in below if recursive or "/" not in n.removeprefix(prefix)] or NO_FILE
        if verb == "paths-info":
            return [tree[name] for name in query.get("paths", ()) if name in tree]
        return (sha, tree[file], self.root / repo / file) if verb == "resolve" and file in tree else NO_FILE


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)  # or unread bytes count
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # clients leave in the middle of an answer
            self.close_connection = True

    def do_GET(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        fault = self.hub.faults(path) or Fault()
        if self.hub.closing.wait(fault.stall if fault.drop_after is None else 0):
            return
        answer = self.hub.answer(path, query | form) if fault.status == 200 else fault
        status, headers = 200, {"Content-Type": "application/json"}
        if isinstance(answer, Fault):
            status, headers, body = answer.status, answer.headers, b"{}"
        elif isinstance(answer, tuple):
            status, headers, body = self.part_of(*answer)
        else:
            body = json.dumps(answer).encode()
        self.send(path, status, headers, body[: fault.truncate_to], fault)

    do_HEAD = do_POST = do_GET

    def part_of(self, sha: str, entry: dict[str, Any], path: Path) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body: the range that was asked for, or the whole file."""
        size = entry["size"]
        headers = {"ETag": f'"{entry["oid"]}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if "Range" not in self.headers:
            return 200, headers, path.read_bytes()
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        start, end = int(first), min(int(last or size), size - 1)
        if start >= size:
            return 416, headers | {"Content-Range": f"bytes */{size}"}, b""
        with path.open("rb") as file:
            file.seek(start)
            return 206, headers | {"Content-Range": f"bytes {start}-{end}/{size}"}, file.read(end + 1 - start)

    def send(self, path: str, status: int, headers: dict[str, str], body: bytes, fault: Fault) -> None:
        request: list[Any] = [self.command, path, 0]
        self.hub.requests.append(request)
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        body = b"" if self.command == "HEAD" else body[: fault.drop_after]
        while request[2] < len(body):
            request[2] += self.connection.send(body[request[2] : request[2] + (1 << 16)])
        if fault.drop_after is not None:
            self.hub.closing.wait(fault.stall)
            self.close_connection = True
            if fault.reset:
                # Closed here, for the server's own way to end a connection begins with a FIN.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())


# --------------------------------------------------------------------------------------
# Small copies of two real repositories
# --------------------------------------------------------------------------------------

WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from had one "
    "you were all her she there would their we him been has when who will no more if out so up said what its "
    "water river house letter night country people garden music winter science mountain history window market"
).split(" ")


def document(source: str, index: int, seed: int = 0) -> str:
    """Made-up English of 20 to 300 words, different for every source, index and seed."""
    rng = random.Random(f"{seed}/{source}/{index}")
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(6, 20))) for _ in range(rng.randint(3, 15))]
    return f"{source.capitalize()} number {index}. " + " ".join(f"{s.capitalize()}." for s in sentences)


def write_card(repo: Path, **card: Any) -> None:
    """README.md with its metadata as JSON: that is YAML too, and the hub can read it without a library."""
    repo.mkdir(parents=True, exist_ok=True)
    (repo / "README.md").write_text(f"---\n{json.dumps(card, indent=1)}\n---\n# {repo.name}\n")


def make_fineweb_and_c4(root: Path, documents: int, seed: int = 0) -> None:
    """Lay out HuggingFaceFW/fineweb and allenai/c4 below root, each with `documents` (4 or more) to train on.

    fineweb  sample-10BT: 4 parquet files in sample/10BT, of up to 5 row groups; default: 1 file in data/
    c4       en: 4 gzipped files of JSON lines for train, 1 for validation
    Document i of a source is document(source, i, seed), in file i mod 4.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    fineweb, c4 = root / "HuggingFaceFW/fineweb", root / "allenai/c4"
    default = {"config_name": "default", "data_files": [{"split": "train", "path": "data/*/*"}]}
    sample = {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]}
    write_card(fineweb, configs=[default, sample])
    files = {f"sample/10BT/{k:03d}_00000.parquet": range(k, documents, 4) for k in range(4)}
    for name, indices in (files | {"data/CC-MAIN-2024-10/000_00000.parquet": range(4)}).items():
        texts = [document("fineweb", i, seed) for i in indices]
        constant: dict[str, Any] = {"dump": "CC-MAIN-2024-10", "date": "2024-02-21T00:00:00Z"}
        constant |= {"file_path": "s3://x.warc.gz", "language": "en", "language_score": 0.9}
        columns: dict[str, list[Any]] = {"text": texts, "id": [f"<urn:uuid:{i:032x}>" for i in indices]}
        columns |= {"url": [f"https://example.org/{i}" for i in indices]}
        columns |= {key: [value] * len(texts) for key, value in constant.items()}
        columns |= {"token_count": [len(text) // 4 for text in texts]}
        (fineweb / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), fineweb / name, row_group_size=max(1, -(-len(texts) // 5)))

    splits = [{"split": s, "path": f"en/c4-{s}.*.json.gz"} for s in ("train", "validation")]
    write_card(c4, configs=[{"config_name": "en", "data_files": splits}])
    (c4 / "en").mkdir(exist_ok=True)
    parts = [("train", k, 4, range(k, documents, 4)) for k in range(4)]
    for split, k, n, indices in [*parts, ("validation", 0, 1, range(4))]:
        source = "c4" if split == "train" else "c4 validation"
        constant = {"timestamp": "2019-04-25T12:00:00Z", "url": "https://example.org"}
        lines = "".join(json.dumps({"text": document(source, i, seed)} | constant) + "\n" for i in indices)
        path = c4 / f"en/c4-{split}.{k:05d}-of-{n:05d}.json.gz"
        path.write_bytes(gzip.compress(lines.encode(), mtime=0))
