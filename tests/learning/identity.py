"""Identity worlds: the observation names the action that is rewarded. One for every kind of observation and of action.

A target has two components of three values each, drawn anew for each step; every kind of observation shows it and every kind of action can
give it. The optimal return is the number of steps, a policy that looks at nothing gets a third to two thirds of it. Half of the episodes
terminate, half are truncated. Where actions are masked, wrong ones are forbidden at random, and the world raises if one of those is taken.

    python tests/learning/identity.py [PATTERN ...]      one line for each world and algorithm, such as 'nested/discrete*/ppo'
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

import shoal
from shoal.monitoring.live import SilentView

CHOICES, COMPONENTS = 3, 2
LENGTH = 5  # steps of an episode
SIDE = 6  # pixels
PASS = 0.95  # of the optimal return

Array = np.ndarray[Any, Any]


# ---- observations: a space, and how it shows a target [COMPONENTS] in 0..CHOICES ----------------------------------------
def _picture(value: int) -> Array:
    """[1, SIDE, SIDE] uint8 with one bright band of three."""
    picture = np.zeros((1, SIDE, SIDE), np.uint8)
    picture[:, :, value * SIDE // CHOICES : (value + 1) * SIDE // CHOICES] = 255
    return picture


def _image(target: Array, _: np.random.Generator) -> Array:
    half = SIDE // 2
    return np.concatenate([_picture(target[0])[:, :half], _picture(target[1])[:, half:]], 1)


def _nested(target: Array, rng: np.random.Generator) -> Any:
    """The first component stands in the picture only, the second in one number only; the rest is noise."""
    return {
        "eyes": (_picture(target[0]), int(rng.integers(2))),
        "touch": {"where": np.float64(target[1:] - 1.0), "bits": rng.integers(0, 2, 3, np.int8)},
        "mode": rng.integers(0, [2, 3]),
    }


Shown = tuple[Callable[[], spaces.Space[Any]], Callable[[Array, np.random.Generator], Any]]
OBSERVATIONS: dict[str, Shown] = {
    "box": (lambda: spaces.Box(-1, 1, (COMPONENTS,)), lambda target, _: np.float32(target - 1)),
    "box_unbounded": (lambda: spaces.Box(-np.inf, np.inf, (COMPONENTS, 1), np.float64), lambda target, _: (target - 1.0)[:, None]),
    "image": (lambda: spaces.Box(0, 255, (1, SIDE, SIDE), np.uint8), _image),
    "discrete": (lambda: spaces.Discrete(CHOICES**COMPONENTS, start=5), lambda target, _: 5 + int(target @ [CHOICES, 1])),
    "multi_discrete": (lambda: spaces.MultiDiscrete([CHOICES] * COMPONENTS, start=[1, -1]), lambda target, _: target + np.array([1, -1])),
    "multi_binary": (lambda: spaces.MultiBinary(CHOICES * COMPONENTS), lambda target, _: np.eye(CHOICES, dtype=np.int8)[target].ravel()),
    "nested": (
        lambda: spaces.Dict(
            {
                "eyes": spaces.Tuple((spaces.Box(0, 255, (1, SIDE, SIDE), np.uint8), spaces.Discrete(2))),
                "touch": spaces.Dict({"where": spaces.Box(-1, 1, (1,), np.float64), "bits": spaces.MultiBinary(3)}),
                "mode": spaces.MultiDiscrete([2, 3]),
            }
        ),
        _nested,
    ),
}

# ---- actions: a space, and the one that a target names; `masked` worlds have these with masks ------------------------------
LOW, HIGH = np.float32([-2, 0]), np.float32([0, 5])
ACTIONS: dict[str, tuple[Callable[[], spaces.Space[Any]], Callable[[Array], Array]]] = {
    "discrete": (lambda: spaces.Discrete(CHOICES**COMPONENTS, start=2), lambda target: 2 + target @ [CHOICES, 1]),
    "multi_discrete": (lambda: spaces.MultiDiscrete([CHOICES] * COMPONENTS), lambda target: target),
    "multi_binary": (lambda: spaces.MultiBinary(COMPONENTS), lambda target: np.int8(target > 0)),
    "box_bounded": (lambda: spaces.Box(LOW, HIGH), lambda target: LOW + (target + 1) / (CHOICES + 1) * (HIGH - LOW)),
    "box_unbounded": (lambda: spaces.Box(-np.inf, np.inf, (COMPONENTS,)), lambda target: (target - 1) / 2),
}
MASKED = {"discrete_masked": "info", "multi_discrete_masked": "observation", "multi_binary_masked": "info"}
ACTION_KINDS = (*ACTIONS, *MASKED)
ALGORITHMS = ("ppo", "appo", "impala")
ALL = tuple(product(OBSERVATIONS, ACTION_KINDS, ALGORITHMS))


class IdentityWorld(gymnasium.Env[Any, Any]):
    """`observation` and `action`: keys of OBSERVATIONS, and of ACTIONS or MASKED."""

    def __init__(self, observation: str, action: str) -> None:
        self._kind = action.removesuffix("_masked")
        self._mask_in = MASKED.get(action)
        space, self._show = OBSERVATIONS[observation]
        make_action_space, self._name_action = ACTIONS[self._kind]
        self.action_space = make_action_space()
        self.observation_space = space()
        if self._mask_in == "observation":
            mask = spaces.MultiBinary(CHOICES * COMPONENTS)
            self.observation_space = spaces.Dict({"seen": self.observation_space, "action_mask": mask})

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps, self._truncates = 0, bool(self.np_random.integers(2))
        return self._next()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = self._reward(action)
        self._steps += 1
        over = self._steps == LENGTH
        observation, info = self._next()
        return observation, reward, over and not self._truncates, over and self._truncates, info

    def _next(self) -> tuple[Any, dict[str, Any]]:
        self._target = self.np_random.integers(0, CHOICES, COMPONENTS)
        self._wanted = self._name_action(self._target)
        seen = self._show(self._target, self.np_random)
        if self._mask_in is None:
            return seen, {}
        self._mask = self._draw_mask()
        return ({"seen": seen, "action_mask": self._mask}, {}) if self._mask_in == "observation" else (seen, {"action_mask": self._mask})

    def _draw_mask(self) -> Array:
        """int8, 1 where allowed: what is wanted, and about half of the rest (of MultiBinary: of bits that may be 1)."""
        if self._kind == "multi_binary":
            return np.int8(self._wanted | self.np_random.integers(0, 2, COMPONENTS))
        place = [self._wanted - 2] if self._kind == "discrete" else self._target + CHOICES * np.arange(COMPONENTS)
        size = CHOICES**COMPONENTS if self._kind == "discrete" else CHOICES * COMPONENTS
        mask = self.np_random.integers(0, 2, size, np.int8)
        mask[place] = 1
        return mask

    def _reward(self, action: Any) -> float:
        if self._mask_in is not None:
            self._refuse_forbidden(action)
        if self._kind.startswith("box"):
            scale = (HIGH - LOW) / 2 if self._kind == "box_bounded" else 1.0
            return float(1.0 - np.minimum(np.abs(action - self._wanted) / scale, 2.0).mean())
        return float(np.mean(action == self._wanted))

    def _refuse_forbidden(self, action: Any) -> None:
        if self._kind == "multi_binary":
            allowed = not np.any((action == 1) & (self._mask == 0))
        else:
            place = [action - 2] if self._kind == "discrete" else action + CHOICES * np.arange(COMPONENTS)
            allowed = bool(self._mask[place].all())
        if not allowed:
            raise RuntimeError(f"action {action} is forbidden by the mask {self._mask}")


# ---- learning -----------------------------------------------------------------------------------------------------------
def learn(observation: str, action: str, algorithm: str, run_dir: Path, *, seed: int = 0) -> tuple[float, int]:
    """Train in this process. Returns the share of the optimal return that the learned policy gets, and the env steps that it took."""
    continuous, pixels = action.startswith("box"), observation in ("image", "nested")
    if algorithm == "impala":  # nothing bounds its steps, so they are smaller; on Gaussians, fewer per batch too
        own: dict[str, Any] = {"minibatch_size": 256 if continuous else 64, "learning_rate": 5e-4 if pixels and continuous else 1e-3}
        own |= {"learning_rate_schedule": "linear", "entropy_coefficient": 0.003 if continuous else 0.06}
    else:
        own = {"minibatch_size": 128, "epochs": 4, "learning_rate": 1e-3 if pixels else 3e-3}
        own |= {"learning_rate_schedule": "linear" if pixels else "constant"}
        own |= {} if continuous else {"entropy_coefficient": 0.01}  # without it a choice that was good by chance becomes certain
    run = shoal.train(
        lambda: IdentityWorld(observation, action),
        algorithm={"name": algorithm, "gamma": 0.5, **own},
        policy={"log_std_init": -1.5 if algorithm == "impala" else -2.3},
        sampling={"groups": 2, "group_size": 8, "rollout_length": 32},
        stop={"return": (0.945 if continuous else 0.96) * LENGTH, "env_steps": 120_000},
        actors=0,
        seed=seed,
        run_dir=str(run_dir),
        checkpoint={"every_seconds": None},
        progress=SilentView(sys.stderr),
    )
    return run.evaluate(episodes=40)["mean_return"] / LENGTH, run.result["env_steps"]


def main(patterns: list[str]) -> int:
    failed = 0
    print("| observation | action | algorithm | share of the optimal return | env steps | seconds |\n| --- | --- | --- | --- | --- | --- |")
    for case in ALL:
        if any(fnmatch("/".join(case), pattern) for pattern in patterns or ["*"]):
            with tempfile.TemporaryDirectory() as scratch:
                begun = time.monotonic()
                share, env_steps = learn(*case, Path(scratch) / "run")
            failed += share < PASS
            print(f"| {' | '.join(case)} | {share:.3f} | {env_steps:,} | {time.monotonic() - begun:.1f} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
