"""Everything that reads bytes which another process or a disk wrote, as functions of bytes that may raise nothing but the errors of their contract.

`test_decoders.py` gives them what hypothesis thinks of, `benchmarks/fuzz.py` what atheris finds by coverage. Each function leaves no file behind but
in the directory that it was made with, and a peak of memory that does not depend on any number within the bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
from safetensors.numpy import save

from rollout_fakes import RUN_ID, scripted_schema, scripted_spec, write_rollout
from shoal import files
from shoal.config import EnvConfig, PolicyConfig, RunConfig, StopConfig
from shoal.engines.actor_words import ActorWords
from shoal.engines.coordinator import Coordinator
from shoal.engines.fleet import Process
from shoal.engines.learner_words import LearnerWords
from shoal.engines.local import LocalEngine
from shoal.engines.messages import Kind as Told
from shoal.engines.messages import Word, from_json, to_json
from shoal.engines.node_report import NodeReport
from shoal.engines.plan import Plan
from shoal.engines.ray_fleet import RayFleet
from shoal.engines.ray_hearing import RemoteChannel
from shoal.engines.ray_learners import Brought, LearnerChannel
from shoal.engines.ray_node import ACTIVITY
from shoal.engines.ray_words import Frame, decode, encode, number_of
from shoal.engines.ray_words import Kind as NodeKind
from shoal.engines.running import Running
from shoal.engines.saves import Saves
from shoal.engines.session import Session
from shoal.engines.traffic import Counted, Traffic
from shoal.environments.spaces import describe
from shoal.errors import CheckpointError, RunError, SchemaError, ShoalError
from shoal.evaluation.bundle import load_policy, save_bundle
from shoal.experience.envelope import ENVELOPE, Identity
from shoal.experience.group_state import from_bytes, to_bytes
from shoal.experience.replay_memory import KeptMemory
from shoal.experience.ring import allocate
from shoal.files.manifest import manifest_bytes
from shoal.monitoring.words import event_words
from shoal.networks.policy import build_policy, named_tensors
from shoal.storage.lock import driver_of, parse_lock
from shoal.supervision.control import MAX_LINE_BYTES, NAME, ControlServer, ask
from shoal.supervision.heartbeat import RECORD, ActivityBoard
from shoal.supervision.memory import anonymous_file
from shoal.supervision.trace import open_trace
from shoal.types import CURSOR, GroupState

Decoder = Callable[[bytes], None]
LEARNER = number_of("learner", 1)


def word(content: bytes) -> None:
    """What an actor says."""
    with contextlib.suppress(ValueError):
        decoded = Word.decode(content)
        assert decoded.encode()[:1] == content[:1]
        assert isinstance(decoded.json, dict)


def json_message(content: bytes) -> None:
    """What the learner says."""
    with contextlib.suppress(ValueError):
        assert isinstance(from_json(content), dict)


def node_report(content: bytes) -> None:
    """What a node of a cluster says of itself."""
    with contextlib.suppress(ValueError):
        report = NodeReport.from_json(content)
        assert all(isinstance(text, str) for text in (report.host, report.error, *report.versions, *report.versions.values()))


def group_state(content: bytes) -> None:
    """What a group is put back from."""
    with contextlib.suppress(SchemaError):
        from_bytes(content)


def arrays(content: bytes) -> None:
    """A checkpoint's safetensors; also with a length in front that is right."""
    for given in (content, len(content).to_bytes(8, "little") + content):
        with contextlib.suppress(CheckpointError):
            files.arrays_from_bytes(given)


def store_lock(content: bytes) -> None:
    """Who has a run in a store, and who drove it last."""
    driver = parse_lock(content)
    if driver is not None:
        assert str(driver)
        assert driver.lives in (True, False)
    driver_of(content)
    files.run_named(content)


class NodeSays:
    """What a node says, as whole messages, as head and body of every kind of frame, and as what comes along with an actor's words: nothing is raised
    into the supervisor's loop but what a role says that it failed of, and no slot that is not leased is written. `lost` is why the node was given up by
    the last message, empty where it was not. `learner` lives there too."""

    def __init__(self, directory: Path) -> None:
        self.config = config = RunConfig(env=EnvConfig(id="x"), engine="ray", learners=2)
        self.directory = directory
        self.told: list[str] = []
        self.ring = allocate(scripted_schema(4, 2), 2)
        self.lost = ""
        self.fleet = RayFleet(config, None, directory, RUN_ID, "", lambda kind, **facts: self.told.append(kind))
        self.learner = self.fleet.learners[1]
        self.fleet._hearing.begin(self.ring, ActivityBoard.create(4))
        self.fleet._spread.ring = self.ring
        (directory / "logs").mkdir()

    def __call__(self, content: bytes) -> None:
        split = 1 + (content[0] if content else 0)
        messages = [[Frame(kind, of, 0, content[1:split], content[split:])] for kind in NodeKind for of in (0, LEARNER)]
        with contextlib.suppress(ValueError):
            messages.append(list(decode(content)))
        messages += [[Frame(NodeKind.WORD, head=each.encode())] for each in actor_words(content)]
        for frames in messages:
            self.heed(self.hear(frames))

    def heed(self, process: Process) -> None:
        """Have the supervisor of a run that is not young hear what the actor, who makes rollouts of its one group, and the learner said."""
        coordinator = Coordinator(Plan("async", 1, 2, 4, 1, 2, 2), scripted_spec(), self.ring, StopConfig())
        coordinator.place([0])
        for lease in coordinator.next_leases():
            write_rollout(self.ring.slots[lease.slot], lease.identity)
        observer: Any = SimpleNamespace(event=lambda kind, **facts: event_words(kind, {**facts, "json": json.dumps(facts)}))
        session = Session(self.config, scripted_spec(), coordinator, self.directory, observer, seconds_before=1e9)
        engine = LocalEngine(self.config, self.fleet, self.directory)
        engine._coordinator, engine._running = coordinator, Running(session, self.fleet)
        engine._actor_words = ActorWords(engine._running)
        engine._learner_words = LearnerWords(
            engine._running, Saves(session, lambda order: None, open_trace("", "supervisor")), lambda order: None
        )
        try:
            for each in (process, self.learner):
                with contextlib.suppress(ShoalError):
                    engine._hear(each)
            coordinator.ledger.check()
        finally:
            shutil.rmtree(self.directory / "faults", ignore_errors=True)
            self.ring._buffer[:] = 0

    def hear(self, frames: list[Frame], lease: tuple[int, Identity] | None = None) -> Process:
        """Have an actor live on a new node, with a lease or none, beside a learner, and hear these frames of that node."""
        fleet, nodes, hearing, process = self.fleet, self.fleet._nodes, self.fleet._hearing, Process("actor", 0)
        link: Any = _Link(frames)
        channel = RemoteChannel(link, 0, 0, hearing.leases)
        hearing.forget()
        process.channel, fleet.actors = channel, [process]
        self.learner.channel = LearnerChannel(link, LEARNER, 0, self.ring, Brought())
        nodes.links, hearing.events = {"far": link}, []
        nodes.homes.update({0: link, LEARNER: link})
        for kept in (nodes.gone, nodes._leaving, hearing._clocks):
            kept.clear()
        if lease is not None:
            channel.send(Word(Told.LEASE, *lease).encode())
        before = self.ring._buffer.copy()
        fleet._take_in(link)
        hearing._board.records()
        self.lost = link.lost
        assert bool(self.lost) == ("far" not in nodes.links)
        assert lease is not None or (np.array_equal(self.ring._buffer, before) and not hearing.arrived)
        return process


def actor_words(content: bytes) -> list[Word]:
    """Words that come along with these bytes, or with a true fault of which these are the report, or a part."""
    bodies = [content]
    with contextlib.suppress(ValueError, RecursionError):
        given, fault = json.loads(content), true_fault()
        bodies += [to_json({**fault, "report": given})]
        if isinstance(given, dict):
            bodies += [to_json({**fault, **given}), to_json({**fault, "report": {**fault["report"], **given}})]
    kinds = (Told.FAULT, Told.RESTORED, Told.FILLED, Told.LEASE)
    return [Word(kind, 0, Identity(0, of, 0), 0, body) for body in bodies for kind in kinds for of in (0, 7)]


def true_fault() -> dict[str, Any]:
    """What an actor says where an environment of a paced group hangs."""
    report = {"kind": "hang", "env": 1, "row": 2, "step": 3, "seed": 7, "paced": [0, 2]}
    return {"error": "EnvironmentFault", "message": "it hangs", "report": report, "traceback": "a line"}


class _Link:
    """To a node that says these frames, without threads. Takes the part of a `NodeLink`."""

    def __init__(self, frames: list[Frame]) -> None:
        self.name, self.own, self.lost, self.node, self.env_steps = "far", False, "", self, 0
        self.traffic = Traffic(self.name, Counted(), Counted(), 0)
        self._frames = frames

    def take(self) -> list[Frame]:
        frames, self._frames = self._frames, []
        return frames

    def post(self, frame: Frame) -> None: ...
    def close(self) -> None: ...
    def end(self) -> None: ...


class Envelope:
    """A finished rollout whose header, and then whose every byte, is overwritten: nothing beyond the slot is touched, and it is refused or taken."""

    def __init__(self) -> None:
        self._schema = scripted_schema(4, 2)

    def __call__(self, content: bytes) -> None:
        plan = Plan("sync", 1, 2, 4, 1, 0, 1)
        ring = allocate(self._schema, 1)
        coordinator = Coordinator(plan, scripted_spec(), ring, StopConfig())
        coordinator.place([0])
        (lease,) = coordinator.next_leases()
        slot = ring.slots[0]
        write_rollout(slot, lease.identity)
        begin = ENVELOPE.fields["policy_id"][1]  # type: ignore[index]  # schema and run are right: those are compared first
        header = slot.arrays["envelope"].reshape(1).view(np.uint8)
        written = np.frombuffer(content[: len(header) - begin], np.uint8)
        header[begin : begin + len(written)] = written
        rest = np.frombuffer(content[len(written) :], np.uint8)
        target = slot.arrays["episode"].reshape(-1).view(np.uint8)
        target[: len(rest)] = rest[: len(target)]
        with contextlib.suppress(SchemaError, ValueError):
            slot.check(RUN_ID)
        with contextlib.suppress(SchemaError, ValueError):
            coordinator.filled(0, lease.identity)
            coordinator.next_batch()


def journal(content: bytes) -> None:
    """What a learner that was killed left of its replay's journal; also with a length in front that is right."""
    for head in (content[:16], (0).to_bytes(8, "little") + (max(0, len(content) - 16)).to_bytes(8, "little")):
        fds = anonymous_file("rows"), anonymous_file("journal")
        try:
            memory = KeptMemory(*fds)
            memory.array((4, 2), "float32")
            os.pwrite(fds[1], head + content[16:], 0)
            with contextlib.suppress(ValueError):
                memory.back_to(0)
        finally:
            for fd in fds:
                os.close(fd)


class Control:
    """The control socket's requests, and the answers that `ask` reads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._server = ControlServer(directory)

    def __call__(self, content: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(self._directory / NAME))
            client.setblocking(False)
            with contextlib.suppress(OSError):
                client.send(content + b"\n")
            for request, reply in [*self._server.receive(), *self._server.receive()]:
                assert isinstance(request["command"], str)
                reply({"ok": True})
        self._server.receive()
        for connected in self._server._clients:
            assert len(connected.pending) <= MAX_LINE_BYTES

    def close(self) -> None:
        self._server.close()


class Answer:
    """What `ask` is answered by somebody who is no run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(directory / NAME))
        self._listener.listen(8)

    def __call__(self, content: bytes) -> None:
        import threading

        def answer() -> None:
            connection, _ = self._listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(4096)
                connection.sendall(content.replace(b"\n", b"") + b"\n")

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            with contextlib.suppress(RunError):
                assert isinstance(ask(self._directory, {"command": "state"}, 5.0), dict)
        finally:
            thread.join()

    def close(self) -> None:
        self._listener.close()


class Manifest:
    """A checkpoint's manifest: as bytes, and as JSON whose hash of itself is right."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "update-000000001"
        self._path.mkdir()
        (self._path / "state.json").write_text("{}")

    def __call__(self, content: bytes) -> None:
        manifests = [content]
        with contextlib.suppress(ValueError, RecursionError):
            manifests.append(manifest_bytes(json.loads(content)))
            manifests.append(manifest_bytes({"format": files.FORMAT, "update": 1, "files": json.loads(content)}))
            manifests.append(manifest_bytes({"format": files.FORMAT, "update": 1, "files": {}, "run": json.loads(content)}))
        for manifest in manifests:
            (self._path / files.MANIFEST).write_bytes(manifest)
            with contextlib.suppress(CheckpointError):
                loaded = files.load_checkpoint(self._path)
                assert all((self._path / name).is_file() for name in loaded.files)


class Bundle:
    """`policy.json`: parts of a true one replaced by the JSON given. Weights that are not there are not allocated."""

    def __init__(self, directory: Path) -> None:
        self._path = directory
        spec = describe("x", gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32), gymnasium.spaces.Discrete(3))
        config = PolicyConfig(hidden_sizes=[4])
        tensors = {name: tensor.detach().numpy() for name, tensor in named_tensors(build_policy(spec, config)).items()}
        save_bundle(directory, tensors, spec, config, EnvConfig(id="x"))
        self._true = json.loads((directory / "policy.json").read_text())

    def __call__(self, content: bytes) -> None:
        try:
            given = json.loads(content)
        except (ValueError, RecursionError):
            given = None
        candidates = [content]
        if given is not None:
            for part in ("spec", "policy", "env"):
                changed = {**self._true[part], **given} if isinstance(given, dict) else given
                candidates.append(json.dumps({**self._true, part: changed}).encode())
        for candidate in candidates:
            (self._path / "policy.json").write_bytes(candidate)
            with contextlib.suppress(CheckpointError):
                load_policy(self._path)


def decoders(directory: Path) -> dict[str, Decoder]:
    """All of them by name. `directory` is emptied first."""
    shutil.rmtree(directory, ignore_errors=True)
    places = {name: directory / name for name in ("control", "answer", "manifest", "bundle", "node")}
    for place in places.values():
        place.mkdir(parents=True)
    return {
        "word": word,
        "json message": json_message,
        "node report": node_report,
        "node says": NodeSays(places["node"]),
        "group state": group_state,
        "safetensors": arrays,
        "store lock": store_lock,
        "envelope": Envelope(),
        "journal": journal,
        "control": Control(places["control"]),
        "answer": Answer(places["answer"]),
        "manifest": Manifest(places["manifest"]),
        "bundle": Bundle(places["bundle"]),
    }


def learner_words() -> list[dict[str, object]]:
    """What a learner on a node truly says."""
    return [
        {"is": "ready", "version": 3},
        {"is": "saved", "weights_sha256": ""},
        {"is": "not_saved", "message": "No space left on device (x)"},
        {"is": "failed", "error": "LearnersError", "message": "no", "report": {}, "traceback": ""},
    ]


def node_messages() -> list[bytes]:
    """What a node truly says."""
    facts: list[dict[str, object]] = [
        {"is": "lost", "reason": "it is gone"},
        {"is": "forked", "pid": 7},
        {"is": "exited", "pid": 7, "status": 9, "error": ""},
        {"is": "exited", "pid": 0, "status": None, "error": "could not be started"},
    ]
    doing = ACTIVITY.pack(0, b"S") + bytes(RECORD.itemsize)
    frames = [
        *(Frame(NodeKind.HAPPENED, head=to_json(each)) for each in facts),
        Frame(NodeKind.PARTIAL, head=bytes(4), body=bytes(300)),
        Frame(NodeKind.ACTIVITIES, head=bytes(8), body=doing),
        Frame(NodeKind.LOG, body=b"a line"),
        Frame(NodeKind.LEAVING, head=b"SIGTERM"),
        Frame(NodeKind.WORD, head=Word(Told.FILLED).encode(), body=bytes(300)),
        Frame(NodeKind.WORD, head=Word(Told.RESTORED, value=1, body=to_json({"seconds": 0.5})).encode()),
        Frame(NodeKind.WORD, head=Word(Told.FAULT, body=to_json(true_fault())).encode()),
        *(Frame(NodeKind.SAID, LEARNER, head=to_json(each)) for each in learner_words()),
    ]
    return [encode([frame]) for frame in frames]


def examples() -> dict[str, list[bytes]]:
    """Whole ones, from which a fuzzer begins."""
    state = GroupState(np.zeros(2, CURSOR), [np.zeros((3,), np.int64)] * 2, [b"snapshot", None], {})
    manifest = {"format": files.FORMAT, "update": 1, "files": {"state.json": {"bytes": 2, "sha256": "44136fa3"}}}
    return {
        "word": [Word.decode(bytes([17]) + bytes(31)).encode(), bytes([19]) + bytes(31) + b'{"error": "x", "report": {}}'],
        "json message": [b'{"is": "trained", "version": 3, "metrics": {"loss": 0.5}}'],
        "node report": [b'{"host": "far", "versions": {"python": "3.11.4", "torch": ""}, "error": "env.id mine:Env: no"}'],
        "node says": [
            *node_messages(),
            b'{"seconds": 1.5}',
            to_json(true_fault()),
            b'{"env": 9, "row": 2, "step": null, "seed": "7", "paced": [1]}',
            b'{"kind": ["hang"], "message": "\\ud800", "last_action": [[0.5], {"a": 1}], "traceback": {}}',
        ],
        "group state": [
            to_bytes(state),
            save({"cursor": np.zeros(3, np.uint8)}),
            save({"cursor": np.zeros((2, CURSOR.itemsize), np.uint8)}),
        ],
        "safetensors": [to_bytes(state)],
        "store lock": [b'{"token": "a", "host": "b", "pid": 1, "place": "", "since": 1e9, "renewed": 1e9}', b'{"parts": 1, "driver": "a"}'],
        "envelope": [bytes(200), b"\xff" * 400],
        "journal": [np.array([0, 56, 1, 2, 0, 1, 3, 0, 0], np.int64).tobytes()],
        "control": [b'{"command": "scale", "actors": 4}', b'{"command": "state"}\n{"command": "stop"}'],
        "answer": [b'{"ok": true, "state": {}}', b'{"ok": false, "error": "no"}'],
        "manifest": [manifest_bytes(manifest), json.dumps(manifest).encode(), json.dumps(manifest["files"]).encode()],
        "bundle": [
            b'{"hidden_sizes": [1000000, 1000000]}',
            b'{"action": {"path": [], "kind": "discrete", "dtype": "int64", "shape": [], "nvec": [9]}}',
        ],
    }
