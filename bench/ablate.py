"""One change at a time:  python bench/ablate.py OUT.json [--preset demo] [--steps 300] [--seeds 3] 'NAME: OPTIONS' ...

Trains the preset with each line of options of train.py (and once without any), for each seed, at the same number of
steps; prints the held-out bits per byte of each with its spread over the seeds, and the difference to the preset seed
by seed. OPTIONS may begin with --variant NAME, one of bench/variants.py. --common OPTIONS are those of all runs, the
first too. --at_once runs at a time, with a thread each: losses are compared here, not seconds. Runs that OUT.json
holds already are not done again.

--together: eight changes in 16 runs of four seeds instead of 27 of three, for models whose runs are long. Each change
is made in half of the runs, with each other change in half of those, and in half of each seed's; its effect is the
difference of the two halves, so all 16 runs tell of each: what the change adds on average over the others made or not,
which is not quite what it adds to the preset. No effect of one is mixed with a joint effect of two (a 2^(8-4) design of
resolution IV: Box, Hunter and Hunter, Statistics for Experimenters, 2nd ed., chapter 6). The standard error is of 4
degrees of freedom: by chance, one effect in twenty is above 2.8 of them. Only for changes that can be made together: of
two variants that replace the same thing, one would be lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def factorial() -> list[tuple[int, tuple[bool, ...]]]:
    """The 16 runs of --together: (seed, which of the eight changes are made)."""
    runs = []
    for a, b, c, d in itertools.product((0, 1), repeat=4):
        changes = (a, b, c, d, b ^ c ^ d, a ^ c ^ d, a ^ b ^ c, a ^ b ^ d)
        runs.append((2 * (a ^ b) + (a ^ c), tuple(map(bool, changes))))
    return sorted(runs)


def effects(runs: list[tuple[int, tuple[bool, ...]]], values: list[float]) -> tuple[list[float], float]:
    """What each of the eight changes adds, and the standard error of that: from what changes and seeds leave over."""
    import numpy as np

    design = np.array([[seed == s for s in range(4)] + [2 * made - 1 for made in changes] for seed, changes in runs])
    fitted, (left,), _, _ = np.linalg.lstsq(design.astype(float), np.array(values), rcond=None)
    variance = left / (len(runs) - design.shape[1])
    return [2 * float(half) for half in fitted[4:]], float((4 * variance / len(runs)) ** 0.5)


def joined(several: list[str]) -> str:
    """The options of several changes as those of one."""
    variants, others = [], []
    for words in map(shlex.split, several):
        if words[:1] == ["--variant"]:
            variants.append(words[1])
            words = words[2:]
        others += words
    return shlex.join((["--variant", ",".join(variants)] if variants else []) + others)


def command_of(
    preset: str, steps: int, seed: int, options: str, common: str, out_dir: str
) -> tuple[list[str], list[str]]:
    """Options of train.py, and the names of variants."""
    words, variants = shlex.split(options), list[str]()
    if words[:1] == ["--variant"]:
        variants, words = words[1].split(","), words[2:]
    arguments = [
        "--preset", preset, "--train.max_steps", str(steps), "--train.seed", str(seed), "--data.seed", str(seed + 1),
        "--train.eval_every", str(10 * steps), "--train.save_every", str(10 * steps), *shlex.split(common), *words,
        "--train.out_dir", out_dir, "--train.run_name", "x",
    ]  # fmt: skip
    return arguments, variants


def check(preset: str, steps: int, seed: int, options: str, common: str) -> None:
    """Refuse what no run could begin with, before any other run: options and variants. Raises ConfigError."""
    from bench.variants import VARIANTS
    from config import Config, load_config
    from errors import ConfigError

    arguments, variants = command_of(preset, steps, seed, options, common, "")
    for name in variants:
        if name not in VARIANTS:
            raise ConfigError(f"there is no variant {name!r}; bench/variants.py prints those there are")
    if {"-h", "--help"} & set(arguments):
        raise ConfigError("--help is no change; python train.py --help shows all options")
    load_config(arguments, "", Config)


def run(preset: str, steps: int, seed: int, options: str, common: str) -> float:
    """Held-out bits per byte over all datasets after so many steps."""
    with tempfile.TemporaryDirectory() as folder:
        words, variants = command_of(preset, steps, seed, options, common, folder)
        script = ["bench/variants.py", ",".join(variants)] if variants else ["train.py"]
        command = [sys.executable, str(ROOT / script[0]), *script[1:], *words]
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
    parser.add_argument("--seeds", type=positive)
    parser.add_argument("--common", default="")
    parser.add_argument("--at_once", type=positive, default=2)
    parser.add_argument("--together", action="store_true")
    arguments = parser.parse_intermixed_args()

    from errors import ConfigError
    from files import write_json

    changes = {n.strip(): o.strip() for n, _, o in (c.partition(":") for c in arguments.changes)}
    key = f"{arguments.preset}, {arguments.steps} steps" + (f", {arguments.common}" if arguments.common else "")
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for options in (*changes.values(), arguments.common):
        try:
            shlex.split(options)
        except ValueError as unclosed:
            parser.error(f"{options}: {str(unclosed).lower()}")
    if any(shlex.split(options) == ["--variant"] for options in changes.values()):
        parser.error("--variant has no name; bench/variants.py prints them")
    if len(changes) < len(arguments.changes):
        parser.error("two changes have one name")
    if arguments.together:
        if len(changes) != 8:
            parser.error(f"--together takes eight changes, not {len(changes)}")
        if arguments.seeds:
            parser.error("--together has four seeds of its own; leave --seeds out")
        words = Counter(word for options in changes.values() for word in shlex.split(options) if word[:2] == "--")
        if twice := [word for word, n in words.items() if n > 1 and word != "--variant"]:
            parser.error(f"{twice[0]} is in two changes, and where both are made the last would win")
        table = results.setdefault(f"{key}, together", {})
        rows = [(seed, list(itertools.compress(changes, made))) for seed, made in factorial()]
        jobs = [(", ".join(names) or "as it is", joined([changes[n] for n in names]), seed) for seed, names in rows]
    else:
        changes = {"as it is": ""} | changes
        table = results.setdefault(key, {})
        jobs = [(name, options, seed) for seed in range(arguments.seeds or 3) for name, options in changes.items()]
    for name, options, seed in jobs:
        try:
            if str(seed) not in table.get(name, {}).get("bits_per_byte", {}):
                check(arguments.preset, arguments.steps, seed, options, arguments.common)
        except ConfigError as refused:
            parser.error(f"{name}: {refused}")
        entry = table.setdefault(name, {"options": options, "contexts": {}, "bits_per_byte": {}})
        if entry["options"] != options:
            parser.error(f"{arguments.out} has {name!r} with other options; give it another name, or another OUT")

    def do(job: tuple[str, str, int]) -> None:
        name, options, seed = job
        done = table[name]["bits_per_byte"]
        if str(seed) not in done:
            here = context()
            done[str(seed)] = run(arguments.preset, arguments.steps, seed, options, arguments.common)
            # Of each seed, which may come from a later command. (Files of before 2026-11-29: of the line's first.)
            table[name].setdefault("contexts", {})[str(seed)] = here
            print(f"{name}, seed {seed}: {done[str(seed)]:.4f}", flush=True)
            write_json(arguments.out, results)

    with ThreadPoolExecutor(arguments.at_once) as pool:
        list(pool.map(do, jobs))

    print(f"\n{key}{', together' if arguments.together else ''}")
    if arguments.together:
        found, error = effects(factorial(), [table[name]["bits_per_byte"][str(seed)] for name, _, seed in jobs])
        print(f"{'':<32}{'bits per byte':>16}   (each +- {error:.4f}, 4 degrees of freedom)")
        for name, effect in zip(changes, found, strict=True):
            print(f"{name:<32}{effect:>+16.4f}")
        return 0
    print(f"{'':<32}{'bits per byte':>16}{'to the preset':>22}")
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
