"""The server that chooses for all actors, and those who ask it, over real channels and memory, in threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from rollout_fakes import scripted_spec
from shoal.actors.behaviour import PolicyCopy, RemotePolicy
from shoal.config import RunConfig
from shoal.engines import inference, roles
from shoal.engines.inference import InferenceClient, InferenceServer, MailLayout
from shoal.engines.replay import replay
from shoal.engines.roles import Blueprint, UserObjects
from shoal.errors import RunError
from shoal.supervision.channel import Channel
from shoal.supervision.trace import NullTrace
from shoal.types import Arrays, NullRecorder
from shoal.weights.board import WeightBoard

B, ROWS = 3, 5
WAIT_SECONDS = 300.0


class Ended(Exception):
    """The supervisor wants a role to end."""


class World:
    """A board with weights, blueprints, and as many servers and clients as asked for."""

    made: ClassVar[list[World]] = []

    def __init__(self, mode: str = "sync", mask: bool = True, memory: str = "none") -> None:
        World.made.append(self)
        self.roles: list[Server | Client] = []
        self.config = RunConfig(mode=mode, seed=3, device="cpu")
        self.config.sampling.group_size, self.config.sampling.rollout_length = B, ROWS
        self.config.policy.hidden_sizes, self.config.policy.inference = [16], "server"
        self.config.policy.memory, self.config.policy.memory_size = memory, 8
        self.blueprint = Blueprint(self.config, scripted_spec(mask), UserObjects(), bytes(16))
        policy = self.blueprint.policy()
        self.schema = self.blueprint.schema(policy)
        self.layout = MailLayout.of(self.schema, policy)
        size = self.blueprint.layout(policy).size
        self.board = WeightBoard(size, np.zeros(WeightBoard.size_bytes(size), np.uint8))
        self.board.reset()
        self.publish(0)

    def publish(self, version: int) -> None:
        weights = np.random.default_rng(version).normal(0, 0.5, self.board._size).astype(np.float32)
        self.board.publish(version, weights)

    def observation(self, tag: int) -> Arrays:
        rng = np.random.default_rng(tag)
        found: Arrays = {}
        for field in self.schema.fields:
            if field.axis == "T+1":
                shape = (B, *field.shape)
                found[field.name] = rng.random(shape) < 0.7 if field.dtype == "bool" else (200 * rng.random(shape)).astype(field.dtype)
        if "action_mask" in found:
            found["action_mask"][:, 0] = True
        return found

    def state(self, tag: int) -> Arrays:
        rng = np.random.default_rng(tag)
        return {name: rng.normal(size=(B, 8)).astype(np.float32) for name in self.schema.state_names}

    def server(self, *, batches: bool = False) -> Server:
        self.roles.append(Server(self, batches))
        return self.roles[-1]

    def client(self) -> Client:
        self.roles.append(Client(self))
        return self.roles[-1]

    def close(self) -> None:
        for role in self.roles:
            role.close()


class Counted(PolicyCopy):
    """Keeps how many rows each pass had."""

    passes: list[int]

    def act(self, observation: Arrays, state: Arrays, noise: Any) -> Any:
        self.passes.append(len(noise))
        return super().act(observation, state, noise)


class Server:
    def __init__(self, world: World, batches: bool) -> None:
        self.ours, theirs = Channel.pair()
        policy = world.blueprint.policy()
        policy.eval()
        self.copy = Counted(policy, world.board, torch.device("cpu"))
        self.copy.passes = []
        self._theirs = theirs
        self.server = InferenceServer(
            self.copy, world.board, world.layout, theirs, self._listen, batches=batches, recorder=NullRecorder(), trace=NullTrace()
        )

    def _listen(self) -> None:
        self._theirs.receive()
        raise Ended

    def serve_once(self) -> None:
        Asking(self.server.serve_once).answer()

    def heard(self) -> Any:
        """Who asked."""
        return Asking(self.server._gather).answer()

    def dies(self) -> None:
        for asker in self.server._askers.values():
            asker.close()

    def close(self) -> None:
        self.dies()
        self.ours.close()
        self._theirs.close()


class Client:
    def __init__(self, world: World) -> None:
        self.ours, theirs = Channel.pair()
        self._theirs = theirs
        self.client = InferenceClient(world.layout, theirs, self._listen)
        self.behaviour = world.blueprint.remote_behaviour(self.client, world.board, world.blueprint.policy())
        self.behaviour.refresh()

    def _listen(self) -> None:
        while (received := self._theirs.receive_with_fds()) is not None:
            if received[0] == b"stop":
                raise Ended
            self.client.connect(received[1][0])

    def told_of(self, server: Server, actor: int = 0) -> None:
        """As the supervisor tells both."""
        one, other = Channel.pair()
        server.server.connect(actor, one.detach())
        self.ours.send_with_fds(b"connect", [other.fileno()])
        other.close()

    def close(self) -> None:
        self.client._close()
        self.ours.close()
        self._theirs.close()

    def asks(self, question: Callable[[RemotePolicy], Any]) -> Asking:
        return Asking(lambda: question(self.behaviour))


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while World.made:
        World.made.pop().close()


class Asking(threading.Thread):
    """A question in a thread of its own; `answer` waits for it."""

    def __init__(self, question: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._question = question
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._answer = self._question()
        except BaseException as error:
            self._error = error

    def answer(self) -> Any:
        self.join(WAIT_SECONDS)
        assert not self.is_alive(), "no answer came"
        if self._error is not None:
            raise self._error
        return self._answer


def copied(acted: Any) -> tuple[Any, Any, int, Any]:
    return (
        acted.action_B.copy(),
        acted.outputs["log_prob"].copy(),
        acted.version,
        {name: value.copy() for name, value in acted.state.items()},
    )


def act(world: World, tag: int, row: int | Any = 0) -> Callable[[RemotePolicy], Any]:
    def question(behaviour: RemotePolicy) -> Any:
        behaviour.begin(1, tag)
        return copied(behaviour.act(world.observation(tag), world.state(tag), row))

    return question


@pytest.mark.parametrize("memory", ["none", "lstm", "gru"])
@pytest.mark.parametrize("mask", [True, False])
def test_an_answer_is_bit_for_bit_what_would_be_chosen_in_place(mask: bool, memory: str) -> None:
    world = World(mask=mask, memory=memory)
    server, client = world.server(), world.client()
    client.told_of(server)
    local = world.blueprint.behaviour(world.board)
    local.refresh()
    for tag, row in [(0, 0), (1, 3), (2, np.array([4, 0, 2]))]:
        asking = client.asks(act(world, tag, row))
        server.serve_once()
        local.begin(1, tag)
        expected = copied(local.act(world.observation(tag), world.state(tag), row))
        found = asking.answer()
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1], expected[1])
        assert found[2] == expected[2] == 0
        assert list(found[3]) == list(expected[3]) == list(world.schema.state_names)
        assert all(np.array_equal(found[3][name], expected[3][name]) for name in found[3])
        if mask:
            assert world.observation(tag)["action_mask"][np.arange(B), found[0]].all()


@pytest.mark.parametrize("batches", [True, False])
def test_who_asked_together_is_answered_by_one_pass_only_where_the_run_need_not_be_exact(
    batches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "GATHER_SECONDS", WAIT_SECONDS)
    monkeypatch.setattr(inference, "GATHER_SHARE", 1.0)
    world = World("async" if batches else "sync", memory="gru")
    server, clients = world.server(batches=batches), [world.client() for _ in range(3)]
    for actor, client in enumerate(clients):
        client.told_of(server, actor)
    asking = [client.asks(act(world, tag)) for tag, client in enumerate(clients)]
    while sum(server.copy.passes) < 3 * B:
        server.serve_once()
    answers = [one.answer() for one in asking]
    local = world.blueprint.behaviour(world.board)
    local.refresh()
    for tag, answer in enumerate(answers):
        local.begin(1, tag)
        expected = copied(local.act(world.observation(tag), world.state(tag), 0))
        (state,), (expected_state,) = answer[3].values(), expected[3].values()
        assert np.allclose(answer[1], expected[1], atol=1e-5)
        assert np.allclose(state, expected_state, atol=1e-5)
        if not batches:
            assert np.array_equal(answer[1], expected[1])
            assert np.array_equal(state, expected_state)
    assert server.copy.passes == ([3 * B] if batches else [B] * 3)


def test_whoever_asks_alone_is_answered_though_others_could_ask() -> None:
    world = World("async")
    server, clients = world.server(batches=True), [world.client() for _ in range(3)]
    for actor, client in enumerate(clients):
        client.told_of(server, actor)
    asking = clients[1].asks(act(world, 0))
    server.serve_once()
    asking.answer()
    assert server.copy.passes == [B]


def test_new_weights_are_taken_before_a_pass_and_the_answer_says_which() -> None:
    world = World("async")
    server, client = world.server(), world.client()
    client.told_of(server)
    answers = []
    for version in (0, 1, 2):
        world.publish(version)
        asking = client.asks(act(world, 0))
        server.serve_once()
        answers.append(asking.answer())
    assert [answer[2] for answer in answers] == [0, 1, 2]
    assert client.behaviour.version == 2
    assert not np.array_equal(answers[0][1], answers[1][1])


def test_a_question_whose_server_died_is_asked_again_and_answered_once() -> None:
    world = World()
    dead, server, client = world.server(), world.server(), world.client()
    client.told_of(dead)
    asking = client.asks(act(world, 5))
    assert dead.heard()  # it heard the question, and dies before it answers
    dead.dies()
    client.told_of(server)
    server.serve_once()
    found = asking.answer()
    local = world.blueprint.behaviour(world.board)
    local.refresh()
    local.begin(1, 5)
    assert np.array_equal(found[0], local.act(world.observation(5), {}, 0).action_B)


def test_an_answer_to_an_older_question_is_not_taken() -> None:
    world = World()
    server, client = world.server(), world.client()
    client.told_of(server)
    asking = client.asks(act(world, 0))
    (asker,) = server.heard()
    asker._channel.send(inference._WORD.pack(0, 7))
    server.server._answer([asker])
    assert asking.answer()[2] == 0


def test_an_actor_that_is_gone_is_forgotten_and_the_others_are_answered() -> None:
    world = World("async")
    server, clients = world.server(batches=True), [world.client() for _ in range(2)]
    for actor, client in enumerate(clients):
        client.told_of(server, actor)
    gone = clients[0].asks(act(world, 0))
    server.serve_once()
    gone.answer()
    clients[0].client._close()
    asking = clients[1].asks(act(world, 1))
    server.serve_once()
    asking.answer()
    server.server._questions(list(server.server._askers.values()))
    assert list(server.server._askers) == [1]


def test_who_waits_for_an_answer_hears_that_it_is_to_end() -> None:
    world = World()
    client = world.client()
    asking = client.asks(act(world, 0))  # there is no server yet
    client.ours.send(b"stop")
    with pytest.raises(Ended):
        asking.answer()


def test_a_server_that_waits_hears_that_it_is_to_end() -> None:
    server = World().server()
    server.ours.send(b"stop")
    with pytest.raises(Ended):
        server.serve_once()


def test_an_exact_rollout_refuses_an_answer_of_another_version() -> None:
    world = World()
    server, client = world.server(), world.client()
    client.told_of(server)
    world.publish(1)
    asking = client.asks(act(world, 0))  # begun with version 0
    server.serve_once()
    with pytest.raises(RuntimeError, match="answered with version 1, this rollout is made with 0"):
        asking.answer()


def test_no_field_of_a_mailbox_lies_on_another() -> None:
    world = World(memory="lstm")
    memory = np.zeros(world.layout.size_bytes, np.uint8)
    fields = [array for arrays in world.layout.views(memory) for array in arrays.values()]
    for array in fields:
        array.reshape(-1).view(np.uint8)[:] += 1
    assert memory.max() == 1
    assert memory.sum() == sum(array.nbytes for array in fields)


@pytest.mark.parametrize(
    ("wanted", "device", "images", "threshold", "found"),
    [
        ("auto", "cpu", True, 0, "actor"),
        ("auto", "cuda", True, 10**9, "server"),
        ("auto", "cuda", False, 10**9, "actor"),
        ("auto", "cuda", False, 0, "server"),
        ("server", "cpu", False, 10**9, "server"),
        ("actor", "cuda", True, 0, "actor"),
    ],
)
def test_a_server_is_taken_for_large_networks_on_a_gpu(
    wanted: str, device: str, images: bool, threshold: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    spec = scripted_spec() if images else scripted_spec(mask=False)
    leaves = spec.observation if images else tuple(leaf for leaf in spec.observation if not leaf.is_image)
    world.config.policy.inference = wanted
    blueprint = Blueprint(world.config, type(spec)(**{**vars(spec), "observation": leaves}), UserObjects(), bytes(16))
    monkeypatch.setattr(Blueprint, "device", lambda self: torch.device(device))
    monkeypatch.setattr(roles, "SERVED_WEIGHTS", threshold)
    assert blueprint.inference(blueprint.policy()) == found


def test_an_async_run_with_a_server_is_not_replayed() -> None:
    with pytest.raises(RunError, match=r"^this run cannot be replayed: its actions were chosen for all who had asked together"):
        replay(World("async").blueprint, {}, 1)
