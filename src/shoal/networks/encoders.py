"""From prepared observations to features. Legend: N batch, D features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": functional.elu,
    "silu": functional.silu,
}


def orthogonal(layer: nn.Linear | nn.Conv2d, gain: float, enabled: bool = True) -> None:
    """Orthogonal weights and zero biases in place (Saxe et al. 2013, arXiv:1312.6120); torch's own initialisation where not enabled."""
    if enabled:
        nn.init.orthogonal_(layer.weight, gain)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class MLP(nn.Module):
    """[N, size] -> [N, num_features]: linear layers, each with the activation behind it; none gives the input itself."""

    def __init__(self, size: int, hidden_sizes: Sequence[int], activation: str, orthogonal_init: bool) -> None:
        super().__init__()
        sizes = [size, *hidden_sizes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.num_features = sizes[-1]
        self.activation = activation
        self._activate = ACTIVATIONS[activation]
        self.linears = [layer for layer in self.layers if isinstance(layer, nn.Linear)]  # ModuleList is slow to walk
        for layer in self.linears:
            orthogonal(layer, math.sqrt(2.0), orthogonal_init)

    def forward(self, value: Tensor) -> Tensor:
        activate = self._activate
        for layer in self.linears:
            parameters = layer._parameters  # half the cost of layer(value) at small batches
            value = activate(functional.linear(value, parameters["weight"], parameters["bias"]))  # type: ignore[arg-type]
        return value


Convolutions = tuple[tuple[int, int, int, int], ...]  # channels, kernel, stride, padding
NATURE: Convolutions = ((32, 8, 4, 0), (64, 4, 2, 0), (64, 3, 1, 0))
COMPACT: Convolutions = ((16, 8, 4, 0), (32, 4, 2, 0))
SMALL: Convolutions = ((32, 3, 1, 1), (64, 3, 2, 1))
SMALLEST_SIDE = 36  # pixels that the first two need at least


class ImageEncoder(nn.Module):
    """[N, C, H, W] -> [N, 512 or 256]: the Nature CNN (Mnih et al. 2015, doi:10.1038/nature14236) or, where `compact`, the one before it (Mnih et al.
    2013, arXiv:1312.5602), which costs a third and serves machines without a GPU. Images below 36 pixels go through two small layers."""

    def __init__(self, shape: tuple[int, ...], orthogonal_init: bool, *, compact: bool = False) -> None:
        super().__init__()
        channels, *side = shape
        num_features = 256 if compact else 512
        layers: list[nn.Conv2d] = []
        for width, kernel, stride, padding in SMALL if min(side) < SMALLEST_SIDE else COMPACT if compact else NATURE:
            layers.append(nn.Conv2d(channels, width, kernel, stride, padding))
            channels, side = width, [(s + 2 * padding - kernel) // stride + 1 for s in side]
        self.out = nn.Linear(channels * math.prod(side), num_features)
        self.num_features = num_features
        self.convolutions = nn.ModuleList(layers)
        weighted: list[nn.Conv2d | nn.Linear] = [*layers, self.out]
        for layer in weighted:
            orthogonal(layer, math.sqrt(2.0), orthogonal_init)

    def forward(self, image: Tensor) -> Tensor:
        for layer in self.convolutions:
            image = functional.relu(layer(image), inplace=True)
        return functional.relu(self.out(image.flatten(1)), inplace=True)


class Encoder(nn.Module):
    """Prepared observation by field name -> features [N, num_features].

    Vectors only: their concatenation through the MLP. One image only: the CNN alone. Otherwise the CNNs' features and the vectors, concatenated,
    through the MLP.

    Args:
      shapes: of one prepared element, by field name; three dimensions are an image.
      compact: the smaller CNN, see ImageEncoder.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        hidden_sizes: Sequence[int],
        activation: str,
        orthogonal_init: bool,
        *,
        compact: bool = False,
    ) -> None:
        super().__init__()
        self._vectors = [name for name, shape in shapes.items() if len(shape) == 1]
        self._images = [name for name, shape in shapes.items() if len(shape) == 3]
        cnns = [ImageEncoder(shapes[name], orthogonal_init, compact=compact) for name in self._images]
        self.cnns = nn.ModuleList(cnns)
        size = sum(shapes[name][0] for name in self._vectors) + sum(cnn.num_features for cnn in cnns)
        cnn_alone = len(self._images) == 1 and not self._vectors
        self.mlp = MLP(size, [] if cnn_alone else hidden_sizes, activation, orthogonal_init)
        self.num_features = self.mlp.num_features
        self.single_vector = self._vectors[0] if len(self._vectors) == 1 and not self._images else None  # the only input, if there is one

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        if self.single_vector is not None:
            return self.mlp.forward(observation[self.single_vector])
        parts = [observation[name] for name in self._vectors]
        parts += [cnn(observation[name]) for name, cnn in zip(self._images, self.cnns, strict=True)]
        return self.mlp.forward(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
