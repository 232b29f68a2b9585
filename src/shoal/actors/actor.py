"""The actor: fills rollouts.

A lease names a slot and a rollout (group, sequence, attempt). `Actor.fill` steps that group with the behaviour's actions, writes
every row straight into the slot, and finishes the envelope.

    consumes    leases and new weights (between two steps, where the caller lets it)
    waits for   nothing but the environments themselves
    on failure  raises EnvironmentFault; the slot is left unfinished, and its lease is given up by whoever supervises

Legend: T rows, B environments of the group.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from shoal.actors.paced import Carried, Pace, Paced, fill_paced
from shoal.actors.recording import chain_checksums, crc_rows, first_observation, next_state, open_envelope, record_ends
from shoal.errors import EnvironmentFault
from shoal.experience.envelope import Identity
from shoal.experience.ring import Ring, Slot
from shoal.types import Activity, ActivityRecorder, Array, Arrays, Behaviour, Ended, EnvironmentGroup, GroupState, NullRecorder


@dataclass
class _Hosted:
    """A group that lives here: its environments, where it stands, and the recurrent state it goes on with."""

    group: EnvironmentGroup
    cursor: Array  # CURSOR [B] with checksums, at the start of the next rollout
    state: Arrays
    carried: dict[int, Carried] = field(default_factory=dict)  # steps of a paced group that are still under way


class Actor:
    """Hosts groups. `between_rows(first_version) -> bool` is asked before every row but the first: True closes the rollout early."""

    def __init__(
        self,
        ring: Ring,
        behaviour: Behaviour,
        make_group: Callable[[int], EnvironmentGroup],
        *,
        run_id: bytes,
        actor: int = 0,
        incarnation: int = 0,
        epoch: int = 0,
        recorder: ActivityRecorder | None = None,
        step_timeout_seconds: float = float("inf"),
        whole: bool = False,
    ) -> None:
        """step_timeout_seconds, whole: of paced groups, see actors.paced.Pace; whoever supervises sees a plain one hang by its activity."""
        self._recorder = recorder or NullRecorder()
        self._step_timeout_seconds, self._whole = step_timeout_seconds, whole
        self._ring = ring
        self._behaviour = behaviour
        self._make_group = make_group
        self._run_id = run_id
        self._who = (actor, incarnation)
        self._epoch = epoch
        self._hosted: dict[int, _Hosted] = {}
        self._broken: dict[int, EnvironmentGroup] = {}  # could not be restored, to be closed by `release`

    def restore(self, group: int, state: GroupState) -> list[int]:
        """Host `group`, standing at `state`. Returns the environments that could not be rebuilt and began a new episode."""
        self._recorder.enter(Activity.RESTORING, group)
        self.release(group)
        environments = self._broken[group] = self._make_group(group)
        lost = environments.restore(state)
        del self._broken[group]
        cursor = environments.cursor()
        for name in ("observation_crc", "reward_crc"):
            cursor[name] = state.cursor[name]
        fresh = (cursor["num_steps"] == 0) | np.isin(np.arange(len(cursor)), lost)
        policy_state = {name: value.copy() for name, value in state.policy_state.items()}
        for value in policy_state.values():
            value[lost] = 0
        self._hosted[group] = _Hosted(environments, cursor, policy_state)
        if fresh.any():
            first = first_observation(environments, self._ring.slots[0])
            for b in np.flatnonzero(fresh):
                cursor["observation_crc"][b] = crc_rows(first, int(b), slice(None), 0, batched=False)
                cursor["reward_crc"][b] = 0
        return lost

    def hosts(self, group: int) -> bool:
        return group in self._hosted

    def release(self, group: int) -> None:
        """Stop hosting `group`: it lives elsewhere from now on. What hangs in it is left behind, which takes a moment (not a step's)."""
        if group in self._broken or group in self._hosted:
            self._recorder.enter(Activity.RESTORING, group)
        if group in self._broken:
            self._broken.pop(group).close()
        if group in self._hosted:
            self._hosted.pop(group).group.close()

    def close(self) -> None:
        for group in [*self._broken, *self._hosted]:
            self.release(group)

    def fill(
        self,
        slot_index: int,
        identity: Identity,
        between_rows: Callable[[int], bool] | None = None,
        give_up: Sequence[tuple[int, ...]] = (),
        careful: Sequence[int] = (),
    ) -> Slot:
        """Make one rollout into a slot and return it, finished.

        Args:
          give_up: (row, env) at which an episode is ended as invalid instead of stepped, because its fault came twice; a place that is
            named n times passes over n episodes. For a paced group also (env, episode, step).
          careful: rows at which each environment is named to the recorder before it is stepped, since one of them broke the process there.
            A paced group, whose environments have rows of their own, is careful at all of them.
        """
        slot, hosted = self._ring.slots[slot_index], self._hosted[identity.group]
        open_envelope(slot, identity, self._run_id, self._who, self._epoch)
        slot.arrays["cursor/start"][:] = hosted.cursor
        for name, value in hosted.state.items():
            slot.arrays[name][:] = value
        self._behaviour.begin(identity.group, identity.sequence)
        try:
            if isinstance(hosted.group, Paced):
                how = Pace(self._recorder, self._whole, self._step_timeout_seconds, Counter(give_up), bool(careful))
                hosted.state = fill_paced(slot, hosted.group, self._behaviour, hosted.state, hosted.carried, between_rows, how)
            else:
                self._step_rows(slot, hosted, between_rows, give_up, careful)
            self._finish(slot, hosted)
        except EnvironmentFault as fault:
            fault.report.setdefault("group", identity.group)
            fault.report.setdefault("sequence", identity.sequence)
            fault.report.setdefault("row", int(slot.envelope["num_rows"]))
            raise
        return slot

    def _step_rows(
        self,
        slot: Slot,
        hosted: _Hosted,
        between_rows: Callable[[int], bool] | None,
        give_up: Sequence[tuple[int, ...]],
        careful: Sequence[int],
    ) -> None:
        a, rows, group, behaviour = slot.arrays, slot.rows, hosted.group, self._behaviour
        action, reward, terminated, truncated = a["action"], a["reward"], a["terminated"], a["truncated"]
        valid, version, envelope, state = a["valid"], a["policy_version"], slot.envelope, hosted.state
        enter, index = self._recorder.enter, int(envelope["group"])
        ends: list[tuple[int, Ended]] = []
        special = {*careful, *(place[0] for place in give_up)}
        group.observe(rows[0])
        for t in range(slot.schema.num_rows):
            if t and between_rows is not None and between_rows(int(version[0, 0])):
                break
            enter(Activity.INFERRING, index, -1, t)
            acted = behaviour.act(rows[t], state, t)
            action[t] = acted.action_B
            state = acted.state
            for name, value in acted.outputs.items():
                a[name][t] = value
            enter(Activity.STEPPING, index, -1, t)
            if special and t in special:
                self._prepare(group, index, t, give_up, careful)
            step = group.step(action[t], rows[t + 1])
            reward[t], terminated[t], truncated[t] = step.reward_B, step.terminated_B, step.truncated_B
            valid[t], version[t] = step.valid_B, acted.version
            if step.ended:
                ends += [(t, ended) for ended in step.ended]
            if state and (step.ended or not step.valid_B.all()):
                state = next_state(state, step)
            envelope["num_rows"] = t + 1
        hosted.state = {name: value.copy() for name, value in state.items()}  # the behaviour's own arrays are its next answer's
        record_ends(slot, ends)

    def _prepare(self, group: EnvironmentGroup, index: int, row: int, give_up: Sequence[tuple[int, ...]], careful: Sequence[int]) -> None:
        """Something broke at this row before: say what is done next, and go around what broke twice."""
        for place in give_up:
            if place[0] == row:
                group.give_up(place[1])
        if row in careful:
            group.name_next_step(lambda b: self._recorder.enter(Activity.STEPPING, index, b, row))

    def _finish(self, slot: Slot, hosted: _Hosted) -> None:
        a, envelope = slot.arrays, slot.envelope
        num_rows = int(envelope["num_rows"])
        cursor = hosted.group.cursor()
        chain_checksums(slot, hosted.cursor, cursor)
        a["cursor/end"][:] = cursor
        hosted.cursor = cursor
        for name, value in hosted.state.items():
            a[f"{name}/end"][:] = value
        if "snapshot" in a:
            for b, snapshot in enumerate(hosted.group.snapshots()):
                a["snapshot/size"][b] = -1 if snapshot is None else len(snapshot)
                if snapshot is not None:
                    a["snapshot"][b, : len(snapshot)] = np.frombuffer(snapshot, np.uint8)
        versions = a["policy_version"][:num_rows]
        a["valid"][num_rows:] = False
        envelope["num_env_steps"] = int(a["valid"][:num_rows].sum())
        envelope["version_min"], envelope["version_max"] = versions.min(), versions.max()
        envelope["checksum"] = slot.checksum()
        envelope["finished_ns"] = time.monotonic_ns()
