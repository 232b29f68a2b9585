"""An environment with simulators of its own, as processes that nothing in it ends, and an algorithm whose updates never seem to end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import gymnasium

from shoal.algorithms.base import Algorithm


class Simulated(gymnasium.Wrapper):  # type: ignore[type-arg]
    """Two processes more, one of them in a session of its own; `close` only leaves a note."""

    def __init__(self, env, seconds, note, simulators):
        super().__init__(env)
        self._seconds, self._note = seconds, note
        for preparation in ("", "os.setsid(); ") if simulators else ():
            subprocess.Popen([sys.executable, "-c", f"import os, time; {preparation}time.sleep(600)"])

    def step(self, action):
        time.sleep(self._seconds)
        return self.env.step(action)

    def close(self):
        if self._note:
            Path(self._note).touch()
        super().close()


def make(seconds=0.0, note="", simulators=True):
    return Simulated(gymnasium.make("CartPole-v1"), seconds, note, simulators)


UNDER_WAY = "SHOAL_TEST_UNDER_WAY"  # environment variable: a file that is made when an update begins


class Slow(Algorithm):  # type: ignore[type-arg]
    def update(self, batch, context):
        if UNDER_WAY in os.environ:
            Path(os.environ[UNDER_WAY]).touch()
        time.sleep(600)
        return {}
