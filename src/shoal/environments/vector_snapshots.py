"""Snapshots of vector environments: those that one offers itself, and those of gymnasium's CartPole."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from shoal.environments.generators import STATE_BYTES, pack_generator, unpack_generator
from shoal.types import Array


def snapshots_of(vector: Any) -> Any:
    """The object that takes and restores snapshots of a vector environment, or None."""
    from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

    inner = vector.unwrapped
    if isinstance(inner, CartPoleVectorEnv):
        return CartPoleSnapshots(inner)
    return inner if hasattr(inner, "restore_snapshots") and hasattr(inner, "snapshots") else None


class CartPoleSnapshots:
    """Snapshots of gymnasium's CartPole in its vector form: each holds one column and the generator that all share."""

    _LAYOUT = struct.Struct(f"<4di?{STATE_BYTES}s")
    snapshot_bytes = _LAYOUT.size

    def __init__(self, vector: Any) -> None:
        self._vector = vector

    def snapshots(self) -> list[bytes]:
        v, generator = self._vector, pack_generator(self._vector.np_random)
        return [self._LAYOUT.pack(*v.state[:, b], v.steps[b], v.prev_done[b], generator) for b in range(v.num_envs)]

    def restore_snapshots(self, given: list[bytes]) -> tuple[Array, dict[str, Any]]:
        v, rows = self._vector, [self._LAYOUT.unpack(one) for one in given]
        v.reset(seed=0)  # sets what is not state
        v.state = np.array([row[:4] for row in rows]).T.copy()
        v.steps = np.array([row[4] for row in rows], np.int32)
        v.prev_done = np.array([row[5] for row in rows], np.bool_)
        v.np_random = unpack_generator(rows[0][6])
        return v.state.T.astype(np.float32), {}
