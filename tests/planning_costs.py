"""An answer of `shoal bench costs` in round numbers, as the planner reads it."""

from __future__ import annotations

from typing import Any

from shoal.config import PolicyConfig

SMALL = {"preset": "none", "sampling.groups": 4, "sampling.group_size": 8, "sampling.rollout_length": 32}
POLICY = PolicyConfig().model_dump(mode="json", exclude={"inference"})
OPTIONS = [text for key, value in SMALL.items() for text in (f"--{key.replace('_', '-')}", str(value))]


def costs(algorithm: str = "ppo", **changes: Any) -> dict[str, Any]:
    """Of CartPole-v1 with SMALL: e 20, i 10, record 8, l 40; what else there is is 0 unless it is changed by `part__name`."""
    answer: dict[str, Any] = {
        "settings": {
            "env": "CartPole-v1", "form": "python", "algorithm": algorithm, "mode": "sync" if algorithm == "ppo" else "async", "preset": "none",
            "groups": 4, "group_size": 8, "rollout_length": 32, "batch_env_steps": 1024, "epochs": 1 if algorithm == "impala" else 4,
            "minibatch_size": None if algorithm == "impala" else 256, "actors": 2, "learner_threads": 1, "policy": POLICY, "device": "cpu", "env_kwargs": {},
        },
        "date": "2026-01-01",
        "machine": {"cpu": "a processor", "cores": 2},
        "cores": 2,
        "costs": {"e": 20.0, "i": 10.0, "l": 40.0, "x": 8.0},
        "mixed": 0.0,
        "crowding": 1.0,
        "transport": {"record": 8.0, "words": 0.0, "decide": 0.0, "consume": 0.0, "weights": 0.0},
        "crossing": {"pack": 0.0, "unpack": 0.0},
        "learning": {"cores": 1.6, "wall_us": {"1": 40.0, "2": 25.0}, "own_device": False},
        "environment": {"wall_us": 20.0, "cpu_us": 20.0, "waits": False, "episode_steps": 100.0, "updates_measured": 9},
        "sizes": {"rollout_bytes": 10_000, "weights_bytes": 40_000},
    }  # fmt: skip
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (answer[part] if part else answer)[key] = value
    return answer
