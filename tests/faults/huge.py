"""CartPole with finite rewards that no loss in float32 survives, and an environment whose actions are texts."""

import gymnasium
import numpy as np


class Huge(gymnasium.Wrapper):  # type: ignore[type-arg]
    """`at`: "once", in one step of one episode in training; "later", from its 200th step on, in every instance and whatever it is reset with."""

    def __init__(self, env, at):
        super().__init__(env)
        self._at, self._steps, self._seed = at, 0, 0

    def reset(self, *, seed=None, options=None):
        self._seed = seed or 0
        self._episode_steps = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        self._episode_steps += 1
        if (self._at == "later" and self._steps > 200) or (self._at == "once" and self._seed % 16 == 3 and self._episode_steps == 5):
            reward = 1e30
        return observation, reward, terminated, truncated, info


class Text(gymnasium.Env):  # type: ignore[type-arg]
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Text(5)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


def make(at="once"):
    return Huge(gymnasium.make("CartPole-v1"), at)


def text():
    return Text()
