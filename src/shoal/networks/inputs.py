"""From observations as the environment gave them to what encoders take. Legend: N batch, A choices."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from shoal.ops.moments import Moments
from shoal.types import EnvironmentSpec, LeafSpec

CLIP = 10.0  # of normalised observations, in standard deviations


class VectorInput(nn.Module):
    """A box or multi_binary leaf [N, *shape] -> [N, size] float32; uint8 is scaled by its upper bound, the rest taken as it is.

    With `normalise`, (x - mean) * inverse_std clipped to +-CLIP, from statistics that are frozen buffers of the policy version.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, leaf: LeafSpec, normalise: bool) -> None:
        super().__init__()
        self.shape = (leaf.size,)
        self._flatten = len(leaf.shape) != 1
        self.scale = 1.0 / max(1.0, *leaf.low, *leaf.high) if leaf.dtype == "uint8" and not normalise else None
        self.normalise = normalise
        if normalise:
            self.register_buffer("mean", torch.zeros(leaf.size))
            self.register_buffer("inverse_std", torch.ones(leaf.size))

    def forward(self, value: Tensor) -> Tensor:
        if value.dtype is not torch.float32:
            value = value.float()
        if self._flatten:
            value = value.reshape(len(value), -1)
        if self.scale is not None:
            value = value * self.scale
        if self.normalise:
            value = ((value - self.mean) * self.inverse_std).clamp(-CLIP, CLIP)
        return value


class ImageInput(nn.Module):
    """An image leaf [N, H, W], [N, C, H, W] or [N, H, W, C] -> [N, C, H, W] float32 with channels last in memory, which convolutions on
    processors prefer (a fifth to a third faster); uint8 is scaled to 0..1.

    Channels are last unless the first dimension is the smallest.
    """

    def __init__(self, leaf: LeafSpec) -> None:
        super().__init__()
        shape = leaf.shape
        self._grey = len(shape) == 2
        self._channels_last = not self._grey and shape[0] > min(shape)
        self.shape = (1, *shape) if self._grey else (shape[2], shape[0], shape[1]) if self._channels_last else shape
        self._scale = 1.0 / max(1.0, *leaf.low, *leaf.high) if leaf.dtype == "uint8" else 1.0

    def forward(self, value: Tensor) -> Tensor:
        if self._grey:
            value = value.unsqueeze(1)
        elif self._channels_last:
            value = value.permute(0, 3, 1, 2)
        prepared = value.to(torch.float32, memory_format=torch.channels_last)
        if self._scale == 1.0:
            return prepared
        return prepared.mul_(self._scale) if prepared is not value else prepared * self._scale


class ChoiceInput(nn.Module):
    """A discrete or multi_discrete leaf, int64 [N, *shape] counted from `start` -> one-hot [N, sum(nvec)] float32."""

    component: Tensor
    choice: Tensor

    def __init__(self, leaf: LeafSpec) -> None:
        super().__init__()
        starts = leaf.start or (0,) * len(leaf.nvec)
        choices = [start + i for start, n in zip(starts, leaf.nvec, strict=True) for i in range(n)]
        self.shape = (len(choices),)
        self._single = len(leaf.nvec) == 1
        self.register_buffer("component", torch.tensor(np.repeat(np.arange(len(leaf.nvec)), leaf.nvec)), persistent=False)
        self.register_buffer("choice", torch.tensor(choices), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        value = value.reshape(len(value), -1)
        return ((value if self._single else value[:, self.component]) == self.choice).float()


class Inputs(nn.Module):
    """All leaves of an observation: raw fields by name -> prepared tensors by name.

    Attributes:
      names: field names, in the order of the spec. shapes: of one prepared element, by name.
      normalised: names of the fields that have running statistics: every box that is no image, where the configuration asks for it.
    """

    def __init__(self, spec: EnvironmentSpec, normalise: bool, images: frozenset[str]) -> None:
        super().__init__()
        self.names = tuple(leaf.name("observation") for leaf in spec.observation)
        leaves: list[VectorInput | ImageInput | ChoiceInput] = []
        self.normalised: tuple[str, ...] = ()
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, leaf in zip(self.names, spec.observation, strict=True):
            prepare: VectorInput | ImageInput | ChoiceInput
            if name in images:
                prepare = ImageInput(leaf)
            elif leaf.kind in ("discrete", "multi_discrete"):
                prepare = ChoiceInput(leaf)
            else:
                with_statistics = normalise and leaf.kind == "box" and not leaf.is_image
                prepare = VectorInput(leaf, with_statistics)
                self.normalised += (name,) if with_statistics else ()
            leaves.append(prepare)
            self.shapes[name] = prepare.shape
        self.leaves = nn.ModuleList(leaves)
        self._calls = list(zip(self.names, leaves, strict=True))  # ModuleList is slow to walk

    def forward(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: leaf.forward(observation[name]) for name, leaf in self._calls}

    def set_statistics(self, moments: Mapping[str, Moments]) -> None:
        """Freeze new statistics into the buffers: `moments[name]` of shape [*leaf shape], for every name of `normalised`."""
        for name, leaf in self._calls:
            if isinstance(leaf, VectorInput) and leaf.normalise:
                leaf.mean.copy_(torch.from_numpy(moments[name].mean.reshape(-1)))
                leaf.inverse_std.copy_(torch.from_numpy(moments[name].inverse_std().reshape(-1)))
