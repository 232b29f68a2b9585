"""What a question to an inference server costs beside choosing in place: `python benchmarks/served.py [--questions 300]`, for the row
`inference/server` of speed.py. It is what `policy.inference auto` rests on: from SERVED_WEIGHTS weights on a server is taken, where the device is a GPU.

Two processes with the parts that a run has: a server, on the processor, and one who asks it as an actor does, once a row, for a group of 8. The way is
the time from the question to the answer in hand, less the server's pass for it. In place is the same behaviour without a server, alone. Medians.

Legend: B environments of the group.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch

from shoal.actors.behaviour import PolicyCopy
from shoal.config import RunConfig
from shoal.engines.inference import InferenceClient, InferenceServer, MailLayout
from shoal.engines.roles import SERVED_WEIGHTS, Blueprint, UserObjects
from shoal.environments.spaces import allocate
from shoal.supervision.channel import Channel
from shoal.supervision.memory import SharedMemory
from shoal.supervision.trace import NullTrace
from shoal.types import Array, Arrays, Behaviour, EnvironmentSpec, LeafSpec, NullRecorder
from shoal.weights.board import WeightBoard

NUM_ENVS = 8
WARM_UP = 20  # questions
NUM_NUMBERS = 64
SMALL = [64, 64]
NUMBERS = LeafSpec((), "box", "float32", (NUM_NUMBERS,), low=(-np.inf,), high=(np.inf,))
FRAMES = LeafSpec((), "box", "uint8", (4, 84, 84), low=(0.0,), high=(255.0,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300)
    print(json.dumps(measure(parser.parse_args().questions)))


def measure(questions: int) -> dict[str, Any]:
    """Milliseconds of the way and in place, and the weights of the networks."""
    torch.set_num_threads(1)
    many = [width_of(SERVED_WEIGHTS)] * 2
    return {
        "way_ms": way_ms(NUMBERS, SMALL, questions),
        "image_way_ms": way_ms(FRAMES, SMALL, questions),
        "small_weights": World(NUMBERS, SMALL, "actor").size,
        "small_ms": in_place_ms(NUMBERS, SMALL, questions),
        "served_weights": World(NUMBERS, many, "actor").size,
        "served_ms": in_place_ms(NUMBERS, many, questions),
        "image_ms": in_place_ms(FRAMES, SMALL, questions),
    }


def width_of(weights: int) -> int:
    """Of two hidden layers of an actor and of a critic with NUM_NUMBERS inputs, so that they have at least so many weights together."""
    half = (NUM_NUMBERS + 1) / 2  # 2 (w^2 + NUM_NUMBERS w + ...) = weights
    return int((weights / 2 + half**2) ** 0.5 - half) + 1


class World:
    """A policy with its initial weights on a board, in memory that a forked process shares."""

    def __init__(self, leaf: LeafSpec, hidden_sizes: list[int], inference: str) -> None:
        config = RunConfig(mode="sync", device="cpu")
        config.sampling.group_size, config.policy.hidden_sizes, config.policy.inference = NUM_ENVS, hidden_sizes, inference  # type: ignore[assignment]
        self.spec = EnvironmentSpec("served", (leaf,), LeafSpec((), "discrete", "int64", (), nvec=(6,), start=(0,)))
        self.blueprint = Blueprint(config, self.spec, UserObjects(), bytes(16))
        self.policy = self.blueprint.policy()
        layout = self.blueprint.layout(self.policy)
        self.size = layout.size
        self.mail = MailLayout.of(self.blueprint.schema(self.policy), self.policy)
        memory = SharedMemory.create(WeightBoard.size_bytes(self.size))
        self.board = WeightBoard(self.size, memory.buffer)
        self.board.reset()
        self.board.publish(0, np.random.default_rng(0).normal(0.0, 0.05, self.size).astype(np.float32))

    def observation(self) -> Arrays:
        """[B, ...], drawn once."""
        rows, rng = allocate(self.spec, NUM_ENVS), np.random.default_rng(0)
        for array in rows.values():
            array[:] = 255 * rng.random(array.shape) if array.dtype == np.uint8 else rng.normal(size=array.shape)
        return rows


# ---- in place --------------------------------------------------------------------------------------------------------
def in_place_ms(leaf: LeafSpec, hidden_sizes: list[int], questions: int) -> float:
    world = World(leaf, hidden_sizes, "actor")
    behaviour = world.blueprint.behaviour(world.board)
    behaviour.refresh()
    return 1e3 * median(answers(behaviour, world, questions))


def answers(behaviour: Behaviour, world: World, questions: int) -> list[float]:
    """Seconds that each answer took, the first ones left out."""
    observation, rows = world.observation(), world.blueprint.config.sampling.rollout_length
    seconds = []
    for n in range(WARM_UP + questions):
        if n % rows == 0:
            behaviour.begin(0, n // rows)
        begun = time.perf_counter()
        behaviour.act(observation, {}, n % rows)
        seconds.append(time.perf_counter() - begun)
    return seconds[WARM_UP:]


# ---- through a server ------------------------------------------------------------------------------------------------
def way_ms(leaf: LeafSpec, hidden_sizes: list[int], questions: int) -> float:
    world = World(leaf, hidden_sizes, "server")
    passes = SharedMemory.create(8 * (WARM_UP + questions)).buffer.view(np.float64)
    supervisor, of_client = Channel.pair()  # nobody speaks on it, nor on the server's
    client = InferenceClient(world.mail, of_client, lambda: None)
    with served(world, passes) as end:
        client.connect(end)
        behaviour = world.blueprint.remote_behaviour(client, world.board, world.policy)
        behaviour.refresh()
        found = answers(behaviour, world, questions)
    supervisor.close()
    return 1e3 * median(whole - one for whole, one in zip(found, passes[WARM_UP:].tolist(), strict=True))


class TimedCopy(PolicyCopy):
    """Writes down how many seconds each pass took."""

    seconds: Array
    num_passes = 0

    def act(self, observation: Arrays, state: Arrays, noise: Array) -> tuple[Array, Arrays, Arrays]:
        begun = time.perf_counter()
        found = super().act(observation, state, noise)
        self.seconds[self.num_passes] = time.perf_counter() - begun
        self.num_passes += 1
        return found


@contextmanager
def served(world: World, passes: Array) -> Iterator[int]:
    """A server in a process of its own while the block lasts; gives a descriptor of a channel to it. `passes`: what each pass took, in seconds."""
    ours, theirs = Channel.pair()
    end, of_server = Channel.pair()
    pid = fork(lambda: serve(world, passes, theirs, of_server.detach()), ours, end)
    theirs.close()
    of_server.close()
    try:
        yield end.detach()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        ours.close()


def fork(work: Callable[[], None], *not_its_own: Channel) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            for channel in not_its_own:
                channel.close()
            work()
        except EOFError:
            pass  # the other process is gone
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid


def serve(world: World, passes: Array, supervisor: Channel, fd: int) -> None:
    """Answer for ever, or until the other process is gone (EOFError)."""
    copy = TimedCopy(world.blueprint.policy().eval(), world.board, torch.device("cpu"))
    copy.seconds = passes

    def listen() -> None:
        supervisor.receive()

    server = InferenceServer(copy, world.board, world.mail, supervisor, listen, batches=False, recorder=NullRecorder(), trace=NullTrace())
    server.connect(0, fd)
    while True:
        server.serve_once()


if __name__ == "__main__":
    main()
