"""An environment that prints all the time, as simulators do."""

import sys

import gymnasium


class Chatty(gymnasium.Wrapper):  # type: ignore[type-arg]
    def step(self, action):
        print("step", action, "x" * 200)
        print("c0ffeewarningc0ffee", file=sys.stderr)
        return self.env.step(action)


def make():
    return Chatty(gymnasium.make("CartPole-v1"))
