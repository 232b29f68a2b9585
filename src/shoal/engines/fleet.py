"""The processes of a local run, as the supervisor sees them: how they are started, ended, counted, and what they share.

Nothing is decided here; local.py decides. No torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from shoal.config import MAX_ACTORS, RunConfig
from shoal.engines.errors_told import rebuild_error
from shoal.engines.messages import Word, place_of, to_json
from shoal.engines.plan import Plan
from shoal.engines.process import Death, Process, close_all, flush, tell, tell_with_file, words
from shoal.engines.question import Question, stack_of
from shoal.engines.snippets import with_snippet
from shoal.engines.traffic import Delivery
from shoal.errors import EnvironmentFault, ProcessError
from shoal.experience.ring import Ring
from shoal.experience.schema import Schema
from shoal.supervision.channel import Channel, HasFileno, wait
from shoal.supervision.heartbeat import ActivityBoard
from shoal.supervision.memory import SharedMemory, anonymous_file
from shoal.supervision.processes import process_state, stopped_itself
from shoal.supervision.zygote import Event, Exited, Forked, Logs, Lost, Ready, Zygote, wait_until_ready
from shoal.types import ActivityRecord
from shoal.weights.board import WeightBoard

__all__ = ["Death", "Fleet", "Process", "flush", "tell", "tell_with_file", "words"]  # the second half for a cluster's fleet and nodes

START_SECONDS = 120.0  # the zygote's imports, on a slow disk
STOP_SECONDS = 10.0
POLL_SECONDS = 0.25
MAX_TRACE_LINES = 80
_PRELOAD = ["torch", "gymnasium", "shoal.engines.mains"]
_REPLAY_FILES = ("rows", "journal", "state-0", "state-1")  # of what a learner samples from: experience/replay_memory.py, keeping.py


class Fleet:
    """Learners, any number of actors, an inference server or none, the zygote they come from and the memory they share."""

    def __init__(self, config: RunConfig, pickled: bytes | None, directory: Path, run_id: bytes, traces: str = "") -> None:
        self._config, self._pickled, self._directory = config, pickled, directory
        self._common: dict[str, Any] = {"run_id": run_id.hex(), "num_roles": 1 + config.learners + MAX_ACTORS, "traces": traces}
        self._zygote: Zygote | None = None
        self._own_logs: Logs | None = None  # each process writes its own
        self._memory: SharedMemory | None = None
        self._activities: ActivityBoard | None = None
        self.learners = [Process("learner", index) for index in range(config.learners)]
        self._kept: list[int] = []  # descriptors of several learners' memory (engines/keeping.py)
        self._kept_replays: list[list[int]] = []  # of what each of them samples from: _REPLAY_FILES
        self._meeting: list[int] = []  # of the file through which those that are up found each other
        self.actors: list[Process] = []
        self.inference: Process | None = None  # where one process chooses the actions of all actors

    @property
    def learner(self) -> Process:
        """The first: it publishes, saves, and answers for all."""
        return self.learners[0]

    @property
    def processes(self) -> list[Process]:
        return [*self.learners, *self.actors, *([] if self.inference is None else [self.inference])]

    # ---- start and end -------------------------------------------------------------------------------------------
    def open(self) -> None:
        """Start the helper process; its imports go on while this one does other things."""
        (self._directory / "logs").mkdir(parents=True, exist_ok=True)
        payload = {"config": self._config.model_dump(mode="json", by_alias=True)}
        log_path = self._directory / "logs" / "zygote.log"
        self._zygote = Zygote.start(payload, self._pickled, _PRELOAD, log_path=log_path, logs=self._own_logs)

    def reopen(self) -> None:
        """The zygote is gone, and every role with it: start another."""
        for process in self.processes:
            process.ended()
        self.open()
        wait_until_ready(self.zygote, START_SECONDS)

    def close(self) -> None:
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None
        for process in self.processes:
            process.ended()
        for memory in (self._memory, self._activities):
            if memory is not None:
                memory.close()
        close_all([*self._kept, *self._meeting, *chain.from_iterable(self._kept_replays)])
        self._kept, self._meeting, self._kept_replays = [], [], []

    @property
    def zygote(self) -> Zygote:
        if self._zygote is None:
            raise ProcessError("the engine is not open")
        return self._zygote

    def allocate(self, schema: Schema, plan: Plan, weights: int) -> Ring:
        """The memory that all roles share, and the places of actors and inference: what there is of them is final now."""
        self.inference = Process("inference", 0) if self._config.policy.inference == "server" else None
        self.actors = [Process("actor", i) for i in range(self._config.actors or 0)]
        ring_bytes = -(-Ring.size_bytes(schema, plan.num_slots) // 4096) * 4096
        memory_bytes = ring_bytes + WeightBoard.size_bytes(weights)
        self._common |= {"ring_bytes": ring_bytes, "memory_bytes": memory_bytes, "num_slots": plan.num_slots}
        self._memory = SharedMemory.create(memory_bytes)
        self._activities = ActivityBoard.create(self._common["num_roles"])
        self._kept = [anonymous_file("shoal-kept") for _ in range(2 if len(self.learners) > 1 else 0)]
        if plan.rate is not None and len(self.learners) > 1:
            self._kept_replays = [[anonymous_file(f"shoal-replay-{name}") for name in _REPLAY_FILES] for _ in self.learners]
        return Ring(schema, plan.num_slots, self._memory.buffer[:ring_bytes])

    def activities(self) -> list[ActivityRecord]:
        """What every role does now, in the order of `processes`."""
        board = self._activities
        assert board is not None
        return [board.record(place_of(process.name, process.index, board.num_roles)) for process in self.processes]

    # ---- one look at the environment, in a process of its own ------------------------------------------------------
    def look(self) -> dict[str, Any]:
        """Spec and sizes (engines/looking.py); an environment that crashes or hangs there harms nobody."""
        wait_until_ready(self.zygote, START_SECONDS)
        question = Question(self.zygote, self._config.env.id, self._config.env.step_timeout_seconds, self._directory / "logs")
        try:
            facts = question.ask("shoal.engines.mains:probe_main", "probe")
            if "error" in facts:
                raise rebuild_error(facts)
            return facts
        except EnvironmentFault as fault:
            raise with_snippet(fault, self._config, self._directory, {0: question.played.episodes}) from None

    def evaluate(self, path: Path) -> dict[str, Any]:
        """Have the policy of a checkpoint play `evaluation.episodes` episodes in a process of its own (mains.evaluator_main).

        Raises:
          EnvironmentFault: an environment hung, or ended that process, or broke its contract. ProcessError: the process was lost otherwise.
        """
        limit_seconds = self._config.env.step_timeout_seconds
        question = Question(self.zygote, self._config.env.id, limit_seconds, self._directory / "logs")
        order = {"path": str(path), **self._config.evaluation.model_dump()}
        try:
            facts = question.ask("shoal.engines.mains:evaluator_main", "evaluator", order)
        except EnvironmentFault as fault:
            if question.played.call:
                raise
            raise ProcessError(f"the evaluation was lost: {fault}; the run is whole, `shoal evaluate` plays it again") from fault
        if "error" in facts:
            raise rebuild_error(facts)
        return facts

    # ---- roles -----------------------------------------------------------------------------------------------------
    def start(self, process: Process, setup: dict[str, Any], encode: Callable[[bytes], bytes] = lambda body: body) -> None:
        """Fork a role and send it its set-up; `encode` wraps the JSON as that role expects its first message.

        Raises OSError, and starts nothing, where there are no descriptors for it.
        """
        assert self._memory is not None
        assert self._activities is not None
        config = self._config.model_dump(mode="json", by_alias=True)
        memory_fds = (self._memory.fd, self._activities.fd, *(self._to_meet(process.index) if process.name == "learner" else ()))
        with os.fdopen(anonymous_file("shoal-setup"), "wb") as file:  # the bounds of a large space are more than a message holds
            file.write(to_json({"config": config, **self._common, **setup}))
            file.flush()
            ours, theirs = Channel.pair()
            process.channel, process.ready, process.doomed, process.pid = ours, False, "", 0
            process.asked_at = process.told_at = time.monotonic()
            target = f"shoal.engines.mains:{process.name}_main"
            self.zygote.fork(target, process.name, process.index, process.incarnation, theirs, memory_fds)
            with suppress(EOFError):  # it was killed already; its death is told by `happened`
                ours.send_with_fds(encode(b"{}"), [file.fileno()])

    def _to_meet(self, index: int) -> list[int]:
        """What several learners get more: the file through which those meet that are started together, and what they go on from: all, and each."""
        if len(self.learners) == 1:
            return []
        if not any(learner.up for learner in self.learners):
            close_all(self._meeting)
            self._meeting = []
            self._meeting = [anonymous_file("shoal-meeting")]
        return [*self._meeting, *self._kept, *(self._kept_replays[index] if self._kept_replays else ())]

    def end_learners(self, why: str) -> list[Death | Lost]:
        """Kill the learners that are left and wait until all are reaped; no other role is touched. Returns what else happened meanwhile."""
        others: list[Death | Lost] = []
        deadline = time.monotonic() + STOP_SECONDS
        for learner in self.learners:
            self.kill(learner, why)
        while any(learner.up for learner in self.learners):
            if time.monotonic() > deadline:
                raise ProcessError("a learner could not be ended; see `ps` for a process in uninterruptible sleep")
            self.zygote.wake()
            wait(self.sources(), POLL_SECONDS)
            for event in self.happened():
                if isinstance(event, Lost):
                    return [*others, event]
                if event.process in self.learners:
                    event.process.ended()
                else:
                    others.append(event)
        return others

    def kill(self, process: Process, why: str) -> None:
        """SIGKILL; its death is told by `happened`."""
        if process.doomed or not process.up:
            return
        process.doomed, process.doomed_at = why, time.monotonic()
        if process.pid:
            self.zygote.kill(process.pid)

    def collect(self, actor: Process, word: Word, newest_version: int) -> None:
        """The rollout that a word tells of is in its slot: shared memory needs nothing for that."""

    def push(self) -> None:
        """Let what actors were told go at once: on a single machine it has gone."""

    def network(self) -> dict[str, Any]:
        """What crossed a network (engines/traffic.py): nothing on a single machine."""
        return {}

    def delivery_of(self, process: Process) -> Delivery | None:
        """What a role is told, where that has been on its way for long: nothing on a single machine."""
        return None

    def renew(self) -> bool:
        """Whether actors came or went since the last call, or places for them; on a single machine only `scale` does that."""
        return False

    @property
    def living(self) -> list[Process]:
        """The actors that are to be there."""
        return [actor for actor in self.actors if not actor.retired]

    @property
    def room(self) -> int:
        """Actors that there is room for."""
        return MAX_ACTORS

    def scale(self, actors: int) -> None:
        """Go on with this many: others come at the end, or those at the end retire."""
        self.actors += [Process("actor", index) for index in range(len(self.actors), actors)]
        for actor in self.actors:
            actor.retired = actor.index >= actors

    def by_node(self) -> dict[str, int]:
        """How many actors are to be on each node of a cluster, by its name."""
        return {}

    def flush(self, process: Process) -> None:
        flush(process)

    def listen(self, timeout_seconds: float, also: Sequence[HasFileno] = ()) -> list[HasFileno]:
        """Wait for a word of any role, for the zygote, or for `also`; returns the channels that have something."""
        for process in self.processes:
            flush(process)
        channels: list[HasFileno] = [p.channel for p in self.processes if p.channel is not None]
        return wait([*channels, self.zygote, *also], timeout_seconds)

    def sources(self) -> list[HasFileno]:
        """What is ready when somebody may have died."""
        return [self.zygote]

    def happened(self) -> list[Death | Lost]:
        """Deaths since the last call, or the loss of the zygote and of everybody."""
        out: list[Death | Lost] = []
        for event in self.zygote.receive():
            if isinstance(event, Lost):
                out.append(event)
            elif not isinstance(event, Ready):
                out += self._of_role(event)
        return out

    def _of_role(self, event: Event) -> list[Death | Lost]:
        assert isinstance(event, (Forked, Exited))
        role = event.role
        process = next((p for p in self.processes if (p.name, p.index, p.incarnation) == (role.name, role.index, role.incarnation)), None)
        if process is None or not process.up:
            return []
        if isinstance(event, Forked):
            process.pid = event.pid
            if process.doomed:
                self.zygote.kill(event.pid)
            return []
        crashed = event.crashed and not process.doomed
        return [Death(process, event.describe(), process.doomed, crashed, self.activities()[self.processes.index(process)])]

    def stop_all(self, why: str) -> Lost | None:
        """Kill every role and wait until all are reaped: their slots are nobody's then. Returns what says that the zygote is lost."""
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.processes:
            self.kill(process, why)
        return self.wait_for_ends(deadline, strict=True)

    def give_up_nodes(self) -> bool:
        """Take nodes of a cluster for lost where somebody is up who was told to end, and say whether there are any; `happened` tells the deaths."""
        return False

    def wait_for_ends(self, deadline: float, strict: bool = False) -> Lost | None:
        """Until every role has ended, or the time (monotonic clock) is over. `strict`: then nodes are given up, and a role of this machine is an error."""
        while any(p.up for p in self.processes):
            if time.monotonic() > deadline and not (strict and self.give_up_nodes()):
                if strict:
                    raise ProcessError("a role could not be ended; see `ps` for a process in uninterruptible sleep")
                return None
            self.zygote.wake()
            wait(self.sources(), POLL_SECONDS)
            for event in self.happened():
                if isinstance(event, Lost):
                    return event
                event.process.ended()
        return None

    def state_of(self, process: Process) -> str | None:
        """The kernel's letter for it; None where it is not there."""
        return process_state(process.pid) if process.pid else None

    def stopped_itself(self, process: Process) -> bool:
        return stopped_itself(process.pid)

    def stack_of(self, process: Process) -> str:
        """The stacks of its threads (engines/question.py)."""
        return stack_of(process.pid, self.log_of(process))

    def dump(self, process: Process) -> None:
        """Have a role write its stacks into its log. Raises ProcessError where the zygote is gone."""
        if process.pid:
            self.zygote.dump(process.pid)

    def log_of(self, process: Process | None) -> Path:
        """A role's log; None: the zygote's."""
        return self._directory / "logs" / ("zygote.log" if process is None else f"{process.name}-{process.index}.log")

    def log_tail(self, process: Process, num_lines: int = 15) -> str:
        """The end of a role's log, for a message: its last traceback, whole, or the last lines."""
        path = self.log_of(process)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        begins = [at for at, line in enumerate(lines) if line.startswith(("Traceback (most recent call last)", "Fatal Python error"))]
        recent = begins[-1] if begins and len(lines) - begins[-1] <= MAX_TRACE_LINES else len(lines)
        tail = lines[min(recent, max(0, len(lines) - num_lines)) :]
        return (
            "\n".join([f"Its log ({path}) ends with:", *tail])
            if tail
            else f"Its log ({path}) is empty: a process that ends itself (os._exit) or is killed leaves no traceback."
        )
