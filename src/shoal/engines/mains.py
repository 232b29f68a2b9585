"""What the processes of a local run do from their first line to their last. The supervisor's side is local.py.

Each main builds its role from the SETUP that comes first on its channel, then serves its channel until STOP or the end of the
supervisor. A role that fails says why on its channel (FAULT, or an error object) before it exits; its log has the traceback.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shoal.actors.actor import Actor
from shoal.actors.behaviour import LocalPolicy, RemotePolicy
from shoal.algorithms import check_remembers, load_algorithm
from shoal.algorithms.ranks import LostRank
from shoal.config import RunConfig
from shoal.engines.beginning import IDLE_SECONDS, Stopped, attach, read_and_close, receive_setup, user_objects
from shoal.engines.inference import InferenceClient, InferenceServer, MailLayout
from shoal.engines.keeping import hand_over, keep, keep_replay, load_kept, load_kept_replay
from shoal.engines.messages import Kind, Word, to_json
from shoal.engines.question import Answerer
from shoal.engines.roles import Blueprint, UserObjects
from shoal.engines.saving import load_learner, save_learner
from shoal.engines.sizes import check_weights
from shoal.environments.faults import cut
from shoal.environments.probe import Tell, choose_form, probe, quiet
from shoal.errors import ConfigError, EnvironmentFault, ShoalError
from shoal.experience.envelope import Identity
from shoal.experience.group_state import from_bytes
from shoal.experience.replay_memory import OWN, KeptMemory, Memory
from shoal.experience.ring import Ring
from shoal.learners.distributed import TorchRanks, file_store, meet, network_store
from shoal.learners.learner import Learner, Unpublished, WeightPublisher
from shoal.learners.replay_learner import ReplayLearner
from shoal.networks.policy import policy_size
from shoal.supervision.channel import MAX_MESSAGE_BYTES, Channel, wait
from shoal.supervision.trace import Span
from shoal.supervision.zygote_main import ChildContext
from shoal.types import Activity
from shoal.weights.board import WeightBoard

_LOST_SECONDS = 5.0  # a learner that lost another one waits so long to be ended
_LONGEST_TEXT = 8_000  # of an error in a message: escaped, a character takes up to six bytes, and a message holds 160 KiB


def describe_error(error: BaseException) -> dict[str, Any]:
    """An error as the supervisor raises it again: class, message, report, traceback."""
    report = error.report if isinstance(error, EnvironmentFault) else {}
    trace = "".join(traceback.format_exception(error))
    return {
        "error": type(error).__name__,
        "message": cut(str(error), _LONGEST_TEXT),
        "report": {k: cut(v, _LONGEST_TEXT) if isinstance(v, str) else v for k, v in report.items()},
        "traceback": cut(trace, _LONGEST_TEXT),
    }


def encoded(facts: dict[str, Any]) -> bytes:
    """An error that fits into one message, whatever its report holds."""
    whole = json.dumps(facts, default=str).encode()
    if len(whole) <= MAX_MESSAGE_BYTES // 2:
        return whole
    return json.dumps({k: v for k, v in facts.items() if k != "report"} | {"report": {}}).encode()


# ---- probe -----------------------------------------------------------------------------------------------------------
def probe_main(context: ChildContext) -> int:
    """Make the environment and the policy once, and say what they look like."""
    answerer = Answerer(context.channel)
    try:
        config = RunConfig.model_validate(context.payload["config"])
        answer = look(config, user_objects(context), answerer.tell)
    except Exception as error:
        answer = describe_error(error)
    answerer.answer(answer)
    return 0


def look(config: RunConfig, objects: UserObjects, tell: Tell = quiet) -> dict[str, Any]:
    """Spec, form, and the sizes that memory is allocated from, as JSON."""
    found = probe(config.env, objects.env, tell=tell)
    tell("")
    blueprint = Blueprint(config, found.spec, objects, bytes(16))
    blueprint.device()
    blueprint.check_algorithm()
    if objects.network is None and config.policy.network is None:
        check_weights(
            policy_size(found.spec, config.policy, blueprint.network_kind),
            f"policy.hidden_sizes {config.policy.hidden_sizes} on this observation",
        )
    policy = blueprint.policy()
    blueprint.check_computing(policy)
    check_remembers(policy, config.algorithm.name, objects.algorithm or load_algorithm(config.algorithm.name))
    fields = [vars(f) | {"shape": list(f.shape)} for f in policy.fields()]
    form = choose_form(config.env, found)
    measured = {k: v for k, v in found.to_json().items() if k != "spec"}
    return {
        "spec": found.spec.to_json(),
        "fields": fields,
        "weights": blueprint.layout(policy).size,
        "form": form,
        "mode": chosen_mode(config, objects),
        "inference": blueprint.inference(policy),
        "measured": measured,
        "build": blueprint.build_facts(),
        "replay": None if blueprint.replay is None else blueprint.replay.model_dump(mode="json"),
        "rate": None if blueprint.rate is None else vars(blueprint.rate),
    }


def chosen_mode(config: RunConfig, objects: UserObjects) -> str:
    """The mode asked for, or the algorithm's first. Raises ConfigError where the algorithm has no such mode."""
    modes: tuple[str, ...] = (objects.algorithm or load_algorithm(config.algorithm.name)).modes
    mode = config.mode or modes[0]
    if mode not in modes:
        raise ConfigError(f"mode: {config.algorithm.name} runs in {' or '.join(modes)} mode, not {mode}")
    return mode


# ---- evaluator -------------------------------------------------------------------------------------------------------
def evaluator_main(context: ChildContext) -> int:
    """Play episodes with the policy of a checkpoint, and say how they went."""
    from shoal.evaluation import evaluate, load_policy

    answerer = Answerer(context.channel)
    try:
        while (message := context.channel.receive()) is None:
            wait([context.channel], IDLE_SECONDS)
        order, objects = json.loads(message), user_objects(context)
        policy = load_policy(Path(order["path"]), network=objects.network, environment=objects.env)
        answer = evaluate(policy, episodes=order["episodes"], seed=order["seed"], tell=answerer.tell_now_and_then)
    except EOFError:
        return 0
    except Exception as error:
        answer = describe_error(error)
    answerer.answer(answer)
    return 0


# ---- actor -----------------------------------------------------------------------------------------------------------
class _ActorProcess:
    """Serves one actor.

    consumes    LEASE, RESTORE, RELEASE, PUBLISHED, CONNECT, STOP
    waits for   words of the supervisor, when it holds no lease; where a server chooses the actions, its answers (engines/inference.py)
    unblocked   by a word, or by the end of the supervisor (its channel closes)
    on failure  an EnvironmentFault is reported as FAULT and the group released; anything else ends the process
    """

    def __init__(self, context: ChildContext) -> None:
        self._channel: Channel = context.channel
        setup = receive_setup(context.channel)
        self._blueprint, ring, board, self._heart, self._trace = attach(context, setup)
        self._client: InferenceClient | None = None
        self._behaviour: LocalPolicy | RemotePolicy = self._choose(ring, board)
        self._actor: Actor = self._blueprint.actor(ring, self._behaviour, context.index, context.incarnation, self._heart)
        self._close_after: int = setup["close_after_lag"]
        self._sync: bool = setup["sync"]
        self._work: deque[tuple[Word, bytes]] = deque()  # leases, restores and releases, in order
        self._newest = -1

    def _choose(self, ring: Ring, board: WeightBoard) -> LocalPolicy | RemotePolicy:
        if not self._blueprint.served:
            return self._blueprint.behaviour(board)
        policy = self._blueprint.policy()
        self._client = InferenceClient(MailLayout.of(ring.schema, policy), self._channel, self._listen)
        return self._blueprint.remote_behaviour(self._client, board, policy)

    def run(self) -> None:
        try:
            while True:
                self._listen(wait_for_work=not self._work)
                if self._work:
                    self._do(*self._work.popleft())
        except Stopped:
            self._actor.close()

    def _listen(self, wait_for_work: bool = False) -> None:
        """Take in every word that is there; with `wait_for_work`, wait until there is something to do."""
        if wait_for_work:
            self._heart.enter(Activity.WAITING_FOR_LEASE)
        while True:
            try:
                received = self._channel.receive_with_fds()
            except EOFError:
                raise Stopped from None
            if received is None:
                if not wait_for_work or self._work:
                    return
                wait([self._channel], IDLE_SECONDS)
                continue
            word = Word.decode(received[0])
            if word.kind is Kind.CONNECT:
                assert self._client is not None
                self._client.connect(received[1][0])
                continue
            state = b"".join(read_and_close(fd) for fd in received[1])
            if word.kind is Kind.STOP:
                raise Stopped
            if word.kind is Kind.PUBLISHED:
                self._newest = max(self._newest, word.value)
            else:
                self._work.append((word, state))

    def _do(self, word: Word, state: bytes) -> None:
        group = word.identity.group
        try:
            if word.kind is Kind.RESTORE:
                begun = time.monotonic()
                lost = self._actor.restore(group, from_bytes(state))
                self._say(Word(Kind.RESTORED, 0, word.identity, len(lost), to_json({"seconds": time.monotonic() - begun})))
            elif word.kind is Kind.RELEASE:
                self._actor.release(group)
            elif word.kind is Kind.LEASE and self._actor.hosts(group):  # else it crossed our FAULT, and is void
                self._fill(word)
        except EnvironmentFault as fault:
            if "paced" in fault.report:
                fault.report["traceback"] = _other_threads()
            self._say(Word(Kind.FAULT, word.slot, word.identity, 0, encoded(describe_error(fault))))
            self._work = deque(entry for entry in self._work if entry[0].identity.group != group)
            self._actor.release(group)  # said first: closing what is broken may hang

    def _fill(self, word: Word) -> None:
        if max(self._newest, word.value) > self._behaviour.version:
            self._refresh()
        if self._sync and self._behaviour.version != word.value:
            raise RuntimeError(f"the board holds version {self._behaviour.version}, the lease says {word.value}")
        special: dict[str, list[Any]] = word.json if word.body else {}
        give_up = [tuple(place) for name in ("give_up", "give_up_steps") for place in special.get(name, ())]
        self._trace.begin(Span.ROLLOUT)
        try:
            self._actor.fill(word.slot, word.identity, None if self._sync else self._between_rows, give_up, special.get("careful", ()))
        finally:
            self._trace.end(word.identity.group, word.identity.sequence)
        self._say(Word(Kind.FILLED, word.slot, word.identity))

    def _refresh(self) -> None:
        self._trace.begin(Span.REFRESH)
        self._trace.end(self._behaviour.refresh())

    def _between_rows(self, first_version: int) -> bool:
        self._listen()
        if self._newest > self._behaviour.version:
            self._refresh()
        return self._behaviour.version - first_version >= self._close_after

    def _say(self, word: Word) -> None:
        try:
            while not self._channel.send(word.encode()):
                wait([], 0.01, writable=[self._channel])
        except EOFError:
            raise Stopped from None


def _other_threads() -> str:
    """Where the threads of this process stand, but for the one that asks: one of them is in the step that hangs."""
    frames, mine = sys._current_frames(), threading.get_ident()
    return "\n".join("".join(traceback.format_stack(frame)) for ident, frame in frames.items() if ident != mine)


def actor_main(context: ChildContext) -> int:
    """An actor's process, see _ActorProcess. Waits for its set-up. Exits with 0 at STOP and where the supervisor is gone; what goes wrong with
    shoal itself is said as FAULT with value 1, and raised into its log."""
    try:
        _ActorProcess(context).run()
    except EOFError:
        return 0
    except ShoalError as error:
        context.channel.send(Word(Kind.FAULT, 0, Identity(0, 0, 0), 1, encoded(describe_error(error))).encode())
        raise
    return 0


# ---- learner ---------------------------------------------------------------------------------------------------------
class _LearnerProcess:
    """Serves a learner. Of several, all train, and the first speaks for them: it publishes, and tells of what they made together. All save their part.

    consumes    {"do": "train" | "save" | "stop", ...}
    waits for   the supervisor's next order; in an update, for the other learners
    unblocked   by an order, or by the end of the supervisor; by the other learners
    on failure  a ShoalError is told; anything else ends the process, and the supervisor starts another from the last checkpoint. Of several:
                all of them, from what the first kept after the last update that it told of
    """

    def __init__(self, context: ChildContext) -> None:
        import torch

        self._channel: Channel = context.channel
        setup = receive_setup(context.channel)
        self._blueprint, ring, board, self._heart, self._trace = attach(context, setup)
        config, kept, meeting = self._blueprint.config, setup["kept"], setup.get("meeting")
        torch.set_num_threads(config.learner.threads)
        self._first, self._several = context.index == 0, config.learners > 1
        if self._several and self._blueprint.device().type == "cuda":
            torch.cuda.set_device(
                context.index % torch.cuda.device_count()
            )  # on one machine there is one for each (Blueprint.check_algorithm)
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
            load_learner(self._learner, Path(setup["checkpoint"]), config.learners)
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
        import torch

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


def learner_main(context: ChildContext) -> int:
    """A learner's process, see _LearnerProcess. Waits for its set-up, and loads the checkpoint that it names. Exits with 0 at `stop` and where
    the supervisor is gone; a ShoalError is said as `failed`, and raised into its log, as everything else is."""
    # Sent to all processes of a run, as Ray does to those of a job that is stopped, it is a wish for a last checkpoint, which the supervisor hears.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _LearnerProcess(context).run()
    except EOFError:
        return 0
    except LostRank:
        time.sleep(_LOST_SECONDS)  # the supervisor knows who is gone, and ends this one; it is not to be taken for the one that died
        raise
    except ShoalError as error:
        context.channel.send(encoded({"is": "failed", **describe_error(error)}))
        raise
    return 0


# ---- inference -------------------------------------------------------------------------------------------------------
class _InferenceProcess:
    """Serves the inference server.

    consumes    {"do": "connect" | "stop", ...}, a descriptor comes with the first; questions of actors
    waits for   both
    unblocked   by either, or by the end of the supervisor
    on failure  as the server (engines/inference.py)
    """

    def __init__(self, context: ChildContext) -> None:
        self._channel: Channel = context.channel
        blueprint, ring, board, heart, trace = attach(context, receive_setup(context.channel))
        copy = blueprint.policy_copy(board)
        self._server = InferenceServer(
            copy,
            board,
            MailLayout.of(ring.schema, copy.policy),
            self._channel,
            self._listen,
            batches=blueprint.config.mode == "async",
            recorder=heart,
            trace=trace,
        )
        self._channel.send(to_json({"is": "ready"}))

    def run(self) -> None:
        with suppress(Stopped):
            while True:
                self._server.serve_once()

    def _listen(self) -> None:
        try:
            while (received := self._channel.receive_with_fds()) is not None:
                order = json.loads(received[0])
                if order["do"] == "stop":
                    raise Stopped
                self._server.connect(order["actor"], received[1][0])
        except EOFError:
            raise Stopped from None


def inference_main(context: ChildContext) -> int:
    """The inference server's process, see _InferenceProcess. Waits for its set-up, says `ready`, and ends as the learner's does."""
    try:
        _InferenceProcess(context).run()
    except EOFError:
        return 0
    except ShoalError as error:
        context.channel.send(encoded({"is": "failed", **describe_error(error)}))
        raise
    return 0
