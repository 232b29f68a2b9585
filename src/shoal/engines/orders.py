"""What the supervisor of a local run tells its roles: how to begin, what to make, and that there are new weights."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from shoal.engines.messages import Kind, Word, to_json
from shoal.engines.plan import Lease
from shoal.engines.process import Process, tell, tell_with_file
from shoal.engines.session import Session
from shoal.experience.envelope import Identity
from shoal.experience.group_state import to_bytes
from shoal.supervision.channel import Channel
from shoal.types import GroupState


def learner_setup(session: Session, kept: int | None = None) -> dict[str, Any]:
    """What a learner begins with: at the newest checkpoint that the run stands at, or with the initial weights.

    kept: the version that several go on from, which one of them kept in memory (engines/keeping.py).
    """
    path = session.checkpoint_path
    checkpoint = None if path is None else str(path.absolute())
    plan = session.coordinator.plan
    return {
        "spec": session.spec.to_json(),
        "checkpoint": checkpoint,
        "replay_whole": session.replay_whole,
        "kept": kept,
        "max_policy_lag": plan.max_policy_lag,
        "epoch": session.epoch,
    }


def actor_setup(session: Session) -> dict[str, Any]:
    """What an actor begins with; its groups come with its leases."""
    plan = session.coordinator.plan
    timing = {"close_after_lag": plan.close_after_lag, "sync": plan.mode == "sync"}
    return {"spec": session.spec.to_json(), "epoch": session.epoch, **timing}


def inference_setup(session: Session) -> dict[str, Any]:
    """What an inference server begins with; its actors are connected afterwards, each by `connect`."""
    return {"spec": session.spec.to_json(), "epoch": session.epoch}


def connect(server: Process, actor: Process) -> None:
    """Give an actor and the inference server a channel of their own, where both are up. Raises OSError where there are no descriptors for it."""
    if not (server.up and actor.up):
        return
    ends = Channel.pair()
    tell(server, to_json({"do": "connect", "actor": actor.index}), [ends[0].fileno()])
    tell(actor, Word(Kind.CONNECT).encode(), [ends[1].fileno()])
    for end in ends:
        end.close()


def send_lease(actor: Process, lease: Lease, version: int) -> None:
    """The group's state first, where the actor does not have it; it travels as a descriptor."""
    special = {"give_up": lease.give_up, "give_up_steps": lease.give_up_steps, "careful": lease.careful}
    body = to_json(special) if any(special.values()) else b""
    actor.told_at = time.monotonic()
    if lease.restore is not None:
        send_restore(actor, lease.identity, lease.restore)
    tell(actor, Word(Kind.LEASE, lease.slot, lease.identity, version, body).encode())


def send_restore(actor: Process, identity: Identity, state: GroupState) -> None:
    """Have an actor put a group back to `state`; it answers RESTORED or FAULT. The state travels as a descriptor."""
    tell_with_file(actor, Word(Kind.RESTORE, 0, identity).encode(), to_bytes(state))


def tell_of_weights(session: Session, actors: Iterable[Process], version: int) -> None:
    """Async actors hear of new weights. One whose channel is full hears of the next version, or by its next lease."""
    if session.coordinator.plan.mode == "async":
        message = Word(Kind.PUBLISHED, value=version).encode()
        for actor in actors:
            tell(actor, message, must_arrive=False)
