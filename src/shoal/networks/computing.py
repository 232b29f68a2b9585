"""How a learner's policy computes where more is asked for than float32 as it is written: mixed precision, and torch.compile.

Mixed precision: encoders run under autocast in bfloat16, and their features are float32 again. So heads, log-probabilities, values and losses
are float32, as are the weights that the optimizer keeps: it is the products inside the encoders that are rounded. bfloat16 has the exponents of
float32, so that no gradient vanishes for want of a scale.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.errors import ConfigError


def check_precision(device: torch.device) -> None:
    """Raise ConfigError where `device` does not compute in bfloat16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"learner.precision: {torch.cuda.get_device_name(device)} does not compute in bfloat16; use --learner.precision float32"
        )


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError where torch.compile cannot work for `device`, saying what is missing. A few seconds, since it tries."""
    wanted = os.environ.get("CXX", "g++")
    if shutil.which(wanted.split()[0] if wanted.strip() else "g++") is None:
        raise ConfigError(
            f"learner.compile: torch.compile needs a C++ compiler, and {wanted!r} is not on the PATH (install one, or name it in CXX)"
        )
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.exists():
        raise ConfigError(f"learner.compile: torch.compile needs Python's headers, and {headers} is missing (install python3-dev)")
    try:
        with torch.inference_mode():
            compiled(_trial)(torch.ones(4, device=device))
    except Exception as error:
        raise ConfigError(f"learner.compile: torch.compile does not work here: {(str(error).splitlines() or [repr(error)])[0]}") from error


def _trial(value: Tensor) -> Tensor:
    return value.sin() + 1.0


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile in this process: its own helper processes would be nobody's."""
    from torch._inductor import config as inductor

    inductor.compile_threads = 1
    return torch.compile(function)


def any_length(*tensors: Tensor | None) -> None:
    """Compile for any number of rows from the first call on. Else the first number met would get code of its own, and what is computed after
    a resume could differ from what would have been computed without."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def compute_facts(device: torch.device, precision: str, compile: bool) -> dict[str, str]:
    """What the bits of a run depend on besides torch's build and the processor, where more than the default is asked for."""
    facts: dict[str, str] = {}
    if device.type == "cuda":
        facts["gpu"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    if precision == "bfloat16" and device.type == "cpu":
        facts["bfloat16"] = _bfloat16_unit()
    if compile:
        facts["compiler"] = os.environ.get("CXX", "g++")
    return facts


def _bfloat16_unit() -> str:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return "unknown"
    return next((unit for unit in ("amx_bf16", "avx512_bf16", "bf16") if unit in flags), "none")
