"""Decoding speed, one text at a time, beside peers:  python bench/decode.py [--tokens 64] [--rounds 5]

A model of GPT-2's smallest size (preset gpt2, 124M parameters; random weights: speed does not depend on them) writes
greedily behind a prompt of 16 tokens: ours in bf16 and with weights in int8, transformers' GPT2LMHeadModel.generate in
bf16 and fp32, and, where llama-cpp-python is installed, ours in llama.cpp in f16. The demo's size does so as well, but
for llama.cpp. They take turns in one process, after a text each to warm up, in which our first tokens try how weights
are read fastest. The bound is what the memory delivers: bytes of the bf16 weights that a token needs over the speed at
which this machine reads memory (in large pages, as ours are), measured in the same rounds. Ratios are medians over the
rounds. On a processor without instructions for bf16 all of it is in fp32, but for int8 weights and llama.cpp. With the
default settings it writes results/bench/decode.json, or decode_fp32.json for such a processor.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.context import PEER, context, need, positive, publish
from bench.peers import gpt2
from checkpoint import copy_weights, empty_model
from config import PRESETS, GenerationConfig, GPTConfig
from decoding import decode_step
from export import write_gguf
from hardware import best_dtype, choose_precision, in_large_pages
from interop import to_hub_weights
from model import GPT
from sampling import generate_ids
from tokenizer import Tokenizer, load_tiktoken

PROMPT = 16
FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def tokenizer_of(n_vocab: int) -> Tokenizer:
    """gpt2's, or one of so many ids: only its size matters here."""
    if n_vocab == 50257:
        return load_tiktoken("gpt2", "~/.cache/basicgpt")
    tokens = [bytes([i]) for i in range(256)] + [b"%06d" % i for i in range(n_vocab - 257)]
    return Tokenizer("bpe", r"[\s\S]", tokens, {"<|endoftext|>": n_vocab - 1})


def ours(shape: GPTConfig, n_vocab: int, tokens: int, int8: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    model = empty_model(shape.resolved(n_vocab), best_dtype(torch.device("cpu"))).eval()
    copy_weights(model, GPT(model.config).state_dict())
    tokenizer = tokenizer_of(n_vocab)
    greedy = GenerationConfig(max_tokens=tokens, temperature=0)
    step = decode_step(model, int8=int8)

    def decode() -> None:
        n = sum(1 for _ in generate_ids(model, [1] * PROMPT, tokenizer, greedy, decode=step))
        assert n == tokens, "it met end-of-text"

    return decode


def theirs(shape: GPTConfig, n_vocab: int, tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    model = gpt2(shape.d_model, shape.n_layers, shape.n_heads, shape.max_length, n_vocab).to(dtype).eval()
    ids = torch.ones((1, PROMPT), dtype=torch.long)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "use_cache": True}

    def decode() -> None:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        assert out.shape[1] == PROMPT + tokens

    return decode


def llama_cpp(shape: GPTConfig, tokens: int) -> Callable[[], None]:
    from llama_cpp import Llama

    torch.manual_seed(0)
    model, tokenizer = GPT(shape.resolved(50257)), tokenizer_of(50257)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(file, model.config, to_hub_weights(model.state_dict(), model.config), tokenizer, "f16")
        llama = Llama(
            str(file), n_ctx=shape.max_length, n_threads=torch.get_num_threads(), use_mmap=False, verbose=False
        )

    def decode() -> None:
        n = sum(1 for _ in itertools.islice(llama.generate([1] * PROMPT, temp=0), tokens))
        assert n == tokens

    return decode


def read_speed() -> float:
    """Bytes per second that the processors read from memory, at best of five readings of a gigabyte."""
    (block,) = in_large_pages([torch.Size([2**28])], torch.float32)
    block.fill_(1)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - started)
    return block.numel() * 4 / min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive, default=64)
    parser.add_argument("--rounds", type=positive, default=5)
    arguments = parser.parse_args()
    if arguments.tokens > (most := PRESETS["demo"].model.max_length - PROMPT):  # GPT-2 cannot outgrow its context
        parser.error(f"--tokens is at most {most}, so that all fits the demo's context")
    need(PEER)
    best = choose_precision(torch.device("cpu"), "auto")
    results: dict[str, Any] = {"context": context()}
    for size, n_vocab in (("gpt2", 50257), ("demo", PRESETS["demo"].data.n_vocab)):
        shape, tokens = PRESETS[size].model, arguments.tokens
        contenders = {
            f"ours {best}": ours(shape, n_vocab, tokens, int8=False),
            "ours int8": ours(shape, n_vocab, tokens, int8=True),
        }
        for name in dict.fromkeys((best, "fp32")):
            contenders[f"transformers {name}"] = theirs(shape, n_vocab, tokens, FORMATS[name])
        if size == "gpt2" and importlib.util.find_spec("llama_cpp"):
            contenders["llama.cpp f16"] = llama_cpp(shape, tokens)  # its q8_0 crashes here: results/interop
        counts = GPT(shape.resolved(n_vocab)).parameter_counts()
        head = shape.resolved(n_vocab).vocab_size * shape.d_model
        n_bytes = FORMATS[best].itemsize * (counts["attention"] + counts["mlp"] + head)
        for decode in contenders.values():  # warm up
            decode()
        speeds: dict[str, list[float]] = {name: [] for name in [*contenders, "bound"]}
        for _ in range(arguments.rounds):
            speeds["bound"].append(read_speed() / n_bytes)
            for name, decode in contenders.items():
                started = time.perf_counter()
                decode()
                speeds[name].append(tokens / (time.perf_counter() - started))
        medians = {name: statistics.median(values) for name, values in speeds.items()}

        def ratio(name: str, other: str, speeds: dict[str, list[float]] = speeds) -> float:  # by round: speed varies
            return statistics.median(a / b for a, b in zip(speeds[name], speeds[other], strict=True))

        print(f"{size}: {counts['total'] / 1e6:.1f}M parameters, {n_bytes / 1e6:.0f} MB of {best} weights per token")
        for name, speed in medians.items():
            print(f"  {name:<20}{speed:>8.1f} tokens/s{ratio(name, 'bound'):>8.1%} of the bound")
        for name in (f"ours {best}", "ours int8"):
            for peer in [p for p in contenders if not p.startswith("ours")]:
                print(f"  {name}: {ratio(name, peer):.2f} x {peer}")
        print()
        results[size] = {name: [round(v, 1) for v in values] for name, values in speeds.items()}
    publish(parser, f"bench/decode{'_fp32' if best == 'fp32' else ''}.json", results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
