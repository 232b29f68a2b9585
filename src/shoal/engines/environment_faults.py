"""What follows from an environment's fault: told in full, with a snippet that plays it again, and then mended or the end of the run.

A fault in the first seconds of a run is a bug and ends it. A later one is mended by a restart, `env.restart_budget` times in all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from shoal.engines.poison import UNNAMED, WHILE_RESTORED
from shoal.engines.session import Session
from shoal.engines.snippets import PlayedVector, with_snippet
from shoal.errors import EnvironmentFault
from shoal.experience.envelope import Identity
from shoal.experience.ring import Slot
from shoal.streams import episode_seed, group_seed
from shoal.types import Array, EnvironmentSpec

EARLY_SECONDS = 10.0  # since the first environment step

LOOKED_AT_NUMBERS = 100_000  # of a rollout's observations, whose bounds are looked at in every row
LONG_EPISODE = 100_000  # steps, after which it is said that an episode does not end

Episode = tuple[int | bytes | None, list[Any]]  # seed or snapshot, and the actions since, as the environment takes them


class EnvironmentFaults:
    """Those of one run. `count`: so far."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.count = 0
        self._bounds = _bounds(session.spec)
        self._long_episode: float = LONG_EPISODE

    def happened(self, fault: EnvironmentFault, identity: Identity | None = None, seconds_ago: float = 0.0) -> None:
        """Count and tell a fault.

        Args:
          identity: the rollout that was being made; it must still be leased.
          seconds_ago: when what is found now began (a hang).
        Raises:
          EnvironmentFault: this one, where it is early or the budget is spent; it says so.
        """
        session, budget = self._session, self._session.config.env.restart_budget
        self.count += 1
        ends_process = fault.report.get("kind") in ("hang", "died") and "paced" not in fault.report  # whose restart is counted then
        session.restarts += not ends_process
        if "paced" in fault.report and identity is not None:
            fault = self._paced(fault, identity)
        full = self._in_full(fault, identity)
        early = session.seconds - seconds_ago < EARLY_SECONDS
        spent = self.count > budget
        if early:
            why = f"in the first {EARLY_SECONDS:g} s of a run a fault is not mended by a restart"
        elif spent:
            why = f"this was fault {self.count}, and env.restart_budget mends {budget}"
        else:
            why = f"the environment is made again, {self.count} of {budget} times (env.restart_budget)"
        full = EnvironmentFault(f"{full}\n  {why}", {**full.report, "count": self.count, "budget": budget})
        session.observer.event("environment_fault", message=str(full), report=full.report)
        if early or spent:
            raise full

    def give_back(self, fault: EnvironmentFault, identity: Identity) -> None:
        """The group is made anew; the second time that a fault comes at the same step, its episode is given up there."""
        report = fault.report
        # In async mode it may have hung since an earlier rollout, so the step of its episode is the place; else its row is.
        step = report.get("paced") if self._session.coordinator.plan.mode == "async" else None
        row, env = (
            default if report.get(name) is None else int(str(report[name])) for name, default in (("row", WHILE_RESTORED), ("env", UNNAMED))
        )
        self._session.coordinator.faulted(identity, row, env, tuple(step) if isinstance(step, (list, tuple)) else None)

    def _paced(self, fault: EnvironmentFault, identity: Identity) -> EnvironmentFault:
        """The hang of one environment of a paced group, which its actor saw, with what only the supervisor knows."""
        from shoal.environments.faults import environment_fault  # brings gymnasium, which nobody else here needs

        report = fault.report
        env, played = int(str(report["env"])), self._episodes(identity, int(str(report["env"])))
        limit = self._session.config.env.step_timeout_seconds
        whole = environment_fault(
            "hang", "step() has not returned", environment=self._session.config.env.id, group=identity.group, env=env,
            step=int(str(report["step"])), seed=int(str(report["seed"])), last_action=played[-1][1][-1] if played and played[-1][1] else None,
            expected=f"at most {limit:g} s", actual=str(fault).splitlines()[0], stack=str(report.get("traceback") or ""),
        )  # fmt: skip
        return EnvironmentFault(str(whole), {**report, **whole.report})

    def place_of(self, group: int) -> Identity | None:
        """The rollout that is being made of a group: the first that is leased."""
        groups = self._session.coordinator.groups
        return min(groups[group].leased.values(), default=None) if 0 <= group < len(groups) else None

    def lost(self, kind: str, what: str, place: tuple[int, int, int], how: dict[str, str], stack: str) -> EnvironmentFault:
        """The fault of a process that hung or died while it stepped a group; in its report, `candidates` are the environments that may have been it.

        Args:
          place: group, row, and environment (UNNAMED where nobody knows which it was, the first time).
          kind: `hang` or `died`. what: in words. how: expected, actual, hint. stack: as faulthandler wrote it.
        """
        group, row, suspect = place
        name, identity = self._session.config.env.id, self.place_of(group)
        lines = [f"{name}: {what}", f"  where: group {group}, row {row} of its rollout"]
        standing = self._standing(identity) if identity is not None else []
        named = suspect if 0 <= suspect < len(standing) else 0 if len(standing) == 1 else None
        candidates = [
            {"env": env, "seed": seed, "step": steps, "last_action": action}
            for env, (seed, steps, action) in enumerate(standing)
            if named in (None, env)
        ]
        lines += [
            "    environment {env}: step {step} of its episode, seed {seed}, last action {last_action!r:.80}".format(**one)
            for one in candidates
        ]
        lines += [f"  {word}: {text}" for word, text in how.items()]
        if stack:
            lines += ["  traceback:", *("    " + line for line in stack.splitlines())]
        seed, step, last_action = (None, None, None) if named is None else standing[named]
        report = {
            "kind": kind, "what": what, "environment": name, "group": group, "row": row, "env": named,
            "seed": seed, "step": step, "last_action": last_action, "field": "", "traceback": stack,
            "candidates": candidates, **how,
        }  # fmt: skip
        return EnvironmentFault("\n".join(lines), report)

    # ---- what is no fault, but is said once --------------------------------------------------------------------------
    def look_at(self, slot: Slot) -> None:
        """Look at a finished rollout: a value outside of its Box is trained on as it is, an endless episode has no return."""
        num_rows, sequence = int(slot.envelope["num_rows"]), int(slot.envelope["sequence"])
        for name, (low, high) in list(self._bounds.items()):
            values_TB, valid_TB = slot.arrays[name][:num_rows], slot.arrays["valid"][:num_rows]
            if values_TB.size > LOOKED_AT_NUMBERS:  # of a large observation, another row of each rollout
                values_TB, valid_TB = (array[sequence % num_rows :][:1] for array in (values_TB, valid_TB))
            out = ((values_TB < low) | (values_TB > high)) & valid_TB.reshape(valid_TB.shape + (1,) * (values_TB.ndim - 2))
            if out.any():
                del self._bounds[name]
                t, b, *place = (int(i[0]) for i in np.nonzero(out))
                at = f"{name}{place}" if place else name
                self._warn(
                    f"{at} was {values_TB[(t, b, *place)]:g} in group {int(slot.envelope['group'])}, environment {b}, and its space says "
                    f"{low[tuple(place)]:g} to {high[tuple(place)]:g}; it is trained on as it is: widen the bounds of observation_space, or clip"
                )
        longest = int(slot.arrays["cursor/end"]["num_steps"].max())
        if longest > self._long_episode:
            self._long_episode = math.inf
            self._warn(
                f"an episode has gone on for {longest:,} steps; without ends there are no returns, and putting the environment back takes "
                "longer and longer: end it, or set env.max_episode_steps"
            )

    def _warn(self, message: str) -> None:
        self._session.observer.event("warning", message=message)

    # ---- which episodes were being played --------------------------------------------------------------------------
    def _in_full(self, fault: EnvironmentFault, identity: Identity | None) -> EnvironmentFault:
        if "snippet" in fault.report:
            return fault
        session, report = self._session, fault.report
        if session.config.env.form == "native":
            return with_snippet(fault, session.config, session.directory, {}, vector=self._vector_played(identity))
        env = report.get("env")
        episodes: dict[int, list[Episode]] = {}
        if identity is not None and identity in session.coordinator.groups[identity.group].leased.values():
            envs = range(session.coordinator.plan.group_size) if env is None else [int(str(env))]
            episodes = {b: self._episodes(identity, b) for b in envs}
        seed = report.get("seed")
        if env is not None and isinstance(seed, int):
            key = int(str(env))
            episodes[key] = _up_to(episodes.get(key, []), seed, int(str(report.get("step") or 0)), report.get("last_action"))
        mask_in_info = session.spec.action_mask == "info"
        return with_snippet(fault, session.config, session.directory, episodes or {0: []}, mask_in_info)

    def _standing(self, identity: Identity) -> list[tuple[int | None, int, Any]]:
        """(seed, step, last action) of each environment of the group; in its native form all have one seed."""
        vector = self._vector_played(identity) if self._session.config.env.form == "native" else None
        out: list[tuple[int | None, int, Any]] = []
        for b in range(self._session.coordinator.plan.group_size):
            played = self._episodes(identity, b)
            begin, actions = played[-1] if played else (None, [])
            if vector is not None:
                begin = vector.seed
            out.append((begin if isinstance(begin, int) else None, len(actions), actions[-1] if actions else None))
        return out

    def _episodes(self, identity: Identity, b: int) -> list[Episode]:
        """The last two episodes of environment b, up to the step that is under way, as far as they are known."""
        from shoal.environments.spaces import to_environment_action  # brings gymnasium, which nobody else here needs

        session, coordinator = self._session, self._session.coordinator
        group = coordinator.groups[identity.group]
        state = group.history.state_at(identity.sequence)
        cursor, snapshot = state.cursor[b], state.snapshots[b]
        first = int(cursor["episode"])
        begin: int | bytes = snapshot if snapshot is not None else self._seed(identity.group, b, first, cursor)
        stored: list[Array] = list(state.actions[b]) if snapshot is None else []
        played: list[tuple[int | bytes, list[Array]]] = [(begin, stored)]
        slot = next((slot for slot, leased in group.leased.items() if leased == identity), None)
        if slot is not None and coordinator.ring.slots[slot].identity == identity:
            a, rows = coordinator.ring.slots[slot].arrays, self._rows(slot, b)
            for t in range(rows):
                played[-1][1].append(a["action"][t, b].copy())
                if t + 1 < rows and (a["terminated"][t, b] or a["truncated"][t, b]):
                    first += 1
                    played.append((self._seed(identity.group, b, first, None), []))
        leaf = session.spec.action
        return [(begin, [to_environment_action(leaf, action[None])[0].tolist() for action in actions]) for begin, actions in played[-2:]]

    def _vector_played(self, identity: Identity | None) -> PlayedVector:
        """What the group in its native form was given since its rollout began; a group that nobody leased, at its start."""
        session, coordinator = self._session, self._session.coordinator
        if identity is None:
            return PlayedVector(0, 0, session.config.seed, session.epoch, [0] * coordinator.plan.group_size, [], [])
        group = coordinator.groups[identity.group]
        state = group.history.state_at(identity.sequence)
        snapshots = [one for one in state.snapshots if one is not None]
        whole = len(snapshots) == len(state.snapshots)
        inside = state.cursor["num_steps"] > 0
        episodes = state.cursor["episode"] + (0 if whole else inside)
        slot = next((slot for slot, leased in group.leased.items() if leased == identity), None)
        actions = []
        if slot is not None and coordinator.ring.slots[slot].identity == identity:
            actions = coordinator.ring.slots[slot].arrays["action"][: self._rows(slot, 0)].tolist()
        stands = int(state.cursor["seed"][0])
        seed = stands if whole and stands else group_seed(session.config.seed, identity.group, int(episodes.sum()), session.epoch)
        return PlayedVector(
            seed,
            identity.group,
            session.config.seed,
            session.epoch,
            episodes.tolist(),
            snapshots if whole else [],
            actions,
            bool(inside.any()) and not whole,
        )

    def _rows(self, slot: int, b: int) -> int:
        """Rows of environment b that hold an action: those that are done, and the one that is under way."""
        held = self._session.coordinator.ring.slots[slot]
        done = int(held.rows_used()[b]) if held.envelope["paced"] else int(held.envelope["num_rows"])
        return min(done + 1, held.schema.num_rows)

    def _seed(self, group: int, b: int, episode: int, cursor: Array | None) -> int:
        if cursor is not None and cursor["num_steps"]:
            return int(cursor["seed"])
        return episode_seed(self._session.config.seed, group, b, episode, self._session.epoch)


def _bounds(spec: EnvironmentSpec) -> dict[str, tuple[Array, Array]]:
    """Bounds of every Box of the observation that its dtype does not hold already, by field name: [*shape] each."""
    found = {}
    for leaf in spec.observation:
        limits = np.iinfo(leaf.dtype) if np.dtype(leaf.dtype).kind in "iu" else None
        loose = limits is not None and min(leaf.low, default=0) <= limits.min and max(leaf.high, default=0) >= limits.max
        if leaf.kind == "box" and leaf.size and not loose and np.isfinite([*leaf.low, *leaf.high]).any():
            low, high = (np.broadcast_to(np.array(bound), leaf.size).reshape(leaf.shape) for bound in (leaf.low, leaf.high))
            found[leaf.name("observation")] = low, high
    return found


def _up_to(episodes: list[Episode], seed: int, step: int, last_action: Any) -> list[Episode]:
    """What is known of an environment's episodes, up to the step of this seed's episode at which the fault came."""
    if episodes and episodes[-1][0] == seed:
        return episodes
    if step == 0 and episodes:
        return [*episodes[-1:], (seed, [])]  # the reset after the last step
    if episodes and isinstance(episodes[-1][0], bytes):
        return episodes  # it stands inside of this episode
    return [(seed, [] if last_action is None else [last_action])]
