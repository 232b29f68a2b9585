"""Two environments that cannot be solved without a memory, and a policy that has one.

shoal train examples/memory.py:hidden_velocities --policy.memory lstm
shoal train examples/memory.py:Recall --policy.memory gru
"""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


def hidden_velocities() -> gymnasium.Env:
    """CartPole-v1 that shows where cart and pole are, and not how fast they move."""
    env = gymnasium.make("CartPole-v1")
    low, high = env.observation_space.low, env.observation_space.high
    return gymnasium.wrappers.TransformObservation(env, lambda seen: seen[[0, 2]], spaces.Box(low[[0, 2]], high[[0, 2]]))


class Recall(gymnasium.Env):
    """A cue is shown at the first step and asked for `delay` steps later; then the episode ends, with reward 1 for the right answer and 0 for another.

    The observation is the cue, one of `cues` lamps, and a lamp that asks. In between nothing is seen, and what is done does not matter.
    """

    def __init__(self, cues: int = 4, delay: int = 50) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (cues + 1,), np.float32)
        self.action_space = spaces.Discrete(cues)
        self._delay = delay

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._step, self._cue = 0, int(self.np_random.integers(self.action_space.n))
        return self._lamps(self._cue), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        asked = self._step == self._delay
        self._step += 1
        shown = self._lamps(-1) if self._step == self._delay else self._lamps()
        return shown, float(asked and action == self._cue), asked, False, {}

    def _lamps(self, *lit: int) -> Any:
        lamps = np.zeros(self.observation_space.shape, np.float32)
        lamps[list(lit)] = 1.0
        return lamps


def main() -> None:
    import shoal

    short = {"stop": {"updates": 5}, "sampling": {"groups": 2, "group_size": 4, "rollout_length": 64}, "actors": 2}
    run = shoal.train(f"{Path(__file__).resolve()}:hidden_velocities", policy={"memory": "lstm", "memory_size": 32}, **short)
    env, policy = hidden_velocities(), run.policy()
    observation, _ = env.reset(seed=0)
    state, over, num_steps = None, False, 0  # None: an episode begins
    while not over:
        action, state = policy.predict(observation, state)
        observation, _, terminated, truncated, _ = env.step(action)
        over, num_steps = terminated or truncated, num_steps + 1
    print("an episode with what was remembered:", num_steps, "steps")


if __name__ == "__main__":
    main()
