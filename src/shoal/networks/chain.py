"""Layers whose gradients are written out: at a few hundred units, torch's graph costs more than the arithmetic.

`Chain` is an MLP, `TwinChain` two of one shape in one batched product (both critics of SAC and TD3). Both keep the outputs of their layers for
the way back, and give the same numbers as torch's graph up to rounding.

Legend: M rows, I inputs, O outputs, K = 2 twins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from shoal.networks.by_hand import ACTIVATE, BACKWARD
from shoal.networks.encoders import Encoder, orthogonal

Found = dict[Tensor, Tensor]  # gradient by parameter

ACTIVATIONS = tuple(ACTIVATE)


class Chain:
    """Linear layers with an activation between them, [M, I] -> [M, O]; `layers` are looked at at every call."""

    def __init__(self, layers: Sequence[nn.Linear], activation: str) -> None:
        self._layers, self._activate, self._backward = list(layers), ACTIVATE[activation], BACKWARD[activation]

    def forward(self, value_MI: Tensor) -> list[Tensor]:
        """The input and every layer's output, the last without activation. To be called without gradient."""
        outputs, last = [value_MI], len(self._layers) - 1
        for place, layer in enumerate(self._layers):
            value = torch.addmm(layer.bias, outputs[-1], layer.weight.t())
            outputs.append(value if place == last else self._activate(value))
        return outputs

    def backward(self, gradient_MO: Tensor, outputs: Sequence[Tensor], found: Found) -> None:
        """The parameters' gradients into `found`, from the derivative by the last output; `outputs` as of `forward`, or rows of them."""
        gradient = gradient_MO
        for place in reversed(range(len(self._layers))):
            layer = self._layers[place]
            found[layer.weight], found[layer.bias] = torch.mm(gradient.t(), outputs[place]), gradient.sum(0)
            if place:
                gradient = self._backward(torch.mm(gradient, layer.weight), outputs[place])


class Trunk:
    """An encoder and a linear head: by hand where they are one vector's MLP (with tanh or relu, on the processor), else by torch's graph."""

    def __init__(self, encoder: nn.Module, head: nn.Linear) -> None:
        self._encoder, self._head = encoder, head
        self._parameters = [*encoder.parameters(), *head.parameters()]
        self._vector, self._chain = None, None
        if type(encoder) is Encoder and encoder.single_vector is not None and encoder.mlp.activation in ACTIVATE:
            self._vector, self._chain = encoder.single_vector, Chain([*encoder.mlp.linears, head], encoder.mlp.activation)

    @property
    def by_hand(self) -> bool:
        """Whether gradients are written out, and a longer pass costs hardly more than a short one."""
        return self._chain is not None and not self._head.weight.is_cuda

    def forward(self, prepared: Mapping[str, Tensor]) -> Tensor:
        """[M, O], with torch's graph where the caller's context has one."""
        if self._chain is not None and self._vector is not None and not torch.is_grad_enabled():
            return self._chain.forward(prepared[self._vector])[-1]
        output: Tensor = self._head(self._encoder(prepared))
        return output

    def trace(self, prepared: Mapping[str, Tensor]) -> tuple[Tensor, Callable[[Tensor, Found], None]]:
        """[M, O] without gradient, and what turns the derivative by its first rows [m <= M, O] into the parameters' gradients, once. To be
        called without gradient."""
        if self._chain is not None and self._vector is not None and self.by_hand:
            chain = self._chain
            outputs = chain.forward(prepared[self._vector])

            def by_hand(gradient: Tensor, found: Found) -> None:
                num = gradient.shape[0]
                rows = outputs if num == outputs[0].shape[0] else [output[:num] for output in outputs]
                chain.backward(gradient, rows, found)

            return outputs[-1], by_hand
        with torch.enable_grad():
            output = self.forward(prepared)

        def by_graph(gradient: Tensor, found: Found) -> None:
            with torch.enable_grad():
                rows = output[: len(gradient)]
            gradients = torch.autograd.grad(rows, self._parameters, gradient, allow_unused=True, materialize_grads=True)
            found.update(zip(self._parameters, gradients, strict=True))

        return output.detach(), by_graph


class TwinChain(nn.Module):
    """Two MLPs of one shape side by side, [M, I] -> [K, M, O]. Parameters: weight [K, I, O] and bias [K, 1, O] of each layer."""

    def __init__(self, size: int, hidden_sizes: Sequence[int], num_outputs: int, activation: str, orthogonal_init: bool) -> None:
        super().__init__()
        sizes = [size, *hidden_sizes, num_outputs]
        weights, biases = [], []
        for place, (inputs, outputs) in enumerate(pairwise(sizes)):
            twins = [nn.Linear(inputs, outputs) for _ in range(2)]
            for twin in twins:
                orthogonal(twin, math.sqrt(2.0) if place < len(sizes) - 2 else 1.0, orthogonal_init)
            weights.append(nn.Parameter(torch.stack([twin.weight.detach().t() for twin in twins]).contiguous()))
            biases.append(nn.Parameter(torch.stack([twin.bias.detach().unsqueeze(0) for twin in twins])))
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)
        self._pairs = list(zip(weights, biases, strict=True))  # ParameterList is slow to walk
        self._activate, self._backward = ACTIVATE[activation], BACKWARD[activation]

    def layers(self, value_MI: Tensor) -> list[Tensor]:
        """The input (for both) and every layer's output, without gradient."""
        outputs, last = [value_MI.expand(2, -1, -1)], len(self._pairs) - 1
        for place, (weight, bias) in enumerate(self._pairs):
            value = torch.baddbmm(bias, outputs[-1], weight)
            outputs.append(value if place == last else self._activate(value))
        return outputs

    def backward(
        self, gradient_KMO: Tensor, outputs: Sequence[Tensor], found: Found | None = None, *, to_input: bool = False
    ) -> Tensor | None:
        """The parameters' gradients into `found` (None: they are not wanted). Returns the derivative by the input, [M, I], where it is."""
        gradient = gradient_KMO
        for place in reversed(range(len(self._pairs))):
            weight, bias = self._pairs[place]
            if found is not None:
                found[weight], found[bias] = torch.bmm(outputs[place].transpose(1, 2), gradient), gradient.sum(1, keepdim=True)
            if place:
                gradient = self._backward(torch.bmm(gradient, weight.transpose(1, 2)), outputs[place])
            elif to_input:
                return torch.bmm(gradient, weight.transpose(1, 2)).sum(0)
        return None
