"""The model's forward pass for one more token of each row: what a text is written with, after its prompt was read.

The same mathematics as model.py in a third of the operations, because at this size the time goes into starting them;
and with one row on a CPU, into reading the weights, which products with a vector do at the memory's speed.
Optionally with weights in int8: half the bytes to read.

Shapes as in model.py: B batch, H heads, G key/value heads, K head_dim, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import ConfigError
from model import GPT, Block, KVCache

Product = Callable[[Tensor], Tensor]  # x (B, inputs) -> x W^T (B, outputs)


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

        def prepare(weight: Tensor) -> Product:
            return int8_product(weight.to(dtype)) if int8 else product(weight.to(dtype))

        self._config, self._embedding = c, model.embedding.weight.to(dtype)
        self._final_norm, self._head = model.final_norm.weight.to(dtype), prepare(model.head.weight)
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        self._layers = [
            (
                b.attention_norm.weight.to(dtype), prepare(b.attention.wqkv.weight), prepare(b.attention.wo.weight),
                b.mlp_norm.weight.to(dtype), prepare(b.mlp.w_up.weight), prepare(b.mlp.w_down.weight),
            )
            for b in blocks
        ]  # fmt: skip
        # Scale of the normed queries and keys of all layers, (layers, H + G, K), to be joined with the rotation:
        # rotate(w x) = (w cos) x + (w' sin') x', where ' swaps the halves of the channels.
        norms = [(b.attention.q_norm.weight, b.attention.k_norm.weight) for b in blocks]
        scales = [torch.cat((q.expand(c.n_heads, -1), k.expand(c.n_kv_heads, -1))) for q, k in norms]
        self._scales = torch.stack(scales).to(dtype)
        self._swapped_scales = self._scales.roll(c.head_dim // 2, dims=-1)
        self._cos = torch.cat((model.cos, model.cos), dim=1).to(dtype)  # (max_length, K)
        self._sin = torch.cat((-model.sin, model.sin), dim=1).to(dtype)

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
        B, H, G, K, D = len(ids), c.n_heads, c.n_kv_heads, c.head_dim, c.d_model
        cos = (self._scales * self._cos[t]).unbind()
        sin = (self._swapped_scales * self._sin[t]).unbind()
        x = F.embedding(ids, self._embedding)  # (B, D)
        for layer, (attention_norm, wqkv, wo, mlp_norm, w_up, w_down) in enumerate(self._layers):
            qkv = wqkv(F.rms_norm(x, (D,), attention_norm, c.norm_eps)).view(B, H + 2 * G, K)
            qk = F.rms_norm(qkv[:, : H + G], (K,), None, c.norm_eps)
            qk = torch.addcmul(qk * cos[layer], qk.roll(K // 2, dims=-1), sin[layer])  # (B, H + G, K)
            k, v = cache.extend(layer, qk[:, H:, None], qkv[:, H + G :, None])  # (B, G, t + 1, K)
            y = F.scaled_dot_product_attention(qk[:, :H, None], k, v, enable_gqa=G != H)
            x = x + wo(y.view(B, H * K))
            up = w_up(F.rms_norm(x, (D,), mlp_norm, c.norm_eps))
            if c.mlp == "swiglu":
                gate, up = up.chunk(2, dim=1)
                hidden = F.silu(gate) * up
            else:
                hidden = F.relu(up).square()
            x = x + w_down(hidden)
        cache.seen += 1
        return self._head(F.rms_norm(x, (D,), self._final_norm, c.norm_eps))


def product(weight: Tensor) -> Product:
    """With weights as they are. A CPU reads them at 90% of the memory's speed in a product with a vector, and at 60% in
    one with a matrix of a single row (bf16)."""

    def multiply(x: Tensor) -> Tensor:
        if len(x) == 1 and x.device.type == "cpu":
            return torch.mv(weight, x[0])[None]
        return F.linear(x, weight)

    return multiply


def int8_product(weight: Tensor) -> Product:
    """With weights rounded to the nearest of 255 steps of each row."""
    rows = weight.float()
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    rounded = (rows / scale).round().to(torch.int8)
    scales = scale[:, 0].to(weight.dtype)
    return lambda x: torch.ops.aten._weight_int8pack_mm(x, rounded, scales)
