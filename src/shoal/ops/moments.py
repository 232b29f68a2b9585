"""Running mean and variance in float64 (Chan, Golub & LeVeque 1979), for the normalisation of observations and rewards.

Exact means: the state depends on the values and the order in which they were merged, and on nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.errors import ShapeError

Array = npt.NDArray[Any]


class Moments:
    """Mean and variance of everything merged so far.

    Attributes:
      count: float64 scalar, values seen. mean: float64 [*shape]. m2: float64 [*shape], sum of squared deviations from the mean.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.count = 0.0
        self.mean: Array = np.zeros(shape, np.float64)
        self.m2: Array = np.zeros(shape, np.float64)

    def merge(self, values: Array) -> None:
        """Take in `values` [n, *shape], any dtype; n may be 0.

        Raises:
          ShapeError: if the trailing dimensions are not `shape`.
        """
        values = np.asarray(values, np.float64)
        if values.shape[1:] != self.mean.shape or values.ndim != self.mean.ndim + 1:
            raise ShapeError(f"expected values [n, {', '.join(map(str, self.mean.shape))}], got {values.shape}")
        added = len(values)
        if added == 0:
            return
        mean = values.mean(axis=0)
        deviation = values - mean
        total = self.count + added
        difference = mean - self.mean
        self.m2 = self.m2 + (deviation * deviation).sum(axis=0) + difference * difference * (self.count * added / total)
        self.mean = self.mean + difference * (added / total)
        self.count = total

    @property
    def variance(self) -> Array:
        """Population variance, float64 [*shape]; 1 before the first value, so that nothing is scaled."""
        return self.m2 / self.count if self.count else np.ones_like(self.m2)

    def inverse_std(self, epsilon: float = 1e-8) -> Array:
        """1 / sqrt(variance + epsilon), float64 [*shape]."""
        return np.asarray(1.0 / np.sqrt(self.variance + epsilon))

    def get_state(self) -> dict[str, Array]:
        """Copies: count [], mean and m2 [*shape], float64."""
        return {"count": np.asarray(self.count, np.float64), "mean": np.array(self.mean), "m2": np.array(self.m2)}

    def set_state(self, state: dict[str, Array]) -> None:
        """The inverse of `get_state`, exactly.

        Raises:
          ShapeError: if the state was of another shape.
        """
        if state["mean"].shape != self.mean.shape or state["m2"].shape != self.mean.shape:
            raise ShapeError(f"expected moments of shape {self.mean.shape}, got {state['mean'].shape} and {state['m2'].shape}")
        self.count = float(state["count"])
        self.mean = np.array(state["mean"], np.float64)
        self.m2 = np.array(state["m2"], np.float64)
