"""Behaviours: who chooses the actions. A copy of the policy in this process, or one in a process that serves all actors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from shoal.networks.acting import Acting
from shoal.networks.fast import Fast
from shoal.networks.heads import NoiseSpec
from shoal.networks.policy import named_tensors
from shoal.streams import Purpose, stream
from shoal.types import Acted, Array, Arrays
from shoal.weights.board import WeightLayout


class WeightSource(Protocol):
    """The reading side of a weight board."""

    def read(self, out: Array) -> int:
        """Copy the newest version into `out` (float32 [size]) and return it."""


class VersionSource(Protocol):
    """What says which version is the newest."""

    @property
    def version(self) -> int: ...


class Inference(Protocol):
    """A policy elsewhere."""

    def ask(self, observation: Arrays, state: Arrays, noise_B: Array) -> tuple[Array, Arrays, Arrays, int]:
        """Actions as stored [B, ...], outputs by field name [B, ...], the recurrent state after them, and the version that chose; arrays are valid
        until the next call."""


def never(group: int, sequence: int) -> float:
    """No action is one at random."""
    return 0.0


class RolloutNoise:
    """Exploration noise, drawn at a rollout's beginning from a stream of its own, so what is sampled depends on
    (run seed, group, sequence, row) and the weights, and on nothing else.

    Args:
      epsilon: share of random actions in a group's n-th rollout, for policies that explore so.
    """

    def __init__(
        self,
        spec: NoiseSpec,
        run_seed: int,
        num_rows: int,
        num_envs: int,
        epoch: int = 0,
        epsilon: Callable[[int, int], float] = never,
    ) -> None:
        self._spec, self._seed, self._epoch, self._epsilon = spec, run_seed, epoch, epsilon
        self._per_step = spec.per == "step"
        self._lead = (num_rows if self._per_step else 1, num_envs)
        self._noise: Array = np.empty(0, np.float32)

    def begin(self, group: int, sequence: int) -> None:
        generator = stream(self._seed, Purpose.ACTION, group, index=sequence, epoch=self._epoch)
        self._noise = self._spec.draw(self._lead, generator, self._epsilon(group, sequence))

    def of(self, row: int | Array) -> Array:
        """[B, size] for one row, or for a row per environment ([B])."""
        if not self._per_step:
            row = 0
        chosen: Array = self._noise[row] if isinstance(row, int) else self._noise[row, np.arange(len(row))]
        return chosen


class PolicyCopy:
    """A policy on a device, whose tensors are views of one flat array, so that new weights are one copy.

    version: of its weights; -1 before the first `refresh`.
    """

    def __init__(self, policy: Acting, source: WeightSource, device: torch.device) -> None:
        self.policy = policy.to(device)
        self.version = -1
        self._source, self._device = source, device
        layout = WeightLayout.of((name, tuple(t.shape)) for name, t in named_tensors(policy).items())
        self._host = np.zeros(layout.size, np.float32)
        self._flat = torch.from_numpy(self._host).to(device)  # on the processor the same memory
        bind(policy, layout, self._flat)

    def refresh(self) -> int:
        """Take the newest weights; returns their version."""
        self.version = self._source.read(self._host)
        if self._device.type != "cpu":
            self._flat.copy_(torch.from_numpy(self._host))
        return self.version

    def act(self, observation: Arrays, state: Arrays, noise: Array) -> tuple[Array, Arrays, Arrays]:
        """Actions as stored [N, ...], outputs by field name [N, ...] and the recurrent state after them, for `observation[name]` [N, ...] (mask
        included), `state[name]` [N, ...] (empty without memory) and noise [N, size]."""
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(array).to(self._device) for name, array in observation.items()}
            mask, chance = inputs.pop("action_mask", None), torch.from_numpy(noise).to(self._device)
            before = {name: torch.from_numpy(array).to(self._device) for name, array in state.items()}
            action, log_prob, after = self.policy.step(inputs, before, chance, mask)
        outputs = {} if log_prob is None else {"log_prob": log_prob.cpu().numpy()}
        return action.cpu().numpy(), outputs, {name: value.cpu().numpy() for name, value in after.items()}


class LocalPolicy:
    """A policy in this process. `fast` acts in its place, where it can (see networks/fast.py)."""

    def __init__(self, copy: PolicyCopy, noise: RolloutNoise, fast: Fast | None = None) -> None:
        self._copy, self._noise, self._fast = copy, noise, fast

    @property
    def version(self) -> int:
        return self._copy.version

    def refresh(self) -> int:
        """Take the newest weights; returns their version."""
        return self._copy.refresh()

    def begin(self, group: int, sequence: int) -> None:
        self._noise.begin(group, sequence)

    def act(self, observation: Arrays, state: Arrays, row: int | Array) -> Acted:
        noise = self._noise.of(row)
        if self._fast is not None:
            action_B, log_prob_B, state = self._fast.step(observation, state, noise, observation.get("action_mask"))
            return Acted(action_B, {} if log_prob_B is None else {"log_prob": log_prob_B}, state, self._copy.version)
        action_B, outputs, state = self._copy.act(observation, state, noise)
        return Acted(action_B, outputs, state, self._copy.version)


class RemotePolicy:
    """A policy in another process, asked once a row. What it samples depends on the same things as a local one's, since the noise is drawn here.

    version: the newest that is known here. With `exact`, an answer of another version is an error.
    """

    def __init__(self, server: Inference, versions: VersionSource, noise: RolloutNoise, *, exact: bool) -> None:
        self._server, self._versions, self._noise, self._exact = server, versions, noise, exact
        self.version = -1

    def refresh(self) -> int:
        """Look which version is the newest; it is the server that takes its weights."""
        self.version = max(self.version, self._versions.version)
        return self.version

    def begin(self, group: int, sequence: int) -> None:
        self._noise.begin(group, sequence)

    def act(self, observation: Arrays, state: Arrays, row: int | Array) -> Acted:
        action_B, outputs, state, version = self._server.ask(observation, state, self._noise.of(row))
        if self._exact and version != self.version:
            raise RuntimeError(f"the inference server answered with version {version}, this rollout is made with {self.version}")
        self.version = max(self.version, version)
        return Acted(action_B, outputs, state, version)


def bind(policy: torch.nn.Module, layout: WeightLayout, flat: torch.Tensor) -> None:
    """Make the policy's parameters and buffers views of `flat` (float32 [size]), without gradient."""
    tensors, at = named_tensors(policy), 0
    with torch.no_grad():
        for name, shape in layout.entries:
            size = math.prod(shape)
            tensors[name].requires_grad_(False)
            tensors[name].data = flat[at : at + size].view(shape)
            at += size
