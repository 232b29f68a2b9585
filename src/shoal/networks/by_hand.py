"""What layers that are computed by hand are made of (evaluation.py, chain.py): activations in place, their derivatives, and products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# OpenBLAS multiplies with one thread up to this many multiplications, so that the bits do not depend on a thread count that only the environment
# variables of the process decide.
SINGLE_THREAD_PRODUCT = 2**18
_NARROW = 16  # up to so many rows or columns, numpy takes half of torch's time or less


def _tanh(value: Tensor) -> Tensor:
    """By numpy: torch hands it to a library that takes seven times as long on processors other than its maker's (Zen 4)."""
    if value.is_cuda:
        return torch.tanh_(value)
    array = value.numpy()
    np.tanh(array, out=array)
    return value


ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {"tanh": _tanh, "relu": torch.relu_}
_tanh_backward, _relu_backward = torch.ops.aten.tanh_backward, torch.ops.aten.threshold_backward
BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": _tanh_backward,
    "relu": lambda gradient, output: _relu_backward(gradient, output, 0),
}


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, both matrices on the CPU, without gradient: small and narrow ones by numpy; torch has the threads for the others."""
    (rows, inner), columns = a.shape, b.shape[1]
    if (
        inner == 1 or min(rows, inner, columns) > _NARROW or rows * inner * columns > SINGLE_THREAD_PRODUCT
    ):  # numpy is slow at outer products
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if out is None:
        return torch.from_numpy(np.matmul(a.numpy(), b.numpy()))
    np.matmul(a.numpy(), b.numpy(), out=out.numpy())
    return out
