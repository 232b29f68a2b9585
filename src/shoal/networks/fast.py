"""A small policy's acting in numpy: at 8 environments and 2 x 64 units, a torch operation costs more for its call than for its numbers.

The same mathematics on the same memory as the policy (float32; equal to its `step` up to rounding). Only what is common and small: one vector as
observation, an MLP with tanh or relu, a memory behind it or none; one discrete or an independent Gaussian action, action values, and the actors
of SAC and TD3. Everything else acts in torch.

Legend: N environments, A actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from shoal.networks.acting import Acting
from shoal.networks.by_hand import SINGLE_THREAD_PRODUCT
from shoal.networks.encoders import Encoder
from shoal.networks.inputs import CLIP, VectorInput
from shoal.networks.memory import Memory
from shoal.networks.off_policy import LOG_STD_MAX, LOG_STD_MIN, DeterministicPolicy, GaussianPolicy, QPolicy
from shoal.networks.policy import Policy
from shoal.networks.recurrent import RecurrentPolicy
from shoal.networks.recurrent_q import RecurrentQPolicy
from shoal.ops.distributions import HALF_LOG_2PI, MASKED_LOGIT

Array = npt.NDArray[Any]

_ACTIVATIONS: dict[str, Callable[..., Array]] = {"tanh": np.tanh, "relu": lambda value, out: np.maximum(value, 0.0, out=out)}


class FastMemory:
    """A memory's step in numpy; the state that it returns is in arrays of its own."""

    def __init__(self, memory: Memory, num_envs: int) -> None:
        self._memory = memory
        self._lstm, self._size = memory.kind == "lstm", memory.num_features
        self._from_input, self._from_state = np.empty((2, num_envs, len(memory.bias)), np.float32)
        self.refresh()

    def refresh(self) -> None:
        memory = self._memory
        self._input_weight, self._state_weight = memory.input_weight.detach().numpy().T, memory.state_weight.detach().numpy().T
        self._bias = memory.bias.detach().numpy()

    def step(self, value: Array, state: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """As `Memory.step`: [N, D] -> [N, H]."""
        h, x, u, H = state["policy_state/h"], self._from_input, self._from_state, self._size
        np.add(np.dot(value, self._input_weight, out=x), self._bias, out=x)
        np.dot(h, self._state_weight, out=u)
        if not self._lstm:
            gates = _sigmoid(x[:, : 2 * H] + u[:, : 2 * H])
            new = np.tanh(x[:, 2 * H :] + gates[:, :H] * u[:, 2 * H :])
            h = new + gates[:, H:] * (h - new)
            return h, {"policy_state/h": h}
        np.add(x, u, out=x)
        gates = _sigmoid(x[:, : 3 * H])
        c = gates[:, 2 * H :] * state["policy_state/c"] + gates[:, H : 2 * H] * np.tanh(x[:, 3 * H :])
        h = gates[:, :H] * np.tanh(c)
        return h, {"policy_state/h": h, "policy_state/c": c}


def _sigmoid(value: Array) -> Array:
    """By tanh, which overflows nowhere."""
    half: Array = np.tanh(value * np.float32(0.5))
    half += np.float32(1.0)
    half *= np.float32(0.5)
    return half


class FastLayers:
    """One vector through an MLP, a memory (or none) and a head, [N, ...] -> [N, outputs]; the output is overwritten by the next call."""

    def __init__(self, policy: Acting, encoder: Encoder, memory: Memory | None, head: nn.Linear, num_envs: int) -> None:
        leaf = policy.inputs.leaves[0]
        assert isinstance(leaf, VectorInput)
        self._name, self._leaf, self._num_envs = policy.inputs.names[0], leaf, num_envs
        self._activation = _ACTIVATIONS[encoder.mlp.activation]
        self._memory = None if memory is None else FastMemory(memory, num_envs)
        self._linears = [*encoder.mlp.linears, head]
        self._buffers = [np.empty((num_envs, layer.out_features), np.float32) for layer in self._linears]
        self.refresh()

    def refresh(self) -> None:
        self._layers = [
            (layer.weight.detach().numpy().T, layer.bias.detach().numpy(), buffer)
            for layer, buffer in zip(self._linears, self._buffers, strict=True)
        ]
        if self._memory is not None:
            self._memory.refresh()
        if self._leaf.normalise:
            self._mean, self._inverse_std = self._leaf.mean.numpy(), self._leaf.inverse_std.numpy()

    def step(self, observation: dict[str, Array], state: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """The head's output, and the recurrent state after it."""
        value = observation[self._name].reshape(self._num_envs, -1)
        if self._leaf.scale is not None:
            value = value * np.float32(self._leaf.scale)
        if value.dtype != np.float32:
            value = value.astype(np.float32)
        if self._leaf.normalise:
            value = np.clip((value - self._mean) * self._inverse_std, -CLIP, CLIP)
        activation = self._activation
        for weight, bias, buffer in self._layers[:-1]:
            np.dot(value, weight, out=buffer)
            np.add(buffer, bias, out=buffer)
            value = activation(buffer, out=buffer)
        if self._memory is not None:
            value, state = self._memory.step(value, state)
        weight, bias, output = self._layers[-1]
        np.dot(value, weight, out=output)
        np.add(output, bias, out=output)
        return output, state


class Fast:
    """Acts for N environments in a policy's place; see `fast_actor`. Not for use in two threads at once: layers write into buffers of its own."""

    def __init__(self, layers: FastLayers) -> None:
        self._layers = layers

    def refresh(self) -> None:
        """Look again where the policy's tensors lie: whatever may have replaced them (and not only written into them) must be followed by this."""
        self._layers.refresh()

    def step(
        self, observation: dict[str, Array], state: dict[str, Array], noise: Array, action_mask: Array | None = None
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        """As the policy's `step`, from and to numpy, in arrays of their own."""
        output, state = self._layers.step(observation, state)
        return *self._answer(output, noise, action_mask), state

    def _answer(self, output: Array, noise: Array, action_mask: Array | None) -> tuple[Array, Array | None]:
        """Actions as stored, and their log-probabilities where the policy has them."""
        raise NotImplementedError(f"{type(self).__name__}._answer")


class FastActor(Fast):
    """In place of a `Policy` or a `RecurrentPolicy`."""

    def __init__(self, policy: Policy, layers: FastLayers, num_envs: int) -> None:
        super().__init__(layers)
        self._policy = policy
        self._rows = np.arange(num_envs)
        self._shape = (num_envs, *policy.action_head.field.shape)
        self._discrete = policy.action_head.field.dtype == "int64"
        self.refresh()

    def refresh(self) -> None:
        super().refresh()
        if not self._discrete:
            self._log_std = self._policy.action_head.log_std.detach().numpy()

    def _answer(self, output: Array, noise: Array, action_mask: Array | None) -> tuple[Array, Array]:
        return self._choose(output, noise, action_mask) if self._discrete else self._add_noise(output, noise)

    def _choose(self, logits: Array, noise: Array, action_mask: Array | None) -> tuple[Array, Array]:
        if action_mask is not None:
            logits[~action_mask] = MASKED_LOGIT
        logits -= np.maximum.reduce(logits, axis=1, keepdims=True)
        cumulative = np.add.accumulate(np.exp(logits), axis=1)
        total = cumulative[:, -1:]
        action = np.add.reduce(cumulative <= noise * total, axis=1)
        return action, logits[self._rows, action] - np.log(total[:, 0])

    def _add_noise(self, mean: Array, noise: Array) -> tuple[Array, Array]:
        action = mean + noise * np.exp(self._log_std)
        log_prob = -0.5 * np.add.reduce(noise * noise, axis=1) - (np.add.reduce(self._log_std) + np.float32(mean.shape[1] * HALF_LOG_2PI))
        return action.reshape(self._shape), log_prob


class FastQ(Fast):
    """In place of a `QPolicy` or `RecurrentQPolicy` without distribution. The best advantage is the best value: V and mean A are the same for all actions."""

    def __init__(self, policy: QPolicy, layers: FastLayers) -> None:
        super().__init__(layers)
        self._first, self._num_actions = int(policy.duelling), policy.num_actions

    def _answer(self, output: Array, noise: Array, action_mask: Array | None) -> tuple[Array, None]:
        value = output[:, self._first :]
        if action_mask is not None:
            value[~action_mask] = -np.inf
        action = value.argmax(1)
        for row in np.flatnonzero(noise[:, 0] < 0):
            count = self._num_actions if action_mask is None else int(action_mask[row].sum())
            place = min(int(noise[row, 1] * np.float32(count)), count - 1)
            action[row] = place if action_mask is None else np.flatnonzero(action_mask[row])[place]
        return action, None


class FastContinuous(Fast):
    """In place of a `GaussianPolicy` or a `DeterministicPolicy`."""

    def __init__(self, policy: GaussianPolicy | DeterministicPolicy, layers: FastLayers) -> None:
        super().__init__(layers)
        self._policy, self._gaussian, self._size = policy, isinstance(policy, GaussianPolicy), policy.size
        self._shape = policy.fields()[0].shape

    def _answer(self, output: Array, noise: Array, action_mask: Array | None) -> tuple[Array, None]:
        if self._gaussian:
            std = np.exp(np.clip(output[:, self._size :], LOG_STD_MIN, LOG_STD_MAX))
            action = np.tanh(output[:, : self._size] + noise[:, 1:] * std)
        else:
            deviation = np.float32(getattr(self._policy, "exploration_noise", 0.0))
            action = np.clip(np.tanh(output) + deviation * noise[:, 1:], -1.0, 1.0)
        for row in np.flatnonzero(noise[:, 0] < 0):
            action[row] = [math.erf(number * math.sqrt(0.5)) for number in noise[row, 1:].tolist()]
        return action.reshape(-1, *self._shape), None


def fast_actor(policy: Acting, num_envs: int) -> Fast | None:
    """A fast actor for groups of `num_envs`, or None where the policy is none of those that are known, is not on the CPU, or is too large to gain."""
    memory = policy.memory if isinstance(policy, (RecurrentPolicy, RecurrentQPolicy)) else None
    if type(policy) in (Policy, RecurrentPolicy):
        assert isinstance(policy, Policy)
        known, encoder, head = policy.action_head.kind in ("discrete", "box"), policy.actor, policy.action_head.linear
    elif type(policy) in (QPolicy, RecurrentQPolicy, GaussianPolicy, DeterministicPolicy):
        assert isinstance(policy, (QPolicy, GaussianPolicy, DeterministicPolicy))
        known, head = getattr(policy, "distribution", "none") == "none", policy.head
        encoder = policy.encoder.encoder if isinstance(policy, RecurrentQPolicy) else policy.encoder
    else:
        return None
    leaves = policy.inputs.leaves
    if not known or type(encoder) is not Encoder or encoder.mlp.activation not in _ACTIVATIONS:
        return None
    weights = [layer.weight for layer in (*encoder.mlp.linears, head)]
    if memory is not None:
        weights += [memory.input_weight, memory.state_weight]
    if len(leaves) != 1 or not isinstance(leaves[0], VectorInput) or _too_large(weights, num_envs):
        return None
    layers = FastLayers(policy, encoder, memory, head, num_envs)
    if isinstance(policy, Policy):
        return FastActor(policy, layers, num_envs)
    return FastQ(policy, layers) if isinstance(policy, QPolicy) else FastContinuous(policy, layers)


def _too_large(weights: Sequence[Tensor], num_envs: int) -> bool:
    return any(num_envs * weight.numel() > SINGLE_THREAD_PRODUCT or weight.is_cuda for weight in weights)
