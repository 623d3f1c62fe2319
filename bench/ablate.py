"""One change at a time:  python bench/ablate.py OUT.json [--preset demo] [--steps 300] [--seeds 3] 'NAME: OPTIONS' ...

Trains the preset with each line of options of train.py (and once without any), for each seed, at the same number of
steps; prints the held-out bits per byte of each with its spread over the seeds, and the difference to the preset seed
by seed. OPTIONS may begin with --variant NAME, one of bench/variants.py. --common OPTIONS are those of all runs, the
first too. --at_once runs at a time, with a thread each: losses are compared here, not seconds. Runs that OUT.json
holds already are not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run(preset: str, steps: int, seed: int, options: str, common: str) -> float:
    """Held-out bits per byte over all datasets after so many steps."""
    with tempfile.TemporaryDirectory() as folder:
        words = shlex.split(options)
        script = ["train.py"]
        if words[:1] == ["--variant"]:
            script, words = ["bench/variants.py", words[1]], words[2:]
        command = [
            sys.executable, str(ROOT / script[0]), *script[1:], "--preset", preset, "--train.max_steps", str(steps),
            "--train.seed", str(seed), "--data.seed", str(seed + 1), "--train.out_dir", folder, "--train.run_name", "x",
            "--train.eval_every", str(10 * steps), "--train.save_every", str(10 * steps), *shlex.split(common), *words,
        ]  # fmt: skip
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        lines = (Path(folder) / "x" / "metrics.jsonl").read_text().splitlines()
    last = [r for r in map(json.loads, lines) if r["kind"] == "validation"][-1]
    return float(last["datasets"]["all"]["bits_per_byte"])


def main() -> int:
    from bench.context import context, positive

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("changes", nargs="*", metavar="'NAME: OPTIONS'")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--steps", type=positive, default=300)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--common", default="")
    parser.add_argument("--at_once", type=positive, default=2)
    arguments = parser.parse_intermixed_args()

    from files import write_json

    changes = {"as it is": ""} | {n.strip(): o.strip() for n, _, o in (c.partition(":") for c in arguments.changes)}
    key = f"{arguments.preset}, {arguments.steps} steps" + (f", {arguments.common}" if arguments.common else "")
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    table = results.setdefault(key, {})
    todo = []
    for name, options in changes.items():
        entry = table.setdefault(name, {"options": options, "context": context(), "bits_per_byte": {}})
        assert entry["options"] == options, f"{name!r} is there with other options"
        todo += [(name, seed) for seed in range(arguments.seeds) if str(seed) not in entry["bits_per_byte"]]
    todo.sort(key=lambda t: t[1])

    def do(job: tuple[str, int]) -> None:
        name, seed = job
        table[name]["bits_per_byte"][str(seed)] = run(
            arguments.preset, arguments.steps, seed, changes[name], arguments.common
        )
        print(f"{name}, seed {seed}: {table[name]['bits_per_byte'][str(seed)]:.4f}", flush=True)
        write_json(arguments.out, results)

    with ThreadPoolExecutor(arguments.at_once) as pool:
        list(pool.map(do, todo))

    print(f"\n{key}\n{'':<32}{'bits per byte':>16}{'to the preset':>22}")
    base = table["as it is"]["bits_per_byte"]
    for name in changes:
        values = table[name]["bits_per_byte"]
        differences = [values[seed] - base[seed] for seed in values if seed in base]
        spread = f" +- {statistics.stdev(values.values()):.4f}" if len(values) > 1 else ""
        of_these = f" +- {statistics.stdev(differences):.4f}" if len(differences) > 1 else ""
        mean = f"{statistics.mean(values.values()):.4f}"
        print(f"{name:<32}{mean + spread:>16}{f'{statistics.mean(differences):+.4f}' + of_these:>22}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
