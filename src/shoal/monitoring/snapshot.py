"""One look at a running run: what the coordinator hands to the live view, to the metrics and to whoever asks on the control socket."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from shoal.config import StopConfig

ROLES = ("environment", "inference", "waiting", "learning")
STEADY_SECONDS = 2.0  # that a speed is to be seen for before it is believed

ActorState = Literal["starting", "running", "stalled", "dead", "stopped"]


@dataclass(frozen=True)
class ActorHealth:
    """One actor: `heartbeat_seconds` since it last gave a sign of life, `incarnation` counts its restarts."""

    actor: int
    state: ActorState
    incarnation: int = 0
    groups: tuple[int, ...] = ()
    heartbeat_seconds: float = 0.0


@dataclass(frozen=True)
class RoleTime:
    """What a role has done since the run began: seconds of wall time by activity (names of `types.Activity`), over all its incarnations."""

    role: str
    pid: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Snapshot:
    """Where a run stands. Everything has a value for nothing yet: NaN where a mean of none would be needed.

    Attributes:
      env_steps: valid environment steps trained; `env_steps_per_second` is over the last seconds, not the whole run.
      mean_return, std_return, mean_length: of the last 100 training episodes that ended; `episodes` counts all.
      time_by_role: seconds of ROLES since the last snapshot, over all processes; the view shows shares.
      roles: each role's time so far, learners first (`actors: 0`: all roles in one).
      lag_*: policy lag in updates, per trained step, of the last updates; `max_policy_lag` is its bound.
      produced, trained, replayed, in_flight, dropped (by reason): the ledger in env steps; `produced` is the sum of the others. evicted: of those
        replayed.
      replay: of a run that learns from a replay, see `Coordinator.replay_facts`; empty for the others.
      network: of a run on a cluster, see engines/traffic.py; empty for the others.
      autoscale: the bounds between which the number of actors follows the load, MIN:MAX; empty where it does not. scaled: why it last changed.
      train: the algorithm's metrics of the last update, names without prefix (`approx_kl`).
      eta_seconds: until the nearest stop condition whose distance is known, see `eta_seconds`; None where none is.
    """

    run: str
    env: str
    algorithm: str
    mode: str
    seed: int = 0
    preset: str = "none"
    phase: str = "starting"
    update: int = 0
    env_steps: int = 0
    seconds: float = 0.0
    env_steps_per_second: float = 0.0
    episodes: int = 0
    mean_return: float = math.nan
    std_return: float = math.nan
    mean_length: float = math.nan
    time_by_role: Mapping[str, float] = field(default_factory=dict)
    roles: tuple[RoleTime, ...] = ()
    lag_mean: float = 0.0
    lag_p99: float = 0.0
    lag_max: int = 0
    max_policy_lag: int = 0
    produced: int = 0
    trained: int = 0
    replayed: int = 0
    evicted: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    in_flight: int = 0
    replay: Mapping[str, float] = field(default_factory=dict)
    actors: tuple[ActorHealth, ...] = ()
    autoscale: str = ""
    scaled: str = ""
    restarts: int = 0
    network: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, float] = field(default_factory=dict)
    eta_seconds: float | None = None
    stop_return: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become None, which JSON can hold."""
        return {key: _plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Snapshot:
        """The inverse of `to_json`; names that this version does not know are left out."""
        known = {key: value for key, value in facts.items() if key in cls.__dataclass_fields__}
        for name in ("mean_return", "std_return", "mean_length"):
            known[name] = math.nan if known.get(name) is None else known[name]
        actors = tuple(ActorHealth(**{**actor, "groups": tuple(actor["groups"])}) for actor in known.get("actors", ()))
        roles = tuple(RoleTime(**role) for role in known.get("roles", ()))
        return cls(**{**known, "actors": actors, "roles": roles})


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


class Pace(NamedTuple):
    """How far a run was at a moment: updates, env steps, and seconds since its first env step."""

    update: int
    env_steps: int
    seconds: float


def eta_seconds(stop: StopConfig, now: Pace, since: Pace | None) -> float | None:
    """Seconds until the nearest of the stop conditions that can be reckoned. A return cannot, nor can steps or updates before the speed is known.

    since: from when on the run went as it goes on, which gives its speed once STEADY_SECONDS have passed; None where it does not yet.
    """
    ends = [] if stop.seconds is None else [stop.seconds - now.seconds]
    passed = 0.0 if since is None else now.seconds - since.seconds
    if since is not None and passed >= STEADY_SECONDS:
        for wanted, done, made in (
            (stop.env_steps, now.env_steps, now.env_steps - since.env_steps),
            (stop.updates, now.update, now.update - since.update),
        ):
            if wanted is not None and made > 0:
                ends.append((wanted - done) * passed / made)
    return max(0.0, min(ends)) if ends else None


def scalars(snapshot: Snapshot) -> dict[str, float]:
    """Metrics under the tags of Stable-Baselines3, and ours beside them. What is not finite is left out.

    `rollout/`, `time/` and `train/` are SB3's (its `train/entropy_loss` and the like come by that name from the algorithms).
    """
    values: dict[str, float] = {
        "rollout/ep_rew_mean": snapshot.mean_return,
        "rollout/ep_rew_std": snapshot.std_return,
        "rollout/ep_len_mean": snapshot.mean_length,
        "time/fps": snapshot.env_steps_per_second,
        "time/iterations": snapshot.update,
        "time/time_elapsed": snapshot.seconds,
        "time/total_timesteps": snapshot.env_steps,
        "lag/mean": snapshot.lag_mean,
        "lag/p99": snapshot.lag_p99,
        "lag/max": snapshot.lag_max,
        "ledger/produced": snapshot.produced,
        "ledger/trained": snapshot.trained,
        "ledger/in_flight": snapshot.in_flight,
        "faults/restarts": snapshot.restarts,
    }
    if snapshot.replay:
        values |= {"ledger/replayed": snapshot.replayed, "ledger/evicted": snapshot.evicted}
        values |= {f"replay/{name}": value for name, value in snapshot.replay.items()}
    values |= {f"ledger/dropped_{reason}": count for reason, count in snapshot.dropped.items()}
    values |= {f"train/{name}": value for name, value in snapshot.train.items()}
    values |= _network_scalars(snapshot.network)
    total = sum(snapshot.time_by_role.values())
    if total > 0:
        values |= {f"share/{role}": spent / total for role, spent in snapshot.time_by_role.items()}
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _network_scalars(network: Mapping[str, Any]) -> dict[str, float]:
    """All figures of all nodes together, and of each node what an env step takes."""
    values = {f"network/{name}": value for name, value in network.items() if name != "nodes"}
    for node, figures in network.get("nodes", {}).items():
        values |= {f"network/{node}/{name}": figures[name] for name in ("bytes_per_env_step", "messages_per_env_step")}
    return values
