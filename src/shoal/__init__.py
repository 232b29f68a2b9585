"""shoal: distributed reinforcement learning in which every sample is accounted for.

    import shoal

    run = shoal.train("CartPole-v1", algorithm="ppo", stop={"return": 475})
    policy = run.policy()
    action, state = policy.predict(observation, deterministic=True)

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.api import Run, check, evaluate, load, replay, resume, train
    from shoal.config import RunConfig as Config
    from shoal.errors import ShoalError

__version__ = "0.1.0"
__all__ = ["Config", "Run", "ShoalError", "check", "evaluate", "load", "replay", "resume", "train"]

_WHERE = {"Config": ("config", "RunConfig"), "ShoalError": ("errors", "ShoalError")}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    module, attribute = _WHERE.get(name, ("api", name))
    value = getattr(importlib.import_module(f"shoal.{module}"), attribute)
    globals()[name] = value
    return value
