"""What this machine is and what it is good at: device, number format, compiler."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path

import torch

from errors import ConfigError

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def default_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(device: torch.device, wanted: str) -> str:
    """bf16, fp16 or fp32: what `wanted` ("auto" or one of these) means on this device.

    Weights and optimizer state are fp32 in any case; this is the format of the matrix products. auto is bf16
    where the hardware multiplies in it, fp16 (with a scaled loss) on older CUDA cards, fp32 otherwise.
    Raises ConfigError for a format that the device lacks.
    """
    bf16 = _has_bf16(device)
    if wanted == "auto":
        return "bf16" if bf16 else "fp16" if device.type == "cuda" else "fp32"
    if wanted == "bf16" and not bf16 and device.type == "cuda":
        raise ConfigError(f"train.precision bf16 is not supported by {describe(device)}; use fp16 or auto")
    if wanted == "fp16" and device.type != "cuda":
        raise ConfigError(f"train.precision fp16 needs a CUDA device, and this is {device.type}; use auto")
    return wanted


def inference_dtype(device: torch.device) -> torch.dtype:
    """The device's best format, to keep a trained model's weights in: under autocast they would be converted anew
    for each token."""
    return AUTOCAST_DTYPES.get(choose_precision(device, "auto"), torch.float32)


# Dense products in bf16 (fp16 on the last line's cards), fp32 sums, TFLOP/s: the makers' data sheets, without
# "sparsity". The first that is a word of the device's name counts (an RTX A4000 is no A40).
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10G": 70, "A10": 125, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 6000 Ada": 364, "RTX A6000": 155, "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307,
    "V100": 125, "T4": 65,
}  # fmt: skip


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of matrix products that the device can do at best, for MFU; None if that is not known.

    A GPU's from the table above; a CPU's measured now, in a third of a second.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [tflops for card, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{card}\b", name)]
        return known[0] * 1e12 if known and precision != "fp32" else None
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
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return False


def why_not_compile(device: torch.device) -> str | None:
    """The reason why torch.compile cannot work here, or None."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "c++"))):
        return "no C++ compiler found"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return "the GPU is older than Volta"
    if device.type == "mps":
        return "not on MPS"
    return None if sys.version_info < (3, 15) else "torch does not support this Python yet"


def describe(device: torch.device) -> str:
    """The device's name and memory, for people."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GB"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_cpu_name()}, {torch.get_num_threads()} threads, {memory:.0f} GB"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
