"""A Python file for each environment fault, in the run's `faults/`, that makes the environment and plays the episode up to the fault."""

from __future__ import annotations

import json
import os
import pprint
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config import RunConfig
from shoal.errors import EnvironmentFault
from shoal.imports import OPAQUE

_MOST_NUMBERS = 50_000  # of the actions, written into the file itself; more go into a file beside it

_HEAD = '''"""{what}

{where}, in the run {run}
    python {path}
makes that environment again and plays what it was given. What goes wrong is raised; a call that hangs ends after {limit:g} s with its stack.
"""

import json
import os
import sys
from pathlib import Path

from shoal.environments.reproduce import {maker}

HERE = Path(__file__).resolve().parent
os.chdir({cwd!r})  # where the run was started
sys.path.append(os.getcwd())
{factory}
CONFIG = {config}
'''
_EPISODES = """
# For each environment that may have been it, its last episodes: the seed of the reset (or the file of a snapshot), and the actions.
EPISODES = {episodes}

for index, episodes in EPISODES.items():
    print("environment", index, flush=True)
    env = environment(CONFIG{arguments})
    for begin, actions in episodes:
        if isinstance(begin, str):
            env.restore(HERE / begin)
        else:
            env.reset(seed=begin)
        for step, action in enumerate(actions, 1):
            if step > len(actions) - 20:
                print("step", step, "action", action, flush=True)
            env.step(action)
    env.close()
print("no fault this time: it depends on something else than seed and actions")
"""
_VECTOR = """
# The actions of all environments of the group since its rollout began, and how many episodes each had begun before that.
ACTIONS = {actions}
EPISODES = {begun}

env = vector(CONFIG, EPISODES, {snapshots}{arguments})
for step, action in enumerate(ACTIONS):
    if step >= len(ACTIONS) - 20:
        print("row", step, "actions", action, flush=True)
    env.step(action)
env.close()
print("no fault this time: it depends on something else than seed and actions{unknown}")
"""
_UNKNOWN = ", or on what was played before this rollout, which a native form without snapshots cannot be put back to"


@dataclass(frozen=True)
class PlayedVector:
    """What a group in its native form was given.

    Attributes:
      seed: that all were reset with at last. episodes: begun by each environment before. snapshots: of all, at the rollout's start; empty where there are none.
      actions: [rows][B], as a rollout holds them. inside: some stood within an episode that cannot be put back.
    """

    seed: int
    group: int
    run_seed: int
    epoch: int
    episodes: list[int]
    snapshots: list[bytes]
    actions: list[Any]
    inside: bool = False


def with_snippet(
    fault: EnvironmentFault,
    config: RunConfig,
    directory: Path,
    episodes: Mapping[int, Sequence[tuple[int | bytes | None, list[Any]]]],
    mask_in_info: bool = False,
    vector: PlayedVector | None = None,
) -> EnvironmentFault:
    """The fault with one line more, that names the snippet written for it; the fault as it is where the disk refuses.

    Args:
      directory: the run's.
      episodes: by environment of the group, (seed or snapshot, actions as the environment takes them), one after the other.
      vector: what is played instead where `env.form` is native.
    """
    try:
        faults = directory / "faults"
        faults.mkdir(parents=True, exist_ok=True)
        path = faults / f"fault-{1 + sum(1 for _ in faults.glob('fault-*.py'))}.py"
        if config.env.form == "native":
            text = _of_vector(vector or PlayedVector(0, 0, config.seed, 0, [0], [], []), path, config)
        else:
            text = _of_episodes(episodes, path, config, mask_in_info)
        path.write_text(_head(fault, config, path) + text)
    except OSError:
        return fault
    return EnvironmentFault(f"{fault}\n  reproduce: python {path}", {**fault.report, "snippet": str(path)})


def _head(fault: EnvironmentFault, config: RunConfig, path: Path) -> str:
    what, *where = str(fault).split("\n  traceback:")[0].splitlines()
    opaque = config.env.id.startswith(OPAQUE)
    return _HEAD.format(
        what=_in_docstring(what),
        where=_in_docstring("\n".join(line.strip() for line in where[:1]) or "at its start"),
        run=path.parents[1].name,
        path=path,
        limit=config.env.step_timeout_seconds,
        maker="vector" if config.env.form == "native" else "environment",
        cwd=os.getcwd(),
        factory="\nFACTORY = None  # put here what was passed to shoal.train: no import path leads to it\n" if opaque else "",
        config=pprint.pformat(config.env.model_dump(mode="json"), width=120, sort_dicts=False),
    )


def _of_episodes(
    episodes: Mapping[int, Sequence[tuple[int | bytes | None, list[Any]]]], path: Path, config: RunConfig, mask_in_info: bool
) -> str:
    plays: dict[int, list[tuple[Any, list[Any]]]] = {}
    for env, played in episodes.items():
        plays[env] = []
        for place, (begin, actions) in enumerate(played):
            kept = _kept(begin, path, f"{env}-{place}") if isinstance(begin, bytes) else begin or 0
            plays[env].append((kept, actions))
    arguments = (", FACTORY" if config.env.id.startswith(OPAQUE) else "") + (", mask_in_info=True" if mask_in_info else "")
    return _EPISODES.format(episodes=_episodes(plays, path), arguments=arguments)


def _of_vector(played: PlayedVector, path: Path, config: RunConfig) -> str:
    names = [_kept(snapshot, path, str(env)) for env, snapshot in enumerate(played.snapshots)]
    factory = ", FACTORY" if config.env.id.startswith(OPAQUE) else ""
    text = pprint.pformat(played.actions, width=120, compact=True)
    if text.count(",") > _MOST_NUMBERS:
        path.with_suffix(".json").write_text(json.dumps(played.actions))
        text = f"json.loads((HERE / {path.with_suffix('.json').name!r}).read_text())"
    return _VECTOR.format(
        actions=text,
        begun=played.episodes,
        snapshots=f"[HERE / name for name in {names}]" if names else "()",
        arguments=f"{factory}, group={played.group}, run_seed={played.run_seed}, epoch={played.epoch}",
        unknown=_UNKNOWN if played.inside else "",
    )


def _kept(snapshot: bytes, path: Path, place: str) -> str:
    """The name of a file beside the snippet that holds it."""
    name = f"{path.stem}-{place}.snapshot"
    (path.parent / name).write_bytes(snapshot)
    return name


def _episodes(plays: dict[int, list[tuple[Any, list[Any]]]], path: Path) -> str:
    text = pprint.pformat(plays, width=120, compact=True)
    if text.count(",") <= _MOST_NUMBERS:
        return text
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps([[env, played] for env, played in plays.items()]))
    return f"dict(json.loads((HERE / {beside.name!r}).read_text()))"


def _in_docstring(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', "'''")
