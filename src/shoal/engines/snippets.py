"""A Python file for each environment fault, in the run's `faults/`, that makes the environment and plays the episode up to the fault."""

from __future__ import annotations

import json
import os
import pprint
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.config import RunConfig
from shoal.errors import EnvironmentFault
from shoal.imports import OPAQUE

_MOST_NUMBERS = 50_000  # of the actions, written into the file itself; more go into a file beside it

_TEMPLATE = '''"""{what}

{where}, in the run {run}
    python {path}
makes that environment again and plays what it was given. What goes wrong is raised; a call that hangs ends after {limit:g} s with its stack.
"""

import json
import os
import sys
from pathlib import Path

from shoal.environments.reproduce import environment

HERE = Path(__file__).resolve().parent
os.chdir({cwd!r})  # where the run was started
sys.path.append(os.getcwd())
{factory}
CONFIG = {config}

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
        for step, action in enumerate(actions):
            if step >= len(actions) - 20:
                print("step", step, "action", action, flush=True)
            env.step(action)
    env.close()
print("no fault this time: it depends on something else than seed and actions")
'''


def with_snippet(
    fault: EnvironmentFault,
    config: RunConfig,
    directory: Path,
    episodes: Mapping[int, Sequence[tuple[int | bytes | None, list[Any]]]],
    mask_in_info: bool = False,
) -> EnvironmentFault:
    """The fault with one line more, that names the snippet written for it; the fault as it is where the disk refuses.

    Args:
      directory: the run's.
      episodes: by environment of the group, (seed or snapshot, actions as the environment takes them), one after the other.
    """
    if config.env.form == "native":
        return fault  # its episodes are not known one by one
    try:
        path = _write(fault, config, directory / "faults", episodes, mask_in_info)
    except OSError:
        return fault
    return EnvironmentFault(f"{fault}\n  reproduce: python {path}", {**fault.report, "snippet": str(path)})


def _write(
    fault: EnvironmentFault,
    config: RunConfig,
    faults: Path,
    episodes: Mapping[int, Sequence[tuple[int | bytes | None, list[Any]]]],
    mask_in_info: bool,
) -> Path:
    faults.mkdir(parents=True, exist_ok=True)
    number = 1 + sum(1 for _ in faults.glob("fault-*.py"))
    path = faults / f"fault-{number}.py"
    plays: dict[int, list[tuple[Any, list[Any]]]] = {}
    for env, played in episodes.items():
        plays[env] = []
        for place, (begin, actions) in enumerate(played):
            name = f"fault-{number}-{env}-{place}.snapshot"
            if isinstance(begin, bytes):
                (faults / name).write_bytes(begin)
            plays[env].append((name if isinstance(begin, bytes) else begin or 0, actions))
    what, *where = str(fault).split("\n  traceback:")[0].splitlines()
    opaque = config.env.id.startswith(OPAQUE)
    text = _TEMPLATE.format(
        what=_in_docstring(what),
        where=_in_docstring("\n".join(line.strip() for line in where[:1]) or "at its start"),
        run=faults.parent.name,
        path=path,
        limit=config.env.step_timeout_seconds,
        cwd=os.getcwd(),
        factory="\nFACTORY = None  # put here what was passed to shoal.train: no import path leads to it\n" if opaque else "",
        config=pprint.pformat(config.env.model_dump(mode="json"), width=120, sort_dicts=False),
        episodes=_episodes(plays, path),
        arguments=(", FACTORY" if opaque else "") + (", mask_in_info=True" if mask_in_info else ""),
    )
    path.write_text(text)
    return path


def _episodes(plays: dict[int, list[tuple[Any, list[Any]]]], path: Path) -> str:
    text = pprint.pformat(plays, width=120, compact=True)
    if text.count(",") <= _MOST_NUMBERS:
        return text
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps([[env, played] for env, played in plays.items()]))
    return f"dict(json.loads((HERE / {beside.name!r}).read_text()))"


def _in_docstring(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"""', "'''")
