"""How a role's process begins: what it is to build, from its first message, and the memory that it shares with others."""

from __future__ import annotations

import json
import os
from typing import Any

from shoal.config import RunConfig
from shoal.engines.messages import place_of
from shoal.engines.roles import Blueprint, UserObjects
from shoal.experience.ring import Ring
from shoal.supervision.channel import Channel, wait
from shoal.supervision.heartbeat import ActivityBoard
from shoal.supervision.memory import SharedMemory
from shoal.supervision.trace import Tracer, open_trace
from shoal.supervision.zygote_main import ChildContext
from shoal.types import Activity, ActivityRecorder, EnvironmentSpec
from shoal.weights.board import WeightBoard

IDLE_SECONDS = 1.0


class Stopped(Exception):
    """The supervisor wants this role to end, or is gone."""


def user_objects(context: ChildContext) -> UserObjects:
    return UserObjects(**(context.unpickle() or {}))


def receive_setup(channel: Channel) -> dict[str, Any]:
    """The first message of every role; what it says lies in a file that comes along. Raises EOFError: the supervisor is gone."""
    while True:
        wait([channel], IDLE_SECONDS)
        received = channel.receive_with_fds()
        if received is not None:
            return json.loads(read_and_close(received[1][0]))  # type: ignore[no-any-return]


def read_and_close(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read()


def attach(context: ChildContext, setup: dict[str, Any]) -> tuple[Blueprint, Ring, WeightBoard, ActivityRecorder, Tracer]:
    """What this role is built from, and where it says what it does: it is starting, from now on."""
    config = RunConfig.model_validate(setup["config"])
    spec = EnvironmentSpec.from_json(setup["spec"])
    blueprint = Blueprint(config, spec, user_objects(context), bytes.fromhex(setup["run_id"]), setup["epoch"])
    memory = SharedMemory.attach(context.memory_fds[0], setup["memory_bytes"])
    policy = blueprint.policy()
    schema = blueprint.schema(policy)
    ring = Ring(schema, setup["num_slots"], memory.buffer[: setup["ring_bytes"]])
    board = WeightBoard(blueprint.layout(policy).size, memory.buffer[setup["ring_bytes"] :])
    activities = ActivityBoard.attach(context.memory_fds[1], setup["num_roles"])
    index = place_of(context.name, context.index, setup["num_roles"])
    trace = open_trace(setup["traces"], context.name, context.index, context.incarnation)
    heart = trace.recorder(activities.heartbeat(index, context.incarnation))
    heart.enter(Activity.STARTING)
    return blueprint, ring, board, heart, trace
