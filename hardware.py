"""What this machine is and what it is good at: device, number format, compiler."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from config import ConfigError

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


def autocast(device: torch.device) -> torch.autocast:
    """The context in which a trained model runs here: matrix products in the device's best format."""
    precision = choose_precision(device, "auto")
    return torch.autocast(device.type, AUTOCAST_DTYPES.get(precision), enabled=precision in AUTOCAST_DTYPES)


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
