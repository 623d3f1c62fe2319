"""What the data pipeline promises, tried the hard way:  python bench/data_proofs.py [faults kills epoch memory resume]

    faults   2,000 batches from a hub on loopback with bursts of every fault = the batches without faults
    kills    50 SIGKILLs at random moments, continued at 1, 2 or 4 processes = the uninterrupted sequence
    epoch    one epoch at 1, 2, 4, 8 processes: training + held-out = all documents, each once
    memory   ten minutes with a slow consumer: resident memory over time
    resume   bytes read to continue at 90% of a parquet file on the hub

Each worker is a process of its own that reads the real data path with its prefetch threads. Prints a table and
writes results/data/proofs.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.context import context
from files import write_json

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 128
ROWS = 16  # rows of a step


# --------------------------------------------------------------------------------------
# The worker: `world` ranks in one process, each with its own streams and thread
# --------------------------------------------------------------------------------------


def work(job: dict[str, Any]) -> None:
    """Log a hash of each step's global batch; save the position every few steps, atomically, as train.py does."""
    import documents
    from config import DataConfig
    from prepare_data import DatasetPrep

    documents.RETRY_SECONDS = (0.05,) * 30
    documents.LONGEST_WAIT = 1
    config = DataConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in job["data"].items()})
    world, n = job["world"], config.n_streams
    ranks = [DatasetPrep(config, LENGTH, ROWS, rank, world, job["epochs"]) for rank in range(world)]
    position, log = Path(job["position"]), Path(job["log"])
    step = 0
    if position.exists():
        state = json.loads(position.read_text())
        step = state["step"]
        for rank in ranks:
            rank.load_state_dict(state["data"])
        lines = log.read_text().splitlines()[:step]
        log.write_text("".join(line + "\n" for line in lines))
    with log.open("a") as file:
        while step < job["steps"]:
            batches = [next(rank, None) for rank in ranks]
            if all(batch is None for batch in batches):
                break
            rows: dict[tuple[int, int], bytes] = {}
            for r, batch in enumerate(batches):
                batch = batch or ranks[r].empty_batch()
                mine = range(r, n, world)
                for i, (x, y) in enumerate(zip(batch.inputs, batch.targets, strict=True)):
                    rows[i // len(mine), mine[i % len(mine)]] = x.tobytes() + y.tobytes()
            digest = hashlib.sha256(b"".join(rows[key] for key in sorted(rows))).hexdigest()
            file.write(digest + "\n")
            file.flush()
            step += 1
            if job["save_every"] and step % job["save_every"] == 0:
                states = [rank.state_dict() for rank in ranks]
                streams = {k: v for s in states for k, v in s["streams"].items()}
                partial = position.with_suffix(".tmp")
                partial.write_text(json.dumps({"step": step, "data": {**states[0], "streams": streams}}))
                partial.replace(position)
            time.sleep(job.get("pause", 0))
    for rank in ranks:
        rank.close()


def start(job: dict[str, Any], **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--work", json.dumps(job)]
    return subprocess.Popen(command, env=os.environ | environment)


def finish(job: dict[str, Any], **environment: str) -> list[str]:
    process = start(job, **environment)
    if process.wait(timeout=1800) != 0:
        raise SystemExit(f"a worker failed with exit code {process.returncode}: {job}")
    return Path(job["log"]).read_text().splitlines()


def job_of(folder: Path, name: str, data: dict[str, Any], **values: Any) -> dict[str, Any]:
    job = {
        "data": data, "world": 1, "steps": 2000, "epochs": None, "save_every": 0,
        "position": str(folder / f"{name}.json"), "log": str(folder / f"{name}.log"),
    }  # fmt: skip
    return job | values


# --------------------------------------------------------------------------------------
# The proofs
# --------------------------------------------------------------------------------------


def hub_data(folder: Path) -> dict[str, Any]:
    return {
        "current_datasets": ("FINEWEB", "C4"), "dataset_probabilities": (0.6, 0.4), "n_streams": 8,
        "val_fraction": 0.02, "cache_dir": str(folder / "cache"),
    }  # fmt: skip


def faults(folder: Path) -> dict[str, Any]:
    from tests.loopback_hub import Fault, Hub, make_fineweb_and_c4

    make_fineweb_and_c4(folder / "hub", documents=4000)
    kinds = {
        "drop": Fault(drop_after=100), "truncated": Fault(truncate_to=50), "429": Fault(429, {"Retry-After": "1"}),
        "500": Fault(500), "503": Fault(503), "stall": Fault(stall=1.0),
    }  # fmt: skip
    injected: dict[str, int] = dict.fromkeys(kinds, 0)
    chance = random.Random(0)
    burst: list[str] = []

    def bursts(path: str) -> Fault | None:
        """Now and then one to four faults of one kind in a row, on the requests for data."""
        if "/resolve/" not in path:
            return None
        if not burst and chance.random() < 0.08:
            burst.extend([chance.choice(list(kinds))] * chance.randint(1, 4))
        if not burst:
            return None
        kind = burst.pop()
        injected[kind] += 1
        return kinds[kind]

    with Hub(folder / "hub") as hub:
        quiet = finish(job_of(folder, "quiet", hub_data(folder)), HF_ENDPOINT=hub.endpoint)
        hub.faults = bursts
        started = time.perf_counter()
        faulty = finish(job_of(folder, "faulty", hub_data(folder)), HF_ENDPOINT=hub.endpoint)
        seconds = time.perf_counter() - started
    return {
        "batches": len(faulty), "faults injected": injected, "seconds with faults": round(seconds, 1),
        "passed": len(quiet) == 2000 and quiet == faulty and min(injected.values()) > 0,
    }  # fmt: skip


def local_data(folder: Path, documents: int = 6000) -> dict[str, Any]:
    """A parquet and a jsonl source with documents of very different length; made once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chance = random.Random(1)
    words = [f"w{i}" for i in range(5000)]
    place = folder / "local"
    if not place.exists():
        place.mkdir()
        texts = [f"document {i} " + " ".join(chance.choices(words, k=chance.randint(5, 300))) for i in range(documents)]
        for part in range(3):
            table = pa.table({"text": texts[part : documents // 2 : 3]})
            pq.write_table(table, place / f"{part}.parquet", row_group_size=50)
        lines = [json.dumps({"text": text}) for text in texts[documents // 2 :]]
        for part in range(2):
            (place / f"{part}.jsonl").write_text("\n".join(lines[part::2]))
    return {
        "current_datasets": ("LOCAL", "WIKI"), "dataset_probabilities": (0.7, 0.3), "n_streams": 8,
        "val_fraction": 0.05, "local_files": (str(place),), "cache_dir": str(folder / "cache"), "max_samples": 0,
    }  # fmt: skip


def kills(folder: Path, n: int = 50) -> dict[str, Any]:
    steps = 3000
    job = job_of(folder, "whole", local_data(folder), steps=steps)
    whole = finish(job)
    chance, killed, worlds = random.Random(2), 0, {1: 0, 2: 0, 4: 0}
    job = job_of(folder, "killed", local_data(folder), steps=steps, save_every=5, pause=0.004)
    position = Path(job["position"])
    while True:
        world = chance.choice((1, 2, 4))
        worlds[world] += 1
        before = json.loads(position.read_text())["step"] if position.exists() else 0
        process = start({**job, "world": world})
        if killed < n:
            deadline = time.monotonic() + 60
            goal = before + chance.randint(0, 3 * steps // (2 * n))
            while process.poll() is None and time.monotonic() < deadline:  # until it is somewhere behind `before`
                reached = json.loads(position.read_text())["step"] if position.exists() else 0
                if reached >= goal:
                    break
                time.sleep(0.01)
            time.sleep(chance.random() * 0.05)
        if killed < n and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        elif process.wait(timeout=1800) != 0:
            raise SystemExit("the worker failed")
        else:
            break
    log = Path(job["log"]).read_text().splitlines()
    return {
        "steps": len(log), "SIGKILLs": killed, "starts at each number of processes": worlds,
        "sha256 of the sequence": hashlib.sha256("".join(log).encode()).hexdigest()[:16],
        "passed": killed == n and log == whole and len(whole) == steps,
    }  # fmt: skip


def epoch(folder: Path) -> dict[str, Any]:
    """Counts documents where they are drawn, with the real streams of each rank."""
    from config import DataConfig
    from documents import DocumentStream
    from sources import resolve_source

    config = DataConfig(**local_data(folder))
    sources = [resolve_source(name, config) for name in config.current_datasets]
    everything = {s.name: sorted(DocumentStream(s, config, 0, 1, 1, held_out=None)) for s in sources}
    held_out = {s.name: sorted(DocumentStream(s, config, 0, 1, 1, held_out=True)) for s in sources}
    passed, sequences = True, set()
    for world in (1, 2, 4, 8):
        for source in sources:
            trained = []
            for rank in range(world):
                for v in range(rank, config.n_streams, world):
                    trained += list(DocumentStream(source, config, v, config.n_streams, epochs=1))
            passed &= sorted(trained + held_out[source.name]) == everything[source.name]
        log = finish(job_of(folder, f"epoch{world}", local_data(folder), world=world, epochs=1, steps=10**9))
        sequences.add(hashlib.sha256("".join(log).encode()).hexdigest()[:16])
    return {
        "documents": {name: len(d) for name, d in everything.items()},
        "held out": {name: len(d) for name, d in held_out.items()},
        "steps": len(log), "sha256 of the batches at 1, 2, 4, 8": sorted(sequences),
        "passed": passed and len(sequences) == 1,
    }  # fmt: skip


def memory(folder: Path, seconds: float = 600) -> dict[str, Any]:
    """A consumer of 20 batches a second, while the reader could give hundreds."""
    process = start(job_of(folder, "slow", local_data(folder), steps=10**9, pause=0.05))
    samples = []
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        time.sleep(seconds / 20)
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        samples.append(int(resident.split()[1]) // 1024)
    process.kill()
    process.wait()
    late = samples[len(samples) // 4 :]
    return {"resident MB": samples, "passed": max(late) - min(late) <= 0.05 * min(late)}


def resume(folder: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.loopback_hub import Hub, write_card

    chance = random.Random(3)
    place = folder / "resumehub" / "HuggingFaceFW" / "fineweb"
    (place / "sample" / "10BT").mkdir(parents=True)
    texts = [f"{i} " + "".join(chance.choices("abcdefghij klmnop", k=700)) for i in range(100_000)]
    path = place / "sample" / "10BT" / "000_00000.parquet"
    pq.write_table(pa.table({"text": texts, "id": [str(i) for i in range(len(texts))]}), path, row_group_size=1000)
    write_card(
        place, configs=[{"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]}]
    )
    data = {**hub_data(folder), "current_datasets": ("FINEWEB",), "dataset_probabilities": (1.0,), "n_streams": 1}
    steps = 10**9
    with Hub(folder / "resumehub") as hub:
        whole = finish(
            job_of(folder, "r-whole", data, steps=steps, epochs=1, save_every=1000), HF_ENDPOINT=hub.endpoint
        )
        at = int(0.9 * len(whole))
        job = job_of(folder, "r-most", data, steps=at, epochs=1, save_every=at)
        finish(job, HF_ENDPOINT=hub.endpoint)
        before = len(hub.requests)
        rest = finish({**job, "steps": at + 1}, HF_ENDPOINT=hub.endpoint)
        read = sum(request[2] for request in hub.requests[before:])
    size = path.stat().st_size
    return {
        "file bytes": size, "bytes read to continue at 90%": read, "share": round(read / size, 4),
        "passed": rest == whole[: at + 1] and read < 0.05 * size,
    }  # fmt: skip


PROOFS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "epoch": epoch, "resume": resume, "kills": kills, "faults": faults, "memory": memory,
}  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
        return 0
    out = ROOT / "results" / "data" / "proofs.json"
    results = json.loads(out.read_text()) if out.exists() else {}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proofs", nargs="*", metavar="PROOF", help=f"some of {', '.join(PROOFS)}; without any: all")
    names = parser.parse_args().proofs or [*PROOFS]
    if unknown := [name for name in names if name not in PROOFS]:
        parser.error(f"no proof is called {unknown[0]}; there are {', '.join(PROOFS)}")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = PROOFS[name](Path(folder)) | {"context": context()}
        print(f"{name:<8} {'passed' if results[name]['passed'] else 'FAILED'}  {results[name]}", flush=True)
        write_json(out, results)
    return 0 if all(r["passed"] for r in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
