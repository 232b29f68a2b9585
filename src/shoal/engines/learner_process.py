"""A learner's process: the supervisor's orders on one side, the learner, and the others where there are several, on the other."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shoal.engines.beginning import IDLE_SECONDS, attach, receive_setup
from shoal.engines.keeping import hand_over, keep, keep_replay, load_kept, load_kept_replay
from shoal.engines.messages import to_json
from shoal.engines.saving import load_learner, save_learner
from shoal.experience.envelope import Identity
from shoal.experience.replay_memory import OWN, KeptMemory, Memory
from shoal.learners.distributed import TorchRanks, file_store, meet, network_store
from shoal.learners.learner import Learner, Unpublished, WeightPublisher
from shoal.learners.replay_learner import ReplayLearner
from shoal.supervision.channel import Channel, wait
from shoal.supervision.trace import Span
from shoal.supervision.zygote_main import ChildContext
from shoal.types import Activity


class LearnerProcess:
    """Serves a learner. Of several, all train, and the first speaks for them: it publishes, and tells of what they made together. All save their part.

    consumes    {"do": "train" | "save" | "stop", ...}
    waits for   the supervisor's next order; in an update, for the other learners
    unblocked   by an order, or by the end of the supervisor; by the other learners
    on failure  a ShoalError is told; anything else ends the process, and the supervisor starts another from the last checkpoint. Of several:
                all of them, from what the first kept after the last update that it told of
    """

    def __init__(self, context: ChildContext) -> None:
        self._channel: Channel = context.channel
        setup = receive_setup(context.channel)
        self._blueprint, ring, board, self._heart, self._trace = attach(context, setup)
        config, kept, meeting = self._blueprint.config, setup["kept"], setup.get("meeting")
        torch.set_num_threads(config.learner.threads)
        self._first, self._several = context.index == 0, config.learners > 1
        if self._several and self._blueprint.device().type == "cuda":
            torch.cuda.set_device(context.index % torch.cuda.device_count())  # one for each, on one machine (Blueprint.check_algorithm)
        if self._first and kept is None:  # else actors are reading it
            board.reset()
        publisher: WeightPublisher = board if self._first else Unpublished(self._blueprint.layout(self._blueprint.policy()).size)
        memory = self._memory(context.memory_fds[5:], kept)
        self._learner: Learner = self._blueprint.learner(ring, publisher, setup["max_policy_lag"], self._heart, memory)
        reads = self._first or meeting is None  # what they go on from, which lies on the driver's machine
        if self._several:
            ranks = self._meet(context, meeting)
            self._learner.join(ranks)
            if reads:
                self._kept = (context.memory_fds[3], context.memory_fds[4])
        if kept is not None and reads:
            load_kept(self._learner, self._kept, kept)  # it was published before it was told
            if isinstance(self._learner, ReplayLearner):
                load_kept_replay(self._learner.replay, self._kept_replay, kept)
        if kept is None and reads and setup["checkpoint"] is not None:
            load_learner(self._learner, Path(setup["checkpoint"]), config.learners, replay=setup["replay_whole"])
        if meeting is not None:
            hand_over(self._learner, ranks, self._blueprint.build_facts())
        if kept is None:
            if isinstance(self._learner, ReplayLearner):
                self._learner.replay.begin(self._learner.version)
            if self._several:
                self._keep_and_agree()
            self._learner.publish()
        if self._several:
            ranks.recorder = self._heart
        self._say({"is": "ready", "version": self._learner.version})

    def _memory(self, fds: Sequence[int], kept: int | None) -> Memory:
        """Where its replay lies: where there are several, in files that outlive it."""
        if not fds:
            return OWN
        memory = KeptMemory(fds[0], fds[1])
        self._kept_replay = (fds[2], fds[3])
        if kept is None:
            memory.clear()
        return memory

    def _meet(self, context: ChildContext, meeting: dict[str, Any] | None) -> TorchRanks:
        """Find the other learners; meeting: where, if they may be on other machines (engines/ray_learners.py)."""
        size, device, seconds = self._blueprint.config.learners, self._blueprint.device(), self._blueprint.config.learner.timeout_seconds
        if meeting is not None:
            listening = context.memory_fds[2] if self._first else None
            store = network_store(meeting["address"], meeting["port"], size, seconds, listening)
            return meet(store, context.index, size, timeout_seconds=seconds, address=meeting["own"])
        return meet(
            file_store(context.memory_fds[2], size),
            context.index,
            size,
            timeout_seconds=seconds,
            device=torch.device("cuda", context.index) if device.type == "cuda" else None,
        )

    def _keep_and_agree(self) -> None:
        """Once this returns all are at the same version, and each has kept what it would go on from."""
        learner = self._learner
        if isinstance(learner, ReplayLearner):
            keep_replay(learner.replay, self._kept_replay, learner.version)
        learner.agree()
        if self._first:
            keep(learner, self._kept)

    def run(self) -> None:
        while True:
            self._heart.enter(Activity.WAITING_FOR_BATCH)
            order = self._next()
            if order["do"] == "stop":
                return
            if order["do"] == "train":
                self._train([(slot, Identity(*identity)) for slot, identity in order["rollouts"]], order["optimizer_steps"])
            else:
                self._heart.enter(Activity.SAVING)
                self._save(Path(order["path"]), None if order["previous"] is None else Path(order["previous"]))

    def _save(self, path: Path, previous: Path | None) -> None:
        try:
            save_learner(self._learner, path, self._blueprint, previous)
        except OSError as error:
            self._say({"is": "not_saved", "message": f"{error.strerror or error} ({error.filename or path})"})
        else:
            self._say({"is": "saved", "weights_sha256": self._learner.weights_sha256 if self._first else ""})

    def _train(self, orders: list[tuple[int, Identity]], optimizer_steps: int) -> None:
        self._heart.enter(Activity.LEARNING)
        begun = time.monotonic()
        self._trace.begin(Span.CONSUME)
        consumed = self._learner.consume(orders)
        self._trace.end(len(orders))
        dropped = [[list(i), int(fate)] for i, fate in consumed.dropped.items()]
        if not self._several:
            self._say({"is": "consumed", "dropped": dropped})
        metrics: dict[str, float] = {}
        if consumed.groups or optimizer_steps:
            self._trace.begin(Span.UPDATE)
            metrics = self._learner.update(consumed, optimizer_steps)
            self._trace.end(self._learner.version)
            metrics["update_seconds"] = time.monotonic() - begun
        trained = {"is": "trained", "version": self._learner.version, "metrics": metrics}
        if self._several:
            if metrics:
                self._keep_and_agree()
            else:
                self._learner.agree()
            trained["dropped"] = dropped  # no slot is free before all have made the update: should one be lost, it is made again
        if self._first:
            self._say(trained)

    def _next(self) -> dict[str, Any]:
        while True:
            message = self._channel.receive()
            if message is not None:
                return json.loads(message)  # type: ignore[no-any-return]
            wait([self._channel], IDLE_SECONDS)

    def _say(self, facts: dict[str, Any]) -> None:
        while not self._channel.send(to_json(facts)):
            wait([], 0.01, writable=[self._channel])
