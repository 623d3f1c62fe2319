"""The model's forward pass for one more token of each row: what a text is written with, once its prompt was read.

The same mathematics as model.py in a third of the operations: one token of a small model takes less time to compute
than its operations take to start, and one token of a large model as long as its weights take to read.

Shapes as in model.py: B batch, H heads, G key/value heads, K head_dim, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import ConfigError
from model import GPT, Block, KVCache, RMSNorm

Product = Callable[[Tensor], Tensor]  # x (B, inputs) -> x W^T (B, outputs)
SMALL = 2**19  # weights in a matrix that a CPU multiplies faster in fp32: from its caches, starting takes longest


class DecodeStep:
    """A model, ready to be asked for one token after another. Its weights must not change meanwhile.

    int8: round each row of each matrix to 8 bits, with a scale of its own. Raises ConfigError where that product
    does not exist: on a CPU it does, for a model in bf16.
    """

    def __init__(self, model: GPT, int8: bool = False):
        c, device = model.config, model.device.type
        # Under autocast, the weights' copies in its format are made here and once, instead of by each product.
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else model.embedding.weight.dtype
        if int8 and (device, dtype) != ("cpu", torch.bfloat16):
            raise ConfigError("int8 weights are for a CPU that computes in bf16; leave --int8 out")
        # Between the products all is in fp32 on a CPU, where that is as fast, and beside fp16, whose largest number the
        # residual stream may pass.
        between = torch.float32 if device == "cpu" or dtype == torch.float16 else dtype

        def prepare(weight: Tensor) -> Product:
            return int8_product(weight) if int8 else product(weight.to(dtype))

        self._config, self._dtype = c, between
        self._embedding, self._head = model.embedding.weight, prepare(model.head.weight)
        self._final_norm = model.final_norm.weight.to(between)
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        self._layers = [
            (
                b.attention_norm.weight.to(between), prepare(b.attention.wqkv.weight), prepare(b.attention.wo.weight),
                b.mlp_norm.weight.to(between), prepare(b.mlp.w_up.weight), prepare(b.mlp.w_down.weight),
            )
            for b in blocks
        ]  # fmt: skip
        # Scale of the (normed) queries and keys of all layers, (layers, H + G, K), to be joined with the rotation:
        # rotate(w x) = (w cos) x + (w' sin') x', where ' swaps the halves of the channels.
        ones = torch.ones(c.head_dim, device=model.device)
        norms = [(b.attention.q_norm, b.attention.k_norm) for b in blocks]
        weights = [[norm.weight if isinstance(norm, RMSNorm) else ones for norm in pair] for pair in norms]
        scales = [torch.cat((q.expand(c.n_heads, -1), k.expand(c.n_kv_heads, -1))) for q, k in weights]
        self._scales = torch.stack(scales).to(between)
        self._swapped_scales = self._scales.roll(c.head_dim // 2, dims=-1)
        self._cos = torch.cat((model.cos, model.cos), dim=1).to(between)  # (max_length, K)
        self._sin = torch.cat((-model.sin, model.sin), dim=1).to(between)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids (B,), the newest token of each row -> logits (B, V) of the next; adds them to the cache.

        Raises ValueError when the positions exceed the model's context.
        """
        with torch.autocast(ids.device.type, enabled=False):
            return self._logits(ids, cache)

    def _logits(self, ids: Tensor, cache: KVCache) -> Tensor:
        c, t = self._config, cache.seen
        if t >= c.max_length:
            raise ValueError(f"{t + 1} tokens exceed the model's context of {c.max_length}")
        B, H, G, K = len(ids), c.n_heads, c.n_kv_heads, c.head_dim
        cos = (self._scales * self._cos[t]).unbind()
        sin = (self._swapped_scales * self._sin[t]).unbind()
        x = F.embedding(ids, self._embedding).to(self._dtype)  # (B, D)
        for layer, (attention_norm, wqkv, wo, mlp_norm, w_up, w_down) in enumerate(self._layers):
            qkv = wqkv(normed(x, c.norm_eps) * attention_norm).view(B, H + 2 * G, K)
            qk = normed(qkv[:, : H + G], c.norm_eps) if c.qk_norm else qkv[:, : H + G]
            qk = torch.addcmul(qk * cos[layer], qk.roll(K // 2, dims=-1), sin[layer])  # (B, H + G, K)
            k, v = cache.extend(layer, qk[:, H:, None], qkv[:, H + G :, None])  # (B, G, t + 1, K)
            q = qk[:, :H, None].to(k.dtype)
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=G != H).to(x.dtype)
            x = x + wo(y.view(B, H * K))
            up = w_up(normed(x, c.norm_eps) * mlp_norm)
            if c.mlp == "swiglu":
                gate, up = up.chunk(2, dim=1)
                hidden = F.silu(gate) * up
            else:
                hidden = F.relu(up).square()
            x = x + w_down(hidden)
        cache.seen += 1
        return self._head(normed(x, c.norm_eps) * self._final_norm)


def normed(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without its scale. In fp32 by hand: torch's own has more to start, 8 us for 5."""
    if x.dtype != torch.float32:
        return F.rms_norm(x, (x.size(-1),), None, eps)
    return x * torch.rsqrt(torch.linalg.vecdot(x, x)[..., None] / x.size(-1) + eps)


def product(weight: Tensor) -> Product:
    """With weights as they are; on a CPU in fp32 if there are few.

    A CPU reads them at 90% of the memory's speed in a product with a vector, and at 60% in one with a matrix of a
    single row (bf16).
    """
    if weight.device.type != "cpu":
        return lambda x: F.linear(x.to(weight.dtype), weight).to(x.dtype)
    held = weight.float() if weight.numel() <= SMALL else weight

    def multiply(x: Tensor) -> Tensor:
        if len(x) == 1:
            return torch.mv(held, x[0].to(held.dtype))[None].float()
        return F.linear(x.to(held.dtype), held).float()

    return multiply


def int8_product(weight: Tensor) -> Product:
    """With weights rounded to the nearest of 255 steps of each row."""
    rows = weight.float()
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    rounded, scales = (rows / scale).round().to(torch.int8), scale[:, 0].bfloat16()
    # That product reads 16 weights at a time, and beyond the end of a row whose length is no multiple of it.
    missing = -rows.size(1) % 16
    rounded = F.pad(rounded, (0, missing))
    return lambda x: torch.ops.aten._weight_int8pack_mm(F.pad(x.bfloat16(), (0, missing)), rounded, scales).float()
