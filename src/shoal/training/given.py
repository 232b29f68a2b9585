"""What a caller hands over that no file can hold: functions and classes of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shoal.errors import ConfigError


def split_objects(target: str | Callable[..., Any] | None, settings: dict[str, Any]) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """The user's own objects apart from what can be written down. Returns (objects, target, settings)."""
    objects: dict[str, Any] = {}
    settings = dict(settings)
    if callable(target):
        objects["env"] = target
    policy = settings.get("policy")
    network = policy.get("network") if isinstance(policy, Mapping) else settings.get("policy.network")
    if callable(network):
        objects["network"] = network
    algorithm = settings.get("algorithm")
    named = algorithm.get("name") if isinstance(algorithm, Mapping) else algorithm
    if isinstance(named, type):
        objects["algorithm"] = named
    return objects, target, settings


def check_callbacks(callbacks: object) -> None:
    """Raises ConfigError for what is no list of functions."""
    if isinstance(callbacks, Sequence) and all(callable(callback) for callback in callbacks):
        return
    wrong = [callback for callback in callbacks if not callable(callback)] if isinstance(callbacks, Sequence) else [callbacks]
    raise ConfigError(f"callbacks: a list of functions was expected, such as callbacks=[watch], got {wrong[0]!r}")


def pickled(objects: Mapping[str, Any]) -> bytes | None:
    """The objects as other processes get them; None where there are none. Raises ConfigError."""
    if not objects:
        return None
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(objects))
    except Exception as error:
        raise ConfigError(
            f"the environment, network or algorithm that was passed cannot be sent to other processes: {error}; "
            "pass a function that makes it, or an import path"
        ) from error
