"""Behaviours: who chooses the actions. Today a local copy of the policy, fed from the weight board."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from shoal.networks.fast import fast_actor
from shoal.networks.policy import Policy, named_tensors
from shoal.streams import Purpose, stream
from shoal.types import Acted, Array, Arrays
from shoal.weights.board import WeightLayout


class WeightSource(Protocol):
    """The reading side of a weight board."""

    def read(self, out: Array) -> int:
        """Copy the newest version into `out` (float32 [size]) and return it."""


class LocalPolicy:
    """A policy in this process, whose tensors are views of one flat array, so that new weights are one copy.

    Exploration noise of a rollout is drawn at its beginning from a stream of its own, so what is sampled depends on
    (run seed, group, sequence, row) and the weights, and on nothing else.
    """

    def __init__(self, policy: Policy, source: WeightSource, run_seed: int, num_rows: int, num_envs: int, epoch: int = 0) -> None:
        self._policy = policy
        self._source = source
        self._seed, self._epoch = run_seed, epoch
        self._per_step = policy.noise.per == "step"
        self._shape = (num_rows if self._per_step else 1, num_envs)
        layout = WeightLayout.of((name, tuple(t.shape)) for name, t in named_tensors(policy).items())
        self._flat = np.zeros(layout.size, np.float32)
        bind(policy, layout, self._flat)
        self._noise: Array = np.empty(0, np.float32)
        # By policy and group size only, never by placement: the two agree to rounding, not to the bit.
        self._fast = fast_actor(policy, num_envs)
        self.version = -1

    def refresh(self) -> int:
        """Take the newest weights; returns their version."""
        self.version = self._source.read(self._flat)
        return self.version

    def begin(self, group: int, sequence: int) -> None:
        generator = stream(self._seed, Purpose.ACTION, group, index=sequence, epoch=self._epoch)
        shape = (*self._shape, self._policy.noise.size)
        if self._policy.noise.kind == "uniform":
            noise = generator.random(shape, np.float32)
        else:
            noise = generator.standard_normal(shape, np.float32)
        self._noise = noise

    def act(self, observation: Arrays, state: Arrays, row: int | Array) -> Acted:
        noise = self._noise_of(row)
        if self._fast is not None:
            mask_B = observation.get("action_mask")
            action_B, log_prob_B = self._fast.act(observation, noise, mask_B)
            return Acted(action_B, {"log_prob": log_prob_B}, state, self.version)
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(array) for name, array in observation.items()}
            mask = inputs.pop("action_mask", None)
            action, log_prob = self._policy.act(inputs, torch.from_numpy(noise), mask)
        return Acted(action.numpy(), {"log_prob": log_prob.numpy()}, state, self.version)

    def _noise_of(self, row: int | Array) -> Array:
        if not self._per_step:
            row = 0
        chosen: Array = self._noise[row] if isinstance(row, int) else self._noise[row, np.arange(len(row))]
        return chosen


def bind(policy: torch.nn.Module, layout: WeightLayout, flat: Array) -> None:
    """Make the policy's parameters and buffers views of `flat`, without gradient."""
    views = layout.views(flat)
    with torch.no_grad():
        for name, tensor in named_tensors(policy).items():
            tensor.requires_grad_(False)
            tensor.data = torch.from_numpy(views[name])
