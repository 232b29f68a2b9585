"""Each part of a training alone, on one core of this process: what an environment step costs in it.

The training itself is executed here, part after part, as the inline engine does, with a clock around each. So the policy acts and learns, and
episodes are as long as in a run of that age. Environment and inference are measured without a clock inside: the actions of the rollout that
was just made are stepped again in a second group that began where the first did, its observations are shown to the behaviour again, and it is
recorded again from memory.

Legend: B environments of a group.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from shoal.actors.actor import Actor
from shoal.benching.measuring import Spent, cpu_us, median, spend
from shoal.benching.neighbours import crowding
from shoal.benching.played import PlayedBehaviour, PlayedGroup
from shoal.benching.shares import OneOf, exchange
from shoal.engines.coordinator import Coordinator
from shoal.engines.messages import Kind, Word, to_json
from shoal.engines.plan import Lease, Plan
from shoal.engines.roles import Blueprint
from shoal.experience.envelope import Identity
from shoal.experience.ring import Slot, allocate
from shoal.experience.wire import pack, unpack
from shoal.supervision.channel import Channel, wait
from shoal.types import Acted, Array, Arrays, Behaviour
from shoal.weights.board import WeightBoard

_MIN_CYCLES = 3  # with each number of threads
_WARM_UP_SHARE = 0.2
_CROWDED_SHARE = 0.5
_EXCHANGED_SHARE = 0.1


@dataclass(frozen=True)
class PartCosts:
    """Microseconds of processor time per environment step, medians over `cycles` updates.

    Attributes:
      record: writing a rollout down, with the environments' snapshots where they offer them. mixed: what a rollout costs more than environment,
        inference and record alone, because they take turns at every row (caches, branches); no part of the ceilings. words: messages between the processes.
      decide: the coordinator. consume: checking and copying a batch. weights: publishing, and reading by every actor.
      pack, unpack: of a rollout that crosses a network (experience/wire.py), at its node and where it comes; no part of the ceilings.
      learn_wall: by number of threads, wall time of an update.
      crowding: how many times as much an update costs while all cores make them (benching/neighbours.py).
      episode_steps: mean length of the episodes meanwhile.
      share, exchange: of several learners, of each: its part of an update, and what it adds up with the others, in `exchanges` exchanges an update.
    """

    environment: float
    inference: float
    learn: float
    record: float
    mixed: float
    words: float
    decide: float
    consume: float
    weights: float
    pack: float
    unpack: float
    learn_wall: dict[int, float]
    crowding: float
    episode_steps: float
    cycles: int
    share: float = 0.0
    exchange: float = 0.0
    exchanges: int = 0

    @property
    def transport(self) -> float:
        return self.record + self.words + self.decide + self.consume + self.weights


class _Counted:
    """A behaviour that counts its answers: a paced group asks more often than once a row."""

    def __init__(self, behaviour: Behaviour) -> None:
        self._behaviour = behaviour
        self.answers = 0

    def begin(self, group: int, sequence: int) -> None:
        self._behaviour.begin(group, sequence)

    def act(self, observation: Arrays, state: Arrays, row: int | Array) -> Acted:
        self.answers += 1
        return self._behaviour.act(observation, state, row)


class Cycle:
    """Makes updates, one call of `run` each, and keeps what each part spent: {part: [(seconds, env steps)]}."""

    def __init__(self, blueprint: Blueprint, learners: int = 1) -> None:
        """learners: where there are several, what one of them does is measured too."""
        config = blueprint.config
        policy = blueprint.policy()
        schema, plan = blueprint.schema(policy), Plan.of(config)
        ring = allocate(schema, plan.num_slots + 1)
        self._scratch = ring.slots[plan.num_slots]  # the coordinator knows nothing of it
        self._coordinator = Coordinator(plan, blueprint.spec, ring, config.stop)
        self._coordinator.place([0])
        size = blueprint.layout(policy).size
        board = WeightBoard(size, np.zeros(WeightBoard.size_bytes(size), np.uint8))
        board.reset()
        self._behaviour = blueprint.behaviour(board)
        paced = config.env.form == "threads" and plan.mode == "async"
        self._counted = _Counted(self._behaviour) if paced else None
        self._actor = blueprint.actor(ring, self._counted or self._behaviour)
        self._learner = blueprint.learner(ring, board, plan.max_policy_lag)
        self.one_of = OneOf(blueprint, ring, plan.max_policy_lag, learners) if learners > 1 else None
        self._learner.publish()
        self._behaviour.refresh()
        self._again = blueprint.group(0)
        self._played, self._chosen = PlayedGroup(blueprint.spec, plan.group_size), PlayedBehaviour()
        self._recording = Actor(ring, self._chosen, lambda index: self._played, run_id=blueprint.run_id)
        self._paced = paced
        self._actors = max(1, config.actors or 1)
        self._run_id = blueprint.run_id
        self._ends = Channel.pair()
        self.found: defaultdict[str, list[tuple[Spent, int]]] = defaultdict(list)

    def close(self) -> None:
        self._actor.close()
        self._again.close()
        for end in self._ends:
            end.close()

    @property
    def episode_steps(self) -> float:
        lengths = self._coordinator.lengths
        return float(np.mean(lengths)) if lengths else 0.0

    def run(self, threads: int) -> int:
        """One update with `threads` torch threads for learning, and one for all else. Returns its env steps, 0 where all were too old."""
        c = self._coordinator
        decided: list[Spent] = []
        torch.set_num_threads(1)
        with _adding(decided):
            leases = c.next_leases()
        for lease in leases:
            slot = self._fill(lease)
            with _adding(decided):
                c.filled(lease.slot, lease.identity)
            if lease.identity.group == 0:
                self._repeat(slot)
                self._cross(slot)
        with _adding(decided):
            batch = c.next_batch()
        assert batch is not None
        if self.one_of is not None:
            self.one_of.update(batch, self._learner)
        words = spend(lambda: self._pass_words(batch))
        begun = time.process_time(), time.perf_counter()
        consumed = self._learner.consume(batch)
        consume = Spent(time.process_time() - begun[0], time.perf_counter() - begun[1])
        with _adding(decided):
            c.consumed(consumed.dropped)
        if consumed.batch is None:  # all of it was too old
            c.trained({})
            return 0
        metrics: dict[str, float] = {}
        torch.set_num_threads(threads)

        def update() -> None:
            metrics.update(self._learner.update(consumed))

        learn = spend(update)
        torch.set_num_threads(1)
        publish, refresh = spend(self._learner.publish), spend(self._behaviour.refresh)
        with _adding(decided):
            c.trained(metrics)
        steps = int(metrics["num_env_steps"])
        learning = Spent(max(0.0, learn.cpu - publish.cpu), max(0.0, learn.wall - publish.wall))
        self.found[f"learn/{threads}"].append((learning, steps))
        self.found["words"].append((words, steps))
        self.found["consume"].append((consume, steps))
        self.found["decide"].append((Spent(sum(d.cpu for d in decided), sum(d.wall for d in decided)), steps))
        self.found["weights"].append((Spent(publish.cpu + self._actors * refresh.cpu, publish.wall), steps))
        return steps

    def _fill(self, lease: Lease) -> Slot:
        group = lease.identity.group
        if lease.restore is not None:
            self._actor.restore(group, lease.restore)
            if group == 0:
                self._again.restore(lease.restore)
                self._recording.restore(group, lease.restore)
        answers = self._counted.answers if self._counted else 0
        made: list[Slot] = []
        spent = spend(lambda: made.append(self._actor.fill(lease.slot, lease.identity)))
        (slot,) = made
        if group == 0:
            self.found["fill"].append((spent, int(slot.envelope["num_env_steps"])))
            rows = int(slot.envelope["num_rows"])
            self._answers_per_row = (self._counted.answers - answers) / rows if self._counted else 1.0
        return slot

    def _repeat(self, slot: Slot) -> None:
        """The rollout again: its environment alone, its inference alone, its recording alone."""
        rows, steps = int(slot.envelope["num_rows"]), int(slot.envelope["num_env_steps"])
        action, identity = slot.arrays["action"], slot.identity
        into = self._scratch.rows
        state = {name: slot.arrays[name] for name in slot.schema.state_names}

        def step() -> None:
            for t in range(rows):
                self._again.step(action[t], into[t + 1])

        def infer() -> None:
            self._behaviour.begin(identity.group, identity.sequence)
            for t in range(rows):
                self._behaviour.act(slot.rows[t], state, t)

        stepped = steps if not slot.envelope["paced"] else rows * slot.schema.num_envs
        self.found["environment"].append((spend(step), stepped))
        inferred = spend(infer)
        each = self._answers_per_row
        self.found["inference"].append((Spent(inferred.cpu * each, inferred.wall * each), steps))
        if not self._paced:
            self._played.load(slot)
            self._chosen.load(slot)
            record = spend(lambda: self._recording.fill(self._scratch.index, identity))
            snapshots = spend(self._again.snapshots) if "snapshot" in slot.arrays else Spent(0.0, 0.0)
            self.found["record"].append((Spent(record.cpu + snapshots.cpu, record.wall + snapshots.wall), steps))

    def _cross(self, slot: Slot) -> None:
        """The rollout as bytes, and back."""
        steps, packed = int(slot.envelope["num_env_steps"]), list[bytes]()
        self.found["pack"].append((spend(lambda: packed.append(pack(slot))), steps))
        newest = int(slot.envelope["version_max"])
        self.found["unpack"].append((spend(lambda: unpack(packed[0], self._scratch, self._run_id, slot.identity, newest)), steps))

    def _pass_words(self, batch: list[tuple[int, Identity]]) -> None:
        """Every message of one update through a channel, there and back, as the supervisor and its roles say them."""
        for slot, identity in batch:
            self._pass(Word(Kind.LEASE, slot, identity, 1).encode(), fds=True)
            self._pass(Word(Kind.FILLED, slot, identity).encode())
        if self._coordinator.plan.mode == "async":
            for _ in range(self._actors):
                self._pass(Word(Kind.PUBLISHED, value=1).encode(), fds=True)
        order = {"do": "train", "rollouts": [[slot, list(identity)] for slot, identity in batch]}
        json.loads(self._pass(to_json(order)))
        json.loads(self._pass(to_json({"is": "consumed", "dropped": []})))
        metrics = {f"metric_{n}": 0.123456789 * n for n in range(16)}
        json.loads(self._pass(to_json({"is": "trained", "version": 1, "metrics": metrics})))

    def _pass(self, message: bytes, *, fds: bool = False) -> bytes:
        near, far = self._ends
        near.send(message)
        wait([far], 1.0)
        if fds:
            received = far.receive_with_fds()
            body = received[0] if received is not None else b""
        else:
            body = far.receive() or b""
        if body[:1] != b"{":
            Word.decode(body)
        return body


@contextmanager
def _adding(to: list[Spent]) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    to.append(Spent(time.process_time() - cpu, time.perf_counter() - wall))


def measure_parts(blueprint: Blueprint, cores: int, seconds: float, told: Callable[[str], None]) -> PartCosts:
    """Run updates for about `seconds` (and a few at least), learning with 1 thread and with `cores` threads in turn."""
    learners = blueprint.config.learners
    cycle = Cycle(blueprint, learners)
    threads = torch.get_num_threads()
    wanted = [1] if cores == 1 else [1, cores]
    try:
        told("costs: warming up")
        _run_for(cycle, wanted, _WARM_UP_SHARE * seconds)
        cycle.found.clear()
        if cycle.one_of is not None:
            cycle.one_of.found.clear()
        told("costs: measuring the parts")
        number = _run_for(cycle, wanted, seconds)
        parts = _costs(cycle, wanted, number)
        if cycle.one_of is not None:
            told(f"costs: what {learners} learners add up")
            parts = _of_several(parts, cycle.one_of, learners, _EXCHANGED_SHARE * seconds)
            cycle.one_of = None
        told("costs: with all cores busy")
        return replace(parts, crowding=crowding(cycle, blueprint, cores, _CROWDED_SHARE * seconds))
    finally:
        torch.set_num_threads(threads)
        cycle.close()


def _of_several(parts: PartCosts, one: OneOf, learners: int, seconds: float) -> PartCosts:
    exchanged = exchange(one.lengths, learners, seconds)
    steps = median([float(steps) for _, steps in one.found]) or 1.0
    return replace(parts, share=cpu_us(one.found), exchange=1e6 * exchanged.cpu / steps, exchanges=len(one.lengths))


def _run_for(cycle: Cycle, wanted: list[int], seconds: float) -> int:
    """Updates for so long; three of each kind, but where that takes three times as long, one. Returns how many."""
    begun, number = time.perf_counter(), 0
    while True:
        elapsed = time.perf_counter() - begun
        few = number < len(wanted) or (number < _MIN_CYCLES * len(wanted) and elapsed < 3 * seconds)
        if elapsed >= seconds and not few:
            return number
        cycle.run(wanted[number % len(wanted)])
        number += 1


def _costs(cycle: Cycle, wanted: list[int], cycles: int) -> PartCosts:
    found = cycle.found
    environment, inference, fill = cpu_us(found["environment"]), cpu_us(found["inference"]), cpu_us(found["fill"])
    rest = max(0.0, fill - environment - inference)
    record = cpu_us(found["record"]) if found["record"] else rest  # a paced group's is not measured alone
    wall = {n: 1e6 * median([spent.wall / steps for spent, steps in found[f"learn/{n}"]]) for n in wanted}
    return PartCosts(
        environment=environment,
        inference=inference,
        learn=cpu_us(found["learn/1"]),
        record=record,
        mixed=max(0.0, rest - record),
        words=cpu_us(found["words"]),
        decide=cpu_us(found["decide"]),
        consume=cpu_us(found["consume"]),
        weights=cpu_us(found["weights"]),
        pack=cpu_us(found["pack"]),
        unpack=cpu_us(found["unpack"]),
        learn_wall=wall,
        crowding=1.0,
        episode_steps=cycle.episode_steps,
        cycles=cycles,
    )
