"""Policies that learn from a replay: action values (DQN), and actors that have their critics beside them (SAC, TD3).

How they explore comes with the noise (see NoiseSpec.explores), so that acting is a function of observation, noise and weights; without noise they
play greedily. Continuous actions are those of a box with bounds, stored in -1..1.

Legend: N batch, A choices or action dimensions, Z atoms of a return's distribution, K = 2 twins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from shoal.config import PolicyConfig
from shoal.errors import ConfigError
from shoal.networks.acting import Acting
from shoal.networks.chain import Found, Trunk, TwinChain
from shoal.networks.encoders import Encoder, orthogonal
from shoal.networks.heads import NoiseSpec
from shoal.networks.inputs import Inputs
from shoal.types import EnvironmentSpec, FieldSpec

MASKED_VALUE = -1e30
LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # Haarnoja et al. 2018
Observation = Mapping[str, Tensor]


class OffPolicy(Acting):
    """What these have in common."""

    def __init__(self, spec: EnvironmentSpec, inputs: Inputs, noise: NoiseSpec) -> None:
        super().__init__()
        self.inputs, self.noise = inputs, noise
        self._action_shape = spec.action.shape

    def fields(self) -> list[FieldSpec]:
        discrete = self.noise.kind == "uniform"
        return [FieldSpec("action", "int64" if discrete else "float32", self._action_shape, "T")]

    def compute(self, *, mixed: bool = False, compile: bool = False) -> None:
        """Raises ConfigError for anything but the default."""
        if mixed or compile:
            key = "learner.precision" if mixed else "learner.compile"
            raise ConfigError(f"{key} is for ppo, appo and impala; leave it at its default for an algorithm that learns from a replay")


def at_random(noise: Tensor, num_choices: int, action_mask: Tensor | None) -> Tensor:
    """One of the allowed choices from uniform noise [N], int64 [N]."""
    if action_mask is None:
        return (noise * num_choices).long().clamp_(max=num_choices - 1)
    count = action_mask.cumsum(1)
    place = torch.minimum((noise * count[:, -1]).long(), count[:, -1] - 1)
    return (count <= place.unsqueeze(1)).sum(1)


class QPolicy(OffPolicy):
    """Action values, and the action of the highest; or one at random, where the noise says so.

    Args:
      duelling: Q = V + A - mean A (Wang et al. 2016, arXiv:1511.06581, eq. 9).
      distribution: what lies behind a value: itself, logits over fixed atoms from value_min to value_max, or quantiles.
      epsilon: see Acting.
    """

    support: Tensor

    def __init__(
        self,
        spec: EnvironmentSpec,
        inputs: Inputs,
        encoder: nn.Module,
        orthogonal_init: bool,
        *,
        duelling: bool = False,
        distribution: Literal["none", "c51", "quantile"] = "none",
        atoms: int = 1,
        value_min: float = 0.0,
        value_max: float = 0.0,
        epsilon: float = 0.0,
    ) -> None:
        super().__init__(spec, inputs, NoiseSpec("uniform", 2, explores=True))
        self.epsilon = float(epsilon)
        self.num_actions = spec.action.nvec[0]
        self.atoms = atoms if distribution != "none" else 1
        self.duelling, self.distribution = duelling, distribution
        self.encoder = encoder
        num_features: int = encoder.num_features  # type: ignore[assignment]
        self.head = nn.Linear(num_features, (self.num_actions + duelling) * self.atoms)
        orthogonal(self.head, 1.0, orthogonal_init)
        self.register_buffer("support", torch.linspace(value_min, value_max, self.atoms), persistent=False)
        self.trunk = Trunk(encoder, self.head)

    def combine(self, output: Tensor) -> Tensor:
        """The head's output [N, ...] as action values [N, A], or [N, A, Z]."""
        if self.atoms > 1:
            output = output.view(len(output), -1, self.atoms)
        if not self.duelling:
            return output
        advantage = output[:, 1:]
        return output[:, :1] + advantage - advantage.mean(1, keepdim=True)

    def split(self, gradient: Tensor) -> Tensor:
        """The way back of `combine`: the derivative by the head's output, from that by the values [N, A] or [N, A, Z]."""
        if self.duelling:
            value = gradient.sum(1, keepdim=True)
            gradient = torch.cat([value, gradient - value / self.num_actions], 1)
        return gradient.reshape(len(gradient), -1)

    def mean(self, combined: Tensor) -> Tensor:
        """Expected action values [N, A] from what `combine` gives."""
        if self.distribution == "none":
            return combined
        return combined.softmax(2) @ self.support if self.distribution == "c51" else combined.mean(2)

    def ranked(self, output: Tensor) -> Tensor:
        """Something [N, A] of the head's output that is largest where the expected value is: without distribution, the advantages will do."""
        if self.distribution == "none":
            return output[:, 1:] if self.duelling else output
        return self.mean(self.combine(output))

    def values(self, observation: Observation) -> Tensor:
        """Expected action values, [N, A]."""
        return self.mean(self.combine(self.trunk.forward(self.inputs.forward(observation))))

    def greedy(self, observation: Observation, action_mask: Tensor | None = None) -> Tensor:
        value_NA = self.ranked(self.trunk.forward(self.inputs.forward(observation)))
        return (value_NA if action_mask is None else value_NA.masked_fill(~action_mask, MASKED_VALUE)).max(1).indices

    def act(self, observation: Observation, noise: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, None]:
        greedy = self.greedy(observation, action_mask)
        return torch.where(noise[:, 0] < 0, at_random(noise[:, 1], self.num_actions, action_mask), greedy), None


class CategoricalPolicy(OffPolicy):
    """A distribution over choices without a value beside it: the actor of discrete SAC."""

    def __init__(self, spec: EnvironmentSpec, inputs: Inputs, encoder: nn.Module, orthogonal_init: bool) -> None:
        super().__init__(spec, inputs, NoiseSpec("uniform", 2, explores=True))
        self.encoder, self.num_actions = encoder, spec.action.nvec[0]
        num_features: int = encoder.num_features  # type: ignore[assignment]
        self.head = nn.Linear(num_features, self.num_actions)
        orthogonal(self.head, 0.01, orthogonal_init)
        self.trunk = Trunk(encoder, self.head)

    def logits(self, observation: Observation, action_mask: Tensor | None) -> Tensor:
        logits = self.trunk.forward(self.inputs.forward(observation))
        return logits if action_mask is None else logits.masked_fill(~action_mask, MASKED_VALUE)

    def greedy(self, observation: Observation, action_mask: Tensor | None = None) -> Tensor:
        return self.logits(observation, action_mask).argmax(1)

    def act(self, observation: Observation, noise: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, None]:
        cumulative = self.logits(observation, action_mask).softmax(1).cumsum(1)
        chosen = (cumulative[:, :-1] <= noise[:, 1:] * cumulative[:, -1:]).sum(1)
        return torch.where(noise[:, 0] < 0, at_random(noise[:, 1], self.num_actions, action_mask), chosen), None


class _Continuous(OffPolicy):
    """Actions in -1..1, one at random where the noise says so."""

    def __init__(self, spec: EnvironmentSpec, inputs: Inputs, encoder: nn.Module, orthogonal_init: bool, outputs: int) -> None:
        super().__init__(spec, inputs, NoiseSpec("normal", 1 + spec.action.size, explores=True))
        self.encoder, self.size = encoder, spec.action.size
        num_features: int = encoder.num_features  # type: ignore[assignment]
        self.head = nn.Linear(num_features, outputs)
        orthogonal(self.head, 0.01, orthogonal_init)
        self.trunk = Trunk(encoder, self.head)

    def output(self, observation: Observation) -> Tensor:
        return self.trunk.forward(self.inputs.forward(observation))

    def played(self, action: Tensor, noise: Tensor) -> Tensor:
        """`action` [N, A], or in its place one at random (erf of a normal number is uniform), as stored."""
        uniform = torch.erf(noise[:, 1:] * math.sqrt(0.5))
        return torch.where(noise[:, :1] < 0, uniform, action).reshape(-1, *self._action_shape)


class GaussianPolicy(_Continuous):
    """tanh of a Gaussian with mean and deviation of each state's own (Haarnoja et al. 2018, arXiv:1812.05905, appendix C)."""

    def __init__(self, spec: EnvironmentSpec, inputs: Inputs, encoder: nn.Module, orthogonal_init: bool) -> None:
        super().__init__(spec, inputs, encoder, orthogonal_init, 2 * spec.action.size)

    def greedy(self, observation: Observation, action_mask: Tensor | None = None) -> Tensor:
        return torch.tanh(self.output(observation)[:, : self.size]).reshape(-1, *self._action_shape)

    def act(self, observation: Observation, noise: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, None]:
        mean, log_std = self.output(observation).chunk(2, 1)
        action = torch.tanh(mean + noise[:, 1:] * log_std.clamp(LOG_STD_MIN, LOG_STD_MAX).exp())
        return self.played(action, noise), None


class DeterministicPolicy(_Continuous):
    """tanh of the head, with independent noise of one deviation when it explores (Fujimoto et al. 2018, arXiv:1802.09477)."""

    def __init__(
        self, spec: EnvironmentSpec, inputs: Inputs, encoder: nn.Module, orthogonal_init: bool, *, exploration_noise: float = 0.0
    ) -> None:
        super().__init__(spec, inputs, encoder, orthogonal_init, spec.action.size)
        self.exploration_noise = exploration_noise

    def greedy(self, observation: Observation, action_mask: Tensor | None = None) -> Tensor:
        return torch.tanh(self.output(observation)).reshape(-1, *self._action_shape)

    def act(self, observation: Observation, noise: Tensor, action_mask: Tensor | None = None) -> tuple[Tensor, None]:
        action = torch.tanh(self.output(observation)) + self.exploration_noise * noise[:, 1:]
        return self.played(action.clamp_(-1.0, 1.0), noise), None


def stochastic_policy(spec: EnvironmentSpec, inputs: Inputs, encoder: nn.Module, orthogonal_init: bool) -> OffPolicy:
    """The actor of SAC, by the kind of the action space."""
    kind = GaussianPolicy if spec.action.kind == "box" else CategoricalPolicy
    return kind(spec, inputs, encoder, orthogonal_init)


class Critics(nn.Module):
    """Two action values. Continuous actions are an input, [K, M, 1]; of discrete ones all have a value, [K, M, A].

    Vectors go into both MLPs as they are; images through one encoder that both share (compact: the smaller CNN).
    """

    def __init__(
        self,
        spec: EnvironmentSpec,
        inputs: Inputs,
        hidden_sizes: list[int],
        activation: str,
        orthogonal_init: bool,
        *,
        compact: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(inputs.shapes, [], activation, orthogonal_init, compact=compact)
        box = spec.action.kind == "box"
        self._num_features = self.encoder.num_features
        outputs = 1 if box else spec.action.nvec[0]
        self.twins = TwinChain(self._num_features + box * spec.action.size, hidden_sizes, outputs, activation, orthogonal_init)
        self._encoded = list(self.encoder.parameters())

    def layers(self, prepared: Mapping[str, Tensor], action_MA: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """(features [M, F] with torch's graph where an encoder is learned, outputs of every layer, the values last). To be called without
        gradient."""
        if self._encoded:
            with torch.enable_grad():
                features = self.encoder(prepared)
        else:
            features = self.encoder.forward(prepared)
        value = features.detach() if action_MA is None else torch.cat([features.detach(), action_MA], 1)
        return features, self.twins.layers(value)

    def backward(self, gradient_KMO: Tensor, features: Tensor, outputs: list[Tensor], found: Found) -> None:
        """All parameters' gradients into `found`."""
        d_input = self.twins.backward(gradient_KMO, outputs, found, to_input=bool(self._encoded))
        if d_input is not None:
            gradients = torch.autograd.grad(features, self._encoded, d_input[:, : self._num_features])
            found.update(zip(self._encoded, gradients, strict=True))

    def action_gradient(self, gradient_KMO: Tensor, outputs: list[Tensor]) -> Tensor:
        """The derivative by the action [M, A], from that by the values."""
        d_input = self.twins.backward(gradient_KMO, outputs, to_input=True)
        assert d_input is not None
        return d_input[:, self._num_features :]


def build_critics(spec: EnvironmentSpec, config: PolicyConfig, policy: OffPolicy, seed: int) -> Critics:
    """Beside that actor, where it computes. The same arguments give the same parameters; torch's global generator is left as it was.
    seed: [0, 2**63)."""
    sizes, compact = list(config.hidden_sizes), config.encoder == "compact_cnn"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critics = Critics(spec, policy.inputs, sizes, config.activation, config.orthogonal_init, compact=compact)
    return critics.to(next(policy.parameters()).device)
