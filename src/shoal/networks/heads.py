"""From features to a distribution over actions, by the kind of the action space. Legend: N batch, D features or action dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal.config import PolicyConfig
from shoal.errors import ConfigError
from shoal.networks.encoders import orthogonal
from shoal.ops.distributions import Bernoulli, Categorical, DiagonalGaussian, Distribution, MultiCategorical, StateDependentGaussian
from shoal.types import FieldSpec, LeafSpec


@dataclass(frozen=True)
class NoiseSpec:
    """Exploration noise that one environment needs: `size` float32 numbers per step, or per rollout (the same in each of its steps).

    kind: `uniform` in [0, 1), drawn as float32 (a float64 below 1 may round up to 1); `normal` standard.
    explores: the first number is uniform, less the share of random actions (epsilon): where it is negative, the action is one at random.
    """

    kind: Literal["uniform", "normal"]
    size: int
    per: Literal["step", "rollout"] = "step"
    explores: bool = False

    def draw(self, lead: Sequence[int], rng: np.random.Generator, epsilon: float = 0.0) -> npt.NDArray[np.float32]:
        """Noise float32 [*lead, size]. epsilon: share of random actions, for a policy that `explores`."""
        shape = (*lead, self.size)
        noise = rng.random(shape, np.float32) if self.kind == "uniform" else rng.standard_normal(shape, np.float32)
        if self.explores:
            if self.kind == "normal":
                noise[..., 0] = rng.random(tuple(lead), np.float32)
            noise[..., 0] -= np.float32(epsilon)
        return noise


class ActionHead(nn.Module):
    """One linear layer, and log_std for continuous actions: features [N, D] -> distribution over actions [N, *leaf shape].

    Attributes:
      kind: of the distribution: that of the leaf, or `gsde`.
      noise: what `sample` takes.
      field: the action as it is stored: int64 counted from zero, int8 bits, or float32 raw (the environment's side squashes).
    """

    log_std: Tensor

    def __init__(self, leaf: LeafSpec, num_features: int, config: PolicyConfig) -> None:
        super().__init__()
        if config.exploration == "gsde" and leaf.kind != "box":
            raise ConfigError(
                f"policy.exploration: gsde is for continuous actions (a Box), and this environment's are {leaf.kind}; use gaussian"
            )
        self.kind: str = "gsde" if leaf.kind == "box" and config.exploration == "gsde" else leaf.kind
        self._shape, self._nvec = leaf.shape, leaf.nvec
        gsde = self.kind == "gsde"
        size = sum(leaf.nvec) if leaf.kind in ("discrete", "multi_discrete") else leaf.size
        self.linear = nn.Linear(num_features, size)
        orthogonal(self.linear, 0.01, config.orthogonal_init)
        if leaf.kind == "box":
            self.log_std = nn.Parameter(torch.full((num_features, size) if gsde else (size,), config.log_std_init))
        if gsde:
            self.noise = NoiseSpec("normal", num_features * size, "rollout")
        elif leaf.kind == "box":
            self.noise = NoiseSpec("normal", size)
        else:
            self.noise = NoiseSpec("uniform", {"discrete": 1, "multi_discrete": len(leaf.nvec)}.get(leaf.kind, size))
        dtype = {"box": "float32", "multi_binary": "int8"}.get(leaf.kind, "int64")
        self.field = FieldSpec("action", dtype, leaf.shape, "T")

    def forward(self, features: Tensor, action_mask: Tensor | None = None) -> Distribution:
        parameters = self.linear._parameters
        output = functional.linear(features, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
        if self.kind == "discrete":
            return Categorical(output, action_mask)
        if self.kind == "multi_discrete":
            return MultiCategorical(output, self._nvec, action_mask, self._shape)
        if self.kind == "multi_binary":
            return Bernoulli(output, action_mask, self._shape)
        if self.kind == "gsde":
            return StateDependentGaussian(output, self.log_std, features, self._shape)
        return DiagonalGaussian(output, self.log_std, self._shape)
