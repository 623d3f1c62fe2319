"""The model: token ids in, logits out.

A decoder-only transformer in today's common form: pre-norm RMSNorm, rotary positions, normed queries and
keys, SwiGLU, no biases. Each choice exists in Hugging Face's Qwen3 (or, with relu2, Apertus; without QK-norm, Llama),
so that weights fit there, and theirs here, without remote code: interop.py.

Shapes: B batch, T time, H heads, G key/value heads (G divides H), K head_dim, D d_model, F d_ff, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import GPTConfig

# Rows whose logits are computed at once in training. A CPU wants few, for its caches. A GPU wants more: the products of
# few rows do not fill it, and each piece's gradient of the head (V, D) is added to the sum. In fp16 more rows could sum
# to a gradient beyond 65,504, its largest number: a row adds up to sqrt(D) to a channel.
ROWS_OF_LOGITS, ROWS_OF_LOGITS_ON_CUDA = 1024, 4096
# Entries of the vocabulary whose gradients are computed at once, in the products' format, before they are added to the
# fp32 sum: of all they would be half as large as the sum, and oneDNN copies the logits that it has to transpose. Fewer
# would not fill a GPU. (GPT-2's 50,304 come in four parts of about one size.)
ENTRIES_AT_ONCE = 12_800
# Rows of the MLP's matrices that Muon orthogonalises together, as a head's in attention: the loss is a little better
# than with whole matrices, for a seventh of the products (docs/recipe.md).
ROWS_TOGETHER = 64


def in_parts(rows: int, size: int = ROWS_TOGETHER) -> tuple[int, ...]:
    """So many rows as parts of this size; the last one may be smaller."""
    return tuple(min(size, rows - first) for first in range(0, rows, size))


class Linear(nn.Linear):
    """x W^T without bias."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, width_out, bias=False)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Autocast on CUDA would return fp32, and all that follows, up to the next product, would be twice as large.
        with torch.autocast("cuda", enabled=False) if x.device.type == "cuda" else contextlib.nullcontext():
            return F.rms_norm(x, (x.size(-1),), self.weight.to(x.dtype), self.eps)


def rotary_tables(head_dim: int, length: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each (length, K/2) fp32: the angle of position t and channel pair i is t * base^(-2i/K).

    In fp32 throughout, as in transformers: an imported model's logits are then its to the last bit.
    """
    frequencies = 1 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel pairs (i, i + K/2) by position (RoFormer, arXiv:2104.09864, half-split as in Llama).

    x (B, T, H, K); cos, sin (T, K/2), or (B, T, K/2). Returns x's shape and dtype.
    """
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), dim=-1)


class BlockAttention(torch.autograd.Function):
    """Causal softmax(q k^T / sqrt(K)) v in plain products: two blocks of queries, each with the keys up to its end.

    For training short rows on a CPU, where the backward pass of torch's fused kernel makes little use of the matrix
    units: a step's forward and backward took 405 ms for 467 (6 x 384, T 256, 16 rows, bf16, compiled). It keeps the
    probabilities, 3/4 of T x T of them, so it is not for long rows.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, H, T, K) -> (B, H, T, K)."""
        T, scale = q.size(2), q.size(3) ** -0.5
        future = torch.full((T, T), -math.inf, device=q.device).triu(1)
        outs, kept = [], []
        for start, end in ((0, T // 2), (T // 2, T)):
            scores = (q[:, :, start:end] @ k[:, :, :end].mT).float() * scale + future[start:end, :end]
            kept.append(scores.softmax(dim=3).to(q.dtype))
            outs.append(kept[-1] @ v[:, :, :end])
        y = torch.cat(outs, dim=2)
        ctx.save_for_backward(q, k, v, y, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y, *kept = ctx.saved_tensors
        T, half, scale = q.size(2), q.size(2) // 2, q.size(3) ** -0.5
        mean = (grad_y.float() * y.float()).sum(dim=3, keepdim=True)  # of grad_p under p: what softmax subtracts
        grad_q, grad_k, grad_v = [], [], []
        for p, start, end in ((kept[0], 0, half), (kept[1], half, T)):
            grad_out = grad_y[:, :, start:end]
            grad_p = (grad_out @ v[:, :, :end].mT).float()
            grad_scores = (p.float() * (grad_p - mean[:, :, start:end]) * scale).to(q.dtype)
            grad_q.append(grad_scores @ k[:, :, :end])
            grad_k.append(grad_scores.mT @ q[:, :, start:end])
            grad_v.append(p.mT @ grad_out)
        k_sum, v_sum = (torch.cat((a + b[:, :, :half], b[:, :, half:]), dim=2) for a, b in (grad_k, grad_v))
        return torch.cat(grad_q, dim=2), k_sum, v_sum


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed nats, an fp32 scalar, of logits (n, V) and targets (n, 1), where -1 does not count.

    In place the logits become its gradient.
    """
    log_p = logits.float().log_softmax(dim=1)
    counts = targets >= 0
    is_target = torch.arange(logits.size(1), device=logits.device) == targets
    logits.copy_((log_p.exp() - is_target.float()) * counts)
    return -(log_p.gather(1, targets.clamp(min=0)) * counts).sum()


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of the head's logits, a piece of the rows at a time: all logits are never in memory.

    The gradient is made where the logits are, in the forward pass, so nothing is computed twice. (The idea is that
    of Liger's fused linear cross-entropy, arXiv:2410.10989.)
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, nats_and_gradient: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """x (N, D), weight (V, D), targets (N,), -1 does not count -> nats, an fp32 scalar.

        nats_and_gradient: cross_entropy_, compiled or not. The products are in x's dtype and the sums over the pieces
        in fp32, so nothing rounds an fp32 weight's gradient.
        """
        nats = torch.zeros((), device=x.device)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        weight = weight.to(x.dtype)
        rows = ROWS_OF_LOGITS_ON_CUDA if x.is_cuda and x.dtype != torch.float16 else ROWS_OF_LOGITS
        for start in range(0, x.size(0), rows):
            piece = x[start : start + rows]
            logits = piece @ weight.mT  # (n, V)
            nats += nats_and_gradient(logits, targets[start : start + rows, None])
            grad_x[start : start + rows] = logits @ weight
            if x.dtype == torch.float32:
                torch.addmm(grad_weight, logits.mT, piece, out=grad_weight)  # without another (V, D)
            else:
                for first in range(0, weight.size(0), ENTRIES_AT_ONCE):
                    entries = slice(first, first + ENTRIES_AT_ONCE)
                    grad_weight[entries] += logits[:, entries].mT @ piece
            del logits  # or the next piece's would be beside them
        ctx.save_for_backward(grad_x, grad_weight)
        return nats

    @staticmethod
    def backward(ctx: Any, grad_nats: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        # In place, without another (V, D): a second backward pass through the same graph is an error of autograd's.
        return grad_x * grad_nats.to(grad_x.dtype), grad_weight.mul_(grad_nats), None, None


class KVCache:
    """Keys and values of the tokens seen so far, for decoding token by token.

    Room for `length` positions is allocated once, so that growing copies nothing; `seen` positions are filled.
    """

    def __init__(self, config: GPTConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layers, batch, config.n_kv_heads, length, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)  # (layers, B, G, length, K)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.seen = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, G, T, K) behind the seen positions; returns all of the layer's (B, G, seen + T, K)."""
        end = self.seen + k.size(2)
        self.keys[layer, :, :, self.seen : end] = k
        self.values[layer, :, :, self.seen : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def repeat(self, batch: int) -> None:
        """Copy the one row to `batch` rows: the prompt of several samples is read once."""
        self.keys = self.keys.repeat_interleave(batch, dim=1)
        self.values = self.values.repeat_interleave(batch, dim=1)


class Packed(NamedTuple):
    """Where several texts stand in one row of ids. They may share their beginnings, as branches of a tree do."""

    positions: Tensor  # (B, T), each id's in its own text
    mask: Tensor | None  # (B, 1, T, T): whether an id looks at another; None: at all before it
    at: tuple[Tensor, Tensor]  # rows (n,) and places in them (n,) whose logits are wanted


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (GQA, arXiv:2305.13245) and, unless switched off, QK-norm
    (arXiv:2302.05442)."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = c.n_heads, c.n_kv_heads, c.head_dim
        # Queries, keys and values in one product: (H + 2G) K rows.
        self.wqkv = Linear(c.d_model, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim)
        self.wo = Linear(c.n_heads * c.head_dim, c.d_model)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> q (B, H, T, K) and k (B, G, T, K), normed and rotated, and v (B, G, T, K)."""
        H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
        q, k, v = self.wqkv(x).view(*x.shape[:2], H + 2 * G, K).split((H, G, G), dim=2)  # (B, T, H or G, K)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, layer: int, mask: Tensor | None = None
    ) -> Tensor:
        B, T, _ = x.shape
        H, G, K = self.n_heads, self.n_kv_heads, self.head_dim
        q, k, v = self.project(x, cos, sin)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, G, S, K), S = seen + T
            if cache.seen > 0 and T > 1:  # query t may look at keys up to seen + t
                mask = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(cache.seen)
        plain = cache is None and mask is None
        in_blocks = plain and x.device.type == "cpu" and torch.is_grad_enabled() and 1 < T <= 512
        # Of CUDA's kernels for many queries only flash attention takes shared keys; it takes no mask, and without bf16
        # it may be missing.
        if G != H and (in_blocks or (q.is_cuda and T > 1 and (q.dtype != torch.bfloat16 or mask is not None))):
            k, v = k.repeat_interleave(H // G, dim=1), v.repeat_interleave(H // G, dim=1)
        if in_blocks:
            y = BlockAttention.apply(q, k, v)
        else:
            causal, shared = mask is None and T > 1, k.size(1) != H
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)
        return self.wo(y.transpose(1, 2).reshape(B, T, H * K))


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate(x)) * up(x)); or ReLU^2 (arXiv:2109.08668): down(relu(up(x))^2)."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.gated = c.mlp == "swiglu"
        self.w_up = Linear(c.d_model, (2 if self.gated else 1) * c.d_ff)  # rows: gate, then up
        self.w_down = Linear(c.d_ff, c.d_model)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.w_up(x).chunk(2, dim=-1)  # (B, T, F) each
            return self.w_down(F.silu(gate) * up)
        up = F.relu(self.w_up(x))
        return self.w_down(up * up)  # not .square(): autocast on CUDA would return fp32


class Block(nn.Module):
    def __init__(self, c: GPTConfig):
        super().__init__()
        self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = Attention(c)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = MLP(c)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, layer: int, mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cache, layer, mask)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """A GPT of the given shape with freshly initialised weights.

    config must be resolved (GPTConfig.resolved): no field left to choose.
    Set model.activation_checkpointing to keep in training only each block's input, and compute the block again for its
    backward pass (arXiv:1604.06174): a third more products for a fraction of the memory.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.activation_checkpointing = config, False
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]  # whose own type says only Module
            Block(config) for _ in range(config.n_layers)
        )
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.cross_entropy_ = cross_entropy_
        self.init_rotary()
        self.init_weights()

    def init_rotary(self) -> None:
        """The tables of rotary positions: computed, so not saved with the weights."""
        self.cos: Tensor
        self.sin: Tensor
        cos, sin = rotary_tables(self.config.head_dim, self.config.max_length, self.config.rope_base)
        self.register_buffer("cos", cos, persistent=False)  # (max_length, K/2)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every initial value of the model in one place.

        Projections into a block: uniform with standard deviation D^-1/2, so that their outputs have unit scale.
        Projections out of a block: zero, so that each block starts as the identity (arXiv:2203.03466, App. D.2).
        """
        c = self.config
        for block in self.blocks:
            bound = math.sqrt(3 / c.d_model)  # a uniform's standard deviation is bound / sqrt(3)
            nn.init.uniform_(block.attention.wqkv.weight, -bound, bound)
            nn.init.uniform_(block.mlp.w_up.weight, -bound, bound)
            nn.init.zeros_(block.attention.wo.weight)
            nn.init.zeros_(block.mlp.w_down.weight)
        nn.init.normal_(self.head.weight, std=0.001)  # near zero: the first loss is ln V
        # A tied token meets itself in the head: with std s its own logit is about s D, which must stay small too.
        nn.init.normal_(self.embedding.weight, std=min(0.02, 5 / c.d_model) if c.tie_embeddings else 0.8)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        packed: Packed | None = None,
    ) -> Tensor:
        """ids (B, T) int64 -> logits (B, T, V), or with targets (B, T) the summed nats as an fp32 scalar.

        A target of -1 does not count.

        cache: continue behind its positions, and add to it. last_only: logits of the last position, (B, 1, V).
        packed: the rows hold several texts each; -> (n, V). Raises ValueError when the positions exceed max_length.
        """
        start, T = cache.seen if cache else 0, ids.size(1)
        end = start + T if packed is None else int(packed.positions.max()) + 1
        if end > self.config.max_length:
            raise ValueError(f"{end} tokens exceed the model's context of {self.config.max_length}")
        here = slice(start, end) if packed is None else packed.positions
        cos, sin, mask = self.cos[here], self.sin[here], None if packed is None else packed.mask
        x = self.embedding(ids)  # (B, T, D)
        autocast = torch.is_autocast_enabled(x.device.type)
        products = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if autocast:  # in fp16 the residual stream stays fp32: it is a sum that may pass the largest fp16, 65,504
            x = x.to(torch.float32 if products == torch.float16 else products)
        again = self.activation_checkpointing and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            if again:
                x = checkpoint(block, x, cos, sin, cache, layer, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, cos, sin, cache, layer, mask)
        if cache is not None:
            cache.seen += T
        if last_only:
            x = x[:, -1:]
        if packed is not None:
            x = x[packed.at]
        x = self.final_norm(x)
        if targets is None:
            logits: Tensor = self.head(x)
            return logits
        x = x.flatten(0, 1).to(products)
        return HeadLoss.apply(x, self.head.weight, targets.flatten(), self.cross_entropy_)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile, with its arguments, in place: a graph for all blocks, one for the last norm, one for the loss.

        A graph of the whole model saves 0.5% of a step (a CPU, fp32) and compiles each layer anew (docs/log.md); and
        where several processes share a step, a block's gradients are exchanged while those before it are computed.
        """
        for block in self.blocks:
            block.compile(*args, **kwargs)
        self.final_norm.compile(*args, **kwargs)
        self.cross_entropy_ = torch.compile(cross_entropy_, *args, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def block_matrices(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """The blocks' weights, and the rows of the matrices in each that Muon orthogonalises by themselves: a head's
        queries, keys or values; all of attention's output; ROWS_TOGETHER of the MLP's, where gate and up are apart."""
        c = self.config
        found: list[tuple[Tensor, tuple[int, ...]]] = []
        for block in self.blocks:
            attention, mlp = block.attention, block.mlp
            found += [
                (attention.wqkv.weight, (c.head_dim,) * (c.n_heads + 2 * c.n_kv_heads)),
                (attention.wo.weight, (c.d_model,)),
                (mlp.w_up.weight, in_parts(c.d_ff) * (2 if mlp.gated else 1)),
                (mlp.w_down.weight, in_parts(c.d_model)),
            ]
        return found

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part; a tied head counts once, as the embedding."""
        norms = sum(m.weight.numel() for m in self.modules() if isinstance(m, RMSNorm))
        counts = {
            "embedding": self.embedding.weight.numel(),
            "attention": sum(p.numel() for n, p in self.named_parameters() if ".attention.w" in n),
            "mlp": sum(p.numel() for n, p in self.named_parameters() if ".mlp.w" in n),
            "norms": norms,
            "head": 0 if self.config.tie_embeddings else self.head.weight.numel(),
        }
        return counts | {"total": sum(counts.values())}

    def flops_per_token(self, training: bool = True) -> int:
        """Floating-point operations of the matrix products for one token in a row of max_length tokens.

        A multiply-add counts two. Forward: 2 per weight in a product (the embedding is a look-up, the head a
        product, tied or not) and, for attention, 2 products of H K numbers with the (max_length + 1) / 2 keys that
        a causal position sees on average. The backward pass costs twice the forward (arXiv:2204.02311, App. B,
        which counts the masked half of attention as well). Recomputation is not counted.
        """
        c = self.config
        counts = self.parameter_counts()
        weights = counts["attention"] + counts["mlp"] + c.vocab_size * c.d_model
        attention = c.n_layers * 2 * c.n_heads * c.head_dim * (c.max_length + 1)
        return (2 * weights + attention) * (3 if training else 1)
