"""The model's forward pass for one more token of each row: what a text is written with, once its prompt was read.

The same mathematics as model.py in few operations: one token of a small model takes less time to compute than its
operations take to start, and one token of a large model as long as its weights take to read. On a CPU with a C++
compiler it is one operation, decoding.cpp.

Shapes as in model.py: B batch, H heads, G key/value heads, K head_dim, D d_model, V vocabulary.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import ConfigError, complain
from files import whole_file
from hardware import in_large_pages, lines_of
from model import GPT, KVCache, RMSNorm

Decode = Callable[[Tensor, KVCache], Tensor]  # newest ids (B,) and the cache of those before -> logits (B, V)
# Rows of a matrix that one text reads side by side, and how many bytes ahead they are asked for. The first tokens try
# all: which is fastest depends on the processor and on whether its caches hold the weights, by factors up to 1.5. The
# bits are the same.
WAYS = ((2, 6144), (1, 6144), (1, 0))
TRIES = 4  # of each way, a token each
FEW = 8  # rows: for 12, torch's products, which read a weight once for all of them, are as fast on large models


def decode_step(model: GPT, rows: int = 1, int8: bool = False) -> Decode:
    """The fastest step there is here for so many rows. The model's weights must not change while it is used.

    int8: round each row of each matrix to 8 bits, with a scale of its own. Raises ConfigError where there is no such
    step: there is one for a CPU with a C++ compiler.
    """
    dtype = format_of(model)
    in_cpp = model.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and library() is not None
    if int8 and not in_cpp:
        raise ConfigError("int8 weights are for a CPU with a working C++ compiler; leave --int8 out")
    return CompiledStep(model, int8) if in_cpp and (int8 or rows <= FEW) else DecodeStep(model)


def format_of(model: GPT) -> torch.dtype:
    """What its products compute in: the weights' own format, or that of autocast around it."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.embedding.weight.dtype


# ---- in C++, for a CPU --------------------------------------------------------------------------


class _Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scale")]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows", "columns")]


class _Layer(ctypes.Structure):
    _fields_ = [(name, _Matrix) for name in ("wqkv", "wo", "w_up", "w_down")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")]


class _Model(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(_Layer)), ("head", _Matrix)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("final_norm", "cos", "sin")]
    _fields_ += [(name, ctypes.c_int64) for name in ("n_layers", "D", "H", "G", "K", "threads", "swiglu")]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows_at_once", "ahead")]
    _fields_ += [("eps", ctypes.c_double)]


class CompiledStep:
    """decoding.cpp with the weights of a model, which must not change meanwhile."""

    def __init__(self, model: GPT, int8: bool = False):
        c, self._dtype = model.config, format_of(model)
        self._held: list[Tensor] = []  # what the pointers point to

        def vector(values: Tensor) -> int:
            self._held.append(values.detach().float().contiguous())
            return self._held[-1].data_ptr()

        stored = torch.int8 if int8 else self._dtype

        def is_stored(weight: Tensor) -> bool:  # as it is read here
            return weight.dtype == stored and weight.is_contiguous()

        matrices = [weight for weight, _ in model.block_matrices()] + [model.head.weight]
        rooms = iter(in_large_pages([weight.shape for weight in matrices if not is_stored(weight)], stored))

        def matrix(weight: Tensor) -> _Matrix:
            kept, scale = weight.detach(), None
            if int8:
                rows = kept.float()
                scales = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
                kept, scale = (rows / scales).round(), vector(scales)
            if not is_stored(kept):
                kept = next(rooms).copy_(kept)
            self._held.append(kept)
            return _Matrix(kept.data_ptr(), scale, *kept.shape)

        layers = (_Layer * c.n_layers)()
        for layer, b in zip(layers, model.blocks, strict=True):
            a = b.attention
            layer.wqkv, layer.wo = matrix(a.wqkv.weight), matrix(a.wo.weight)
            layer.w_up, layer.w_down = matrix(b.mlp.w_up.weight), matrix(b.mlp.w_down.weight)
            layer.attention_norm, layer.mlp_norm = vector(b.attention_norm.weight), vector(b.mlp_norm.weight)
            if isinstance(a.q_norm, RMSNorm) and isinstance(a.k_norm, RMSNorm):
                layer.q_norm, layer.k_norm = vector(a.q_norm.weight), vector(a.k_norm.weight)
        sizes = (c.n_layers, c.d_model, c.n_heads, c.n_kv_heads, c.head_dim, 0, c.mlp == "swiglu", 0, 0, c.norm_eps)
        vectors = (vector(model.final_norm.weight), vector(model.cos), vector(model.sin))
        self._model = _Model(layers, matrix(model.head.weight), *vectors, *sizes)
        self._embedding, self._config, self._n_vocab = model.embedding.weight.detach(), c, model.head.weight.size(0)
        cached = "float" if self._dtype == torch.float32 else "bf16"
        self._step = getattr(library(), f"step_{'int8_t' if int8 else cached}_{cached}")
        self._untried, self._seconds = list(WAYS) * TRIES, dict.fromkeys(WAYS, math.inf)

    def __call__(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids (B,), the newest token of each row -> logits (B, V) of the next; adds them to the cache.

        Raises ValueError when the positions exceed the model's context.
        """
        c, t = self._config, cache.seen
        if t >= c.max_length:
            raise ValueError(f"{t + 1} tokens exceed the model's context of {c.max_length}")
        keys, values, length = cache.keys, cache.values, cache.keys.size(3)
        for kept in (keys, values):  # or it would write elsewhere
            fits = kept.shape == (c.n_layers, len(ids), c.n_kv_heads, length, c.head_dim) and t < length
            if not (fits and kept.dtype == self._dtype and kept.is_contiguous()):
                raise ValueError(f"a cache of {tuple(kept.shape)}, {kept.dtype}, has no room for these tokens")
        x = F.embedding(ids, self._embedding).float()
        logits = torch.empty(len(ids), self._n_vocab)
        self._model.threads = torch.get_num_threads()
        way = self._untried.pop() if self._untried else min(WAYS, key=self._seconds.__getitem__)
        self._model.rows_at_once, self._model.ahead = way
        pointers = (x.data_ptr(), keys.data_ptr(), values.data_ptr(), len(ids), length, t, logits.data_ptr())
        started = time.perf_counter()
        self._step(ctypes.byref(self._model), *(ctypes.c_int64(p) for p in pointers))
        self._seconds[way] = min(self._seconds[way], time.perf_counter() - started)
        cache.seen += 1
        return logits


@functools.cache
def library() -> ctypes.CDLL | None:
    """decoding.cpp, compiled for this processor and kept in ~/.cache/basicgpt; or None, and a line with the reason."""
    source = Path(__file__).with_name("decoding.cpp")
    compiler = next(filter(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "c++")), None)
    options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    if platform.machine() == "x86_64":
        options.append("-mprefer-vector-width=512")
    try:
        if compiler is None:
            raise OSError("no C++ compiler found")
        # With the processor's instructions: a home folder may be shared by several machines.
        cpu = [line for line in lines_of("/proc/cpuinfo") if line.startswith(("flags", "Features"))][:1]
        key = f"{source.read_text()} {compiler} {options} {platform.machine()} {cpu}".encode()
        folder, name = Path("~/.cache/basicgpt").expanduser(), f"decoding-{_digest(key)}"
        for file in folder.glob(f"{name}-*.so"):
            if file.stem == f"{name}-{_digest(file.read_bytes())}":  # loading half of one would kill the process
                with contextlib.suppress(OSError):  # of a machine that shares the home folder and has other libraries
                    return ctypes.CDLL(str(file))
        with tempfile.TemporaryDirectory() as temporary:
            made = Path(temporary) / "decoding.so"
            done = subprocess.run([compiler, *options, source, "-o", made], capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"{compiler}: {(done.stderr.strip() or 'failed').splitlines()[0]}")
            code = made.read_bytes()
        with whole_file(folder / f"{name}-{_digest(code)}.so") as kept:
            kept.write(code)
        return ctypes.CDLL(str(folder / f"{name}-{_digest(code)}.so"))
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home folder
        complain(f"text is written more slowly, without decoding.cpp: {error}")
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


# ---- in torch's operations, for all else ----------------------------------------------------------


class DecodeStep:
    """A model, ready to be asked for one token after another. Its weights must not change meanwhile."""

    def __init__(self, model: GPT):
        c, device = model.config, model.device.type
        # Under autocast, the weights' copies in its format are made here and once, instead of by each product.
        dtype = format_of(model)
        # Between the products all is in fp32 on a CPU, where that is as fast, and beside fp16, whose largest number the
        # residual stream may pass.
        between = torch.float32 if device == "cpu" or dtype == torch.float16 else dtype

        def prepare(weight: Tensor) -> Callable[[Tensor], Tensor]:
            held = weight.to(dtype)
            return lambda x: F.linear(x.to(dtype), held).to(between)

        self._config, self._dtype = c, between
        self._embedding, self._head = model.embedding.weight, prepare(model.head.weight)
        self._final_norm = model.final_norm.weight.to(between)
        self._layers = [
            (
                b.attention_norm.weight.to(between), prepare(b.attention.wqkv.weight), prepare(b.attention.wo.weight),
                b.mlp_norm.weight.to(between), prepare(b.mlp.w_up.weight), prepare(b.mlp.w_down.weight),
            )
            for b in model.blocks
        ]  # fmt: skip
        # Scale of the (normed) queries and keys of all layers, (layers, H + G, K), to be joined with the rotation:
        # rotate(w x) = (w cos) x + (w' sin') x', where ' swaps the halves of the channels.
        ones = torch.ones(c.head_dim, device=model.device)
        norms = [(b.attention.q_norm, b.attention.k_norm) for b in model.blocks]
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
