"""What this machine is and what it is good at: device, number format, compiler, pages of memory."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import ConfigError

_GPUS = Path("/dev/nvidiactl")  # by which programs reach NVIDIA's driver
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def default_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU. Raises ConfigError for a GPU that this torch has no code for, or whose
    driver it cannot use."""
    if torch.cuda.is_available():
        _check_built_for(torch.cuda.get_device_capability())
        return torch.device("cuda")
    # Of a driver too old for it torch only warns, and eight processes would train on the CPU. (A container without
    # a GPU sees the driver in /proc, too; and CUDA_VISIBLE_DEVICES may name none: empty, -1, NoDevFiles.)
    visible = re.match(r"\d|GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    driver = lines_of("/proc/driver/nvidia/version")
    if torch.version.cuda and driver and visible and _GPUS.exists():
        raise ConfigError(
            f"torch {torch.__version__}, made for CUDA {torch.version.cuda}, cannot use the driver of the GPU here "
            f"({driver[0]}); update the driver, install a torch for an older CUDA (pip install --force-reinstall torch "
            f"--index-url https://download.pytorch.org/whl/cu126), or hide the GPU with CUDA_VISIBLE_DEVICES="
        )
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _check_built_for(capability: tuple[int, int]) -> None:
    """Each build of torch brings machine code for some architectures (sm_80 runs on 8.0 to 8.9), and for some code that
    the driver compiles for later ones (compute_90). On any other card the first operation fails."""
    built_for = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))  # none: AMD's
    fitting = (
        int(major) == capability[0] and int(minor) <= capability[1]
        if kind == "sm"
        else (int(major), int(minor)) <= capability
        for kind, major, minor in built_for
    )
    if built_for and not any(fitting):
        raise ConfigError(
            f"torch {torch.__version__} has no code for {describe(torch.device('cuda'))} (sm_{capability[0]}"
            f"{capability[1]}), but for {' '.join(torch.cuda.get_arch_list())}; install another build of it (for cards "
            f"older than Turing: pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126)"
        )


def choose_precision(device: torch.device, wanted: str) -> str:
    """bf16, fp16, tf32 or fp32: what `wanted` ("auto" or one of these) means on this device.

    Weights and optimizer state are fp32 in any case; this is the format of the matrix products. auto is bf16
    where the hardware multiplies in it, fp16 (with a scaled loss) on older CUDA cards, fp32 otherwise. tf32 is fp32
    whose products round their inputs to mantissas of 10 bits: half the speed of bf16; fp32 may have a sixteenth.
    Raises ConfigError for a format that the device lacks.
    """
    bf16 = _has_bf16(device)
    if wanted == "auto":
        return "bf16" if bf16 else "fp16" if device.type == "cuda" else "fp32"
    if wanted == "bf16" and not bf16 and device.type == "cuda":
        raise ConfigError(f"precision bf16 is not supported by {describe(device)}; use fp16 or auto")
    if wanted == "tf32" and not (bf16 and device.type == "cuda"):
        raise ConfigError(f"precision tf32 needs a CUDA card of 2020 or later, not {describe(device)}; use auto")
    if wanted == "fp16" and device.type != "cuda":
        raise ConfigError(f"precision fp16 needs a CUDA device, and this is {device.type}; use auto")
    return wanted


def allow_tf32(device: torch.device, precision: str) -> None:
    """Let CUDA round the inputs of fp32 products to TF32, but for fp32 itself. (Beside bf16 and fp16 there are no fp32
    products; but torch's compiler would advise each process to allow it.)"""
    if device.type == "cuda":  # a CPU's products would be rounded as well
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")


def best_dtype(device: torch.device) -> torch.dtype:
    """The format that the device multiplies fastest: for products outside of autocast, and to keep a trained model's
    weights in, which autocast would convert anew for each token."""
    return AUTOCAST_DTYPES.get(choose_precision(device, "auto"), torch.float32)


# Dense products in bf16 (fp16 on those WITHOUT_BF16), fp32 sums, TFLOP/s: the makers' data sheets, without
# "sparsity"; in TF32 they do half. Then memory in GB, the least that a card of this name is sold with. The first that
# is a word of the device's name counts (an RTX A4000 is no A40).
CARDS = {
    "B200": (2250, 180), "H200": (989, 141), "GH200": (989, 96), "H100 PCIe": (756, 80), "H100 NVL": (835, 94),
    "H100": (989, 80), "A100": (312, 40), "A800": (312, 40), "A40": (150, 48), "A30": (165, 24), "A10G": (70, 24),
    "A10": (125, 24), "L40S": (362, 48), "L40": (181, 48), "L4": (121, 24), "RTX 6000 Ada": (364, 48),
    "RTX A6000": (155, 48), "RTX 5090": (210, 32), "RTX 4090": (165, 24), "RTX 3090": (71, 24), "MI300X": (1307, 192),
    "V100": (125, 16), "T4": (65, 16),
}  # fmt: skip
WITHOUT_BF16 = ("V100", "T4")  # nor tf32: before Ampere
PEAK_TFLOPS = {card: tflops for card, (tflops, _) in CARDS.items()}
MEMORY_GB = {card: gigabytes for card, (_, gigabytes) in CARDS.items()}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of matrix products that the device can do at best, for MFU; None if that is not known.

    A GPU's from the table above; a CPU's measured now, in a third of a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if " MIG " in name:  # a slice, of any size, of the card it is named after
            return None
        known = [tflops for card, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{card}\b", name)]
        return known[0] * 1e12 / (2 if precision == "tf32" else 1) if known and precision != "fp32" else None
    if device.type != "cpu":
        return None
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    a, b = torch.ones(2048, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    best, started = math.inf, time.perf_counter()
    while (now := time.perf_counter()) - started < 0.3:
        torch.mm(a, b)
        best = min(best, time.perf_counter() - now)
    return 2 * 2048 * 1024 * 1024 / best


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere; before it, bf16 is emulated
    if device.type == "cpu":  # avx512_bf16 or amx on x86, bf16 instructions on ARM
        if platform.machine() in ("x86_64", "AMD64"):
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        # (macOS' torch is built without MKLDNN.)
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def why_not_compile(device: torch.device) -> str | None:
    """The reason why torch.compile cannot work here, or None."""
    if device.type == "mps":
        return "not on MPS"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is older than Volta"
    if device.type == "cuda":  # Triton builds a small C module that launches its kernels
        if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
            return "no C compiler found"
    elif not shutil.which(compiler := os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")):
        return f"there is no C++ compiler {compiler}; CXX may name another"
    headers = (sysconfig.get_path("include"), sysconfig.get_path("include", "posix_prefix"))
    if not any(Path(folder, "Python.h").exists() for folder in headers):
        return "no Python.h found; on Debian and Ubuntu: apt install python3-dev"
    return None if sys.version_info < (3, 15) else "torch does not support this Python yet"


def compile_for_training(model: nn.Module, device: torch.device) -> None:
    """model.compile(), which on a CPU keeps for the backward pass little but what products of matrices have made.

    The rest is computed again there (arXiv:1604.06174 does so with everything): a third less is kept, and with
    keep_freed_memory the whole step takes the same time (docs/log.md). On a GPU, unmeasured, the compiler weighs both.
    """

    def sparing(graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        with torch._functorch.config.patch(aggressive_recomputation=True):
            return compile_fx(graph, inputs)

    # Inside DDP it would cut a block into several graphs, to exchange gradients early: a block is early enough.
    torch._dynamo.config.optimize_ddp = False
    model.compile(dynamic=False, backend=sparing if device.type == "cpu" else "inductor")


def give_back_freed_memory() -> None:
    """Let malloc, where it is glibc's, map each array of 128 kB or more by itself, and give it back when it is freed.

    For a program's start, until keep_freed_memory: what compiling and a first pass leave behind then lies together. It
    would otherwise lie between the arrays of that pass, and few of the next would suit the gaps: 6 to 8% of a step's
    memory (docs/log.md).
    """
    _set_thresholds(2**17, trim=2**17)


def keep_freed_memory() -> None:
    """Let malloc keep what a step frees for the next one, where it is glibc's.

    It would give much of it back, and the system clear tens of thousands of pages in each step: some 5% of its time,
    and 40% more if each array were mapped by itself (docs/log.md).
    """
    most = 2**31 - 1  # an int of bytes
    # glibc before 2.35 takes at most 32 MB for the threshold above which it maps an array by itself. Unless it is set,
    # setting the other one would fix it at 128 kB, and every array would be mapped anew.
    _set_thresholds(most, 2**25, trim=most)


def _set_thresholds(*of_mmap: int, trim: int) -> None:
    """malloc's, in bytes: the first of of_mmap that it takes. If the environment sets either, both stay as they are."""
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & os.environ.keys():
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and any(mallopt(mmap_threshold, n_bytes) for n_bytes in of_mmap):
        mallopt(trim_threshold, trim)


def in_large_pages(shapes: Sequence[torch.Size], dtype: torch.dtype) -> list[Tensor]:
    """Arrays to be filled, one behind another in pages of 2 MB if Linux has them; memory is taken when one is filled.

    For weights that are read again for each token: a processor keeps the places of few pages, and looks up those of
    4 kB all the time (docs/log.md).
    """
    page, line = 2**21, 64
    ends = list(accumulate(-(-shape.numel() * dtype.itemsize // line) * line for shape in shapes))
    try:
        area = mmap.mmap(-1, page + sum(ends[-1:]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        area.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError, OverflowError):  # another system, a Linux without them, or too little memory
        return [torch.empty(shape, dtype=dtype) for shape in shapes]
    first = -torch.frombuffer(area, dtype=torch.uint8).data_ptr() % page
    return [
        torch.frombuffer(area, dtype=dtype, count=shape.numel(), offset=first + start).view(shape)
        for shape, start in zip(shapes, [0, *ends], strict=False)
    ]


def describe(device: torch.device) -> str:
    """The device's name and memory, for people."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GB"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_cpu_name()}, {torch.get_num_threads()} threads, {memory:.0f} GB"


def _cpu_name() -> str:
    names = [line.partition(":")[2].strip() for line in lines_of("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def lines_of(path: str) -> list[str]:
    """Of a file in which Linux tells of itself; none on another system."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
