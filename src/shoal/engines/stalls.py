"""Who waits for whom, for how long, and where each process stands: what `shoal stalls` and SIGUSR1 say of a living run. No torch.

Stacks come from each process itself: faulthandler writes them into its log on SIGUSR1, from a signal handler in C, so also from a process whose
environment holds the interpreter. Only one that is stopped (SIGSTOP) cannot; that it is stopped is said instead.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.engines.coordinator import Coordinator
from shoal.engines.fleet import Fleet
from shoal.engines.traffic import Delivery
from shoal.engines.watch import Seen
from shoal.errors import ProcessError
from shoal.types import Activity

DUMP_SECONDS = 0.3  # all stacks are in the logs by then
MAX_STACK_CHARS = 8_000
MAX_STACKS_CHARS = 120_000  # of all together: the answer is one message
_DOING = {
    Activity.STARTING: "starting",
    Activity.STEPPING: "stepping",
    Activity.INFERRING: "choosing actions",
    Activity.WAITING_FOR_LEASE: "waiting for a lease",
    Activity.WAITING_FOR_BATCH: "waiting for a batch",
    Activity.LEARNING: "learning",
    Activity.SAVING: "saving",
    Activity.RESTORING: "putting back",
    Activity.PUBLISHING: "publishing weights",
    Activity.SHARING: "adding up with the other learners",
}
Facts = dict[str, Any]


@dataclass(frozen=True)
class Situation:
    """All processes at one moment (learners, actors, and the inference server where there is one), and what is decided about them."""

    seen: Sequence[Seen]
    coordinator: Coordinator
    pids: Sequence[int]  # as `seen`, 0 where there is none now
    paused: bool = False

    @property
    def saving(self) -> list[str]:
        """Learners that write their part of a checkpoint."""
        return [_name(seen) for seen in self.seen if seen.saving]

    @property
    def actors(self) -> list[tuple[Seen, int]]:
        """With their process ids."""
        return [(seen, pid) for seen, pid in zip(self.seen, self.pids, strict=True) if seen.name == "actor"]


def look(fleet: Fleet, coordinator: Coordinator, *, saving: Container[int], paused: bool, now: float) -> Situation:
    """What all processes do at this moment, and who has an order. saving: learners whose order is a checkpoint."""
    seen: list[Seen] = []
    busy = {group.actor for group in coordinator.groups if group.leased}
    for process, record in zip(fleet.processes, fleet.activities(), strict=True):
        saves = process.name == "learner" and process.index in saving
        ordered = process.index in busy if process.name == "actor" else coordinator.learner_busy or saves
        state = fleet.state_of(process)
        order_seconds = now - process.told_at if ordered and process.up else None
        if process.name == "inference":
            order_seconds = max((each.record.age_seconds for each in seen if _asks(each)), default=None)
        who = (process.name, process.index, process.incarnation)
        served = process.name == "actor" and fleet.inference is not None
        delivery = fleet.delivery_of(process)
        seen.append(Seen(*who, state, record, now - process.asked_at, order_seconds, saves, served, delivery))
    return Situation(seen, coordinator, [process.pid for process in fleet.processes], paused)


def _asks(seen: Seen) -> bool:
    """Whether it waits for the inference server's answer."""
    return seen.served and seen.record.incarnation == seen.incarnation and seen.record.activity is Activity.INFERRING


def _name(seen: Seen) -> str:
    return f"{seen.name}-{seen.index}"


def is_starting(seen: Seen, pid: int) -> bool:
    return not pid or seen.record.incarnation != seen.incarnation or seen.record.activity is Activity.STARTING


def doing(seen: Seen, pid: int) -> tuple[str, float]:
    """What a process does, in words, and for how long."""
    what, seconds = _doing(seen, pid)
    return what + _on_its_way(seen.delivery), seconds


def _on_its_way(delivery: Delivery | None) -> str:
    if delivery is None:
        return ""
    return f" (what it is told is on its way: {delivery.there_bytes:,} of {delivery.size_bytes:,} bytes after {delivery.seconds:.0f} s)"


def _doing(seen: Seen, pid: int) -> tuple[str, float]:
    if not pid:
        return "not there", seen.up_seconds
    if seen.state == "T":
        return "stopped (SIGSTOP); nothing moves it but SIGCONT", seen.record.age_seconds
    if is_starting(seen, pid):
        return "starting", seen.up_seconds
    record = seen.record
    if seen.name == "inference" and record.activity is Activity.WAITING_FOR_BATCH:
        return "waiting for a question", record.age_seconds
    group = f" group {record.group}" if record.group >= 0 else ""
    row = f", row {record.row}" if record.row >= 0 else ""
    env = f", environment {record.env}" if record.env >= 0 else ""
    return f"{_DOING[record.activity]}{group}{row}{env}", record.age_seconds


def waits(situation: Situation) -> Iterator[Facts]:
    """Everybody who waits: who, for (names), seconds, why."""
    yield from _learner_waits(situation, situation.seen[0])
    yield from _shares_waited_for(situation)
    for actor, pid in situation.actors:
        if pid and _asks(actor):
            why = f"it is to choose actions for group {actor.record.group}, row {actor.record.row}"
            yield {"who": _name(actor), "for": ["inference-0"], "seconds": actor.record.age_seconds, "why": why}
        idle = pid and not is_starting(actor, pid) and actor.record.activity is Activity.WAITING_FOR_LEASE and actor.order_seconds is None
        if idle:
            blockers, why = _why_no_lease(situation, actor)
            yield {"who": _name(actor), "for": blockers, "seconds": actor.record.age_seconds, "why": why}


def _learner_waits(situation: Situation, learner: Seen) -> Iterator[Facts]:
    c = situation.coordinator
    if c.learner_busy or situation.saving or is_starting(learner, situation.pids[0]):
        return
    missing = [index for index, group in enumerate(c.groups) if group.leased]
    makers = list(dict.fromkeys(f"actor-{c.groups[index].actor}" for index in missing))
    wanted = c.plan.num_groups if c.plan.mode == "sync" else c.plan.batch_rollouts
    why = f"{min(len(c.ready), wanted)} of {wanted} rollouts of the next update are there"
    if missing:
        why += f"; being made: {', '.join(f'group {index} (actor {c.groups[index].actor})' for index in missing)}"
    elif situation.paused:
        why += "; the run is paused"
    if c.plan.mode == "async" and c.limiter is not None and c.limiter.learns:
        why += (
            f"; it has sampled {max(0.0, c.limiter.surplus):,.0f} steps ahead of what was inserted, and may no more than "
            f"{c.limiter.rate.tolerance_samples:,.0f} (replay.tolerance)"
        )
    yield {"who": _name(learner), "for": makers, "seconds": learner.record.age_seconds, "why": why}


def _shares_waited_for(situation: Situation) -> Iterator[Facts]:
    """Learners that are done with their part of an optimizer step, and those that are not."""
    learners = [seen for seen in situation.seen if seen.name == "learner"]
    done = [seen for seen in learners if seen.record.incarnation == seen.incarnation and seen.record.activity is Activity.SHARING]
    late = [_name(seen) for seen in learners if seen not in done]
    for seen in done:
        yield {"who": _name(seen), "for": late, "seconds": seen.record.age_seconds, "why": "gradients are added up over all learners"}


def _why_no_lease(situation: Situation, actor: Seen) -> tuple[list[str], str]:
    c, learner = situation.coordinator, situation.seen[0]
    mine = [index for index, group in enumerate(c.groups) if group.actor == actor.index]
    if situation.paused:
        return [], "the run is paused"
    if not mine:
        return [], "it hosts no group"
    if is_starting(learner, situation.pids[0]):
        return [_name(learner)], "the learner is not ready"
    if situation.saving:
        return situation.saving, "a checkpoint is being saved"
    if c.learner_busy:
        if c.plan.mode == "sync":
            return [_name(learner)], "an update is being made"
        if c.limiter is not None:
            return [_name(learner)], "the learner is behind: it samples what is due for the rollouts before (replay.samples_per_insert)"
        return [_name(learner)], "enough is waiting to be learned from"
    others = list(dict.fromkeys(f"actor-{group.actor}" for group in c.groups if group.leased and group.actor != actor.index))
    return others, "the other rollouts of this update are not there"


def report(situation: Situation, stacks: Sequence[str], others: Sequence[Facts] = ()) -> Facts:
    """All that is known, JSON-able: update, waits, blamed (who is waited for and does not wait itself), processes with their stacks."""
    found = list(waits(situation))
    waiting = {each["who"] for each in found}
    awaited = {name for each in found for name in each["for"]} - waiting
    processes = []
    for seen, pid, stack in zip(situation.seen, situation.pids, stacks, strict=True):
        what, seconds = doing(seen, pid)
        processes.append(
            {
                "name": _name(seen),
                "pid": pid,
                "incarnation": seen.incarnation,
                "state": seen.state,
                "doing": what,
                "seconds": seconds,
                "stack": stack,
            }
        )
    blamed = [f"{p['name']}, {p['doing']} for {p['seconds']:.1f} s" for p in processes if p["name"] in awaited]
    return {"update": situation.coordinator.version, "waits": found, "blamed": blamed, "processes": [*processes, *others]}


def in_words(found: Facts) -> str:
    """The report for a person."""
    lines = [f"update {found['update']:,}"]
    for each in found["waits"]:
        whom = f" for {', '.join(each['for'])}" if each["for"] else ""
        lines.append(f"  {each['who']} has waited{whom} for {each['seconds']:.1f} s: {each['why']}")
    if not found["waits"]:
        lines.append("  nobody waits")
    lines += [f"  in the end it is {text}" for text in found["blamed"]]
    for process in found["processes"]:
        head = f"{process['name']} (process {process['pid'] or 'none'}): {process['doing']}"
        lines += ["", head + (f" for {process['seconds']:.1f} s" if process["seconds"] is not None else "")]
        lines += [f"    {line}" for line in (process["stack"] or "no stack").splitlines()]
    return "\n".join(lines)


class Inquiry:
    """Asks every process for its stacks, and answers once they are there; never waits."""

    def __init__(self, situation: Situation, fleet: Fleet, answer: Callable[[Facts], None]) -> None:
        self._situation, self._answer = situation, answer
        self._zygote_pid = fleet.zygote.pid
        self._logs = [(path, _size(path)) for path in [*map(fleet.log_of, fleet.processes), fleet.log_of(None)]]
        self._due = time.monotonic() + DUMP_SECONDS
        with contextlib.suppress(ProcessError):
            for process in fleet.processes:
                fleet.dump(process)
            fleet.zygote.dump_own()

    def answered(self, now: float) -> bool:
        """Whether it is done with."""
        if now < self._due:
            return False
        room = min(MAX_STACK_CHARS, MAX_STACKS_CHARS // len(self._logs))
        *stacks, zygotes = (_appended(path, size)[:room] for path, size in self._logs)
        others = [
            {"name": "zygote", "pid": self._zygote_pid, "doing": "waiting for orders", "seconds": None, "stack": zygotes},
            {"name": "supervisor", "pid": os.getpid(), "doing": "answering this", "seconds": None, "stack": _own_stacks()[:room]},
        ]
        self._answer(report(self._situation, stacks, others))
        return True


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _appended(path: Path, size: int) -> str:
    """What a log got since, from the first stack on."""
    try:
        with path.open("rb") as file:
            file.seek(size)
            text = file.read(1 << 20).decode(errors="replace")
    except OSError:
        return ""
    begins = [at for mark in ("Thread 0x", "Current thread 0x") if (at := text.find(mark)) >= 0]
    return text[min(begins) :].rstrip() if begins else ""


def _own_stacks() -> str:
    """Other threads of this process; the one that answers is only here because it was asked."""
    me, parts = threading.get_ident(), []
    for thread, frame in sys._current_frames().items():
        head = "main thread" if thread == threading.main_thread().ident else f"thread {thread:#x}"
        parts.append(head + (" (this one)\n" if thread == me else "\n") + "".join(traceback.format_stack(frame)[-8:]))
    return "\n".join(parts)
