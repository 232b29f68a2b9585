"""Stable-Baselines3 DQN or SAC, the protocol of benchmarks/peers.py: env steps per second, counted from when learning has started.

usage: sb3_off_policy.py dqn|sac ENV SECONDS NUM_ENVS
"""

from __future__ import annotations

import sys
import time
from fractions import Fraction
from typing import Any

import torch
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv

UPDATES_PER_STEP = {"dqn": Fraction(1, 4), "sac": Fraction(1)}
SHARED: dict[str, Any] = {"buffer_size": 100_000, "learning_starts": 1_000, "gamma": 0.99, "device": "cpu"}
SETTINGS: dict[str, dict[str, Any]] = {
    "dqn": SHARED | {
        "learning_rate": 1e-3, "batch_size": 128, "tau": 1.0, "target_update_interval": 10_000, "max_grad_norm": 10,
        "exploration_initial_eps": 0.05, "exploration_final_eps": 0.05, "policy_kwargs": {"net_arch": [64, 64]},
    },
    "sac": SHARED | {
        "learning_rate": 3e-4, "batch_size": 256, "tau": 0.005, "target_update_interval": 1, "ent_coef": "auto",
        "policy_kwargs": {"net_arch": [256, 256]},
    },
}  # fmt: skip


def rhythm(algorithm: str, num_envs: int) -> dict[str, int]:
    """After how many steps of all environments so many updates are made."""
    each = UPDATES_PER_STEP[algorithm] * num_envs
    return {"train_freq": each.denominator, "gradient_steps": each.numerator}


class Clock(BaseCallback):
    """Begins once the first optimizer steps were made, and ends the training so many seconds later."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._begun = 0.0
        self._first_step = 0
        self.steps_per_second = 0.0

    def _on_step(self) -> bool:
        if not self._begun:
            if self.model._n_updates > 0:
                self._begun, self._first_step = time.perf_counter(), self.num_timesteps
            return True
        elapsed = time.perf_counter() - self._begun
        self.steps_per_second = (self.num_timesteps - self._first_step) / elapsed
        return elapsed < self._seconds


def main(algorithm: str, environment: str, seconds: float, num_envs: int) -> None:
    torch.set_num_threads(1)
    environments = make_vec_env(environment, num_envs, vec_env_cls=DummyVecEnv)
    model = {"dqn": DQN, "sac": SAC}[algorithm]("MlpPolicy", environments, **SETTINGS[algorithm], **rhythm(algorithm, num_envs))
    clock = Clock(seconds)
    model.learn(10**9, callback=clock)
    print(f"sb3_{algorithm} {environment} updates={model._n_updates} sps={clock.steps_per_second:.0f}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
