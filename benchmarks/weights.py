"""How long new weights take to an actor: `python benchmarks/weights.py [--megabytes 7] [--versions 400]`, for the row `weights` of speed.py.

Three processes with the parts that a run has, and its words between them: the learner publishes on the weight board (`Learner.publish`) and says so, the
supervisor tells the actor, the actor fills rollouts of CartPole-v1 with that policy, listens between two rows, and reads the board before its next step.
Measured from the moment at which the learner has its new weights (before it publishes them) to the moment at which the actor has them for its next action.
A version that a newer one overtook is counted from its own publication until that newer one was there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from shoal.config import RunConfig
from shoal.engines.coordinator import Plan
from shoal.engines.messages import Kind, Word, to_json
from shoal.engines.roles import Blueprint, UserObjects
from shoal.environments.probe import probe
from shoal.experience.envelope import Identity
from shoal.experience.group_state import GroupHistory
from shoal.experience.ring import Ring
from shoal.settings import resolve
from shoal.supervision.channel import Channel, wait
from shoal.supervision.memory import SharedMemory
from shoal.weights.board import WeightBoard

GAP_SECONDS = 0.03  # between two publications: an update of such a policy takes about as long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=7.0)
    parser.add_argument("--versions", type=int, default=400)
    options = parser.parse_args()
    print(json.dumps(measure(options.megabytes, options.versions)))


def measure(megabytes: float, num_versions: int) -> dict[str, Any]:
    """Milliseconds from publication to first use: median, p99 and maximum over all versions; and how large the policy is."""
    torch.set_num_threads(1)
    width = width_of(megabytes)
    config, _ = resolve(
        "CartPole-v1", {"algorithm": "impala", "preset": "none", "policy.hidden_sizes": [width, width], "sampling.groups": 1}
    )
    blueprint = Blueprint(config, probe(config.env).spec, UserObjects(), bytes(16))
    size = blueprint.layout(blueprint.policy()).size
    weights = SharedMemory.create(WeightBoard.size_bytes(size))
    times = SharedMemory.create(32 * (num_versions + 1))
    times_ns = times.buffer.view(np.int64).reshape(4, num_versions + 1)  # begun to publish, published, begun to read, used
    to_learner, of_learner = Channel.pair()
    to_actor, of_actor = Channel.pair()
    board = WeightBoard(size, weights.buffer)
    board.reset()
    children = [
        _fork(lambda: _learn(blueprint, board, of_learner, times_ns), to_learner, to_actor, of_actor),
        _fork(lambda: _act(blueprint, config, board, of_actor, times_ns), to_learner, of_learner, to_actor),
    ]
    of_learner.close()
    of_actor.close()
    _supervise(to_learner, to_actor, num_versions)
    for pid in children:
        os.waitpid(pid, 0)
    return summary(times_ns.copy()) | {"megabytes": 4 * size / 1e6, "hidden_sizes": [width, width]}


def width_of(megabytes: float) -> int:
    """Of two hidden layers of an actor and of a critic, so that their weights come to about this."""
    return round((megabytes * 1e6 / 4 / 2) ** 0.5)


def summary(times_ns: Any) -> dict[str, float]:
    """Milliseconds from publication to first use, and the medians of its three parts: publishing, words and the end of the actor's step, reading.

    times_ns: [4, versions] begun to publish, published, begun to read, used; the last two are 0 for versions that were overtaken. Version 0 is the start.
    """
    begun, published, read, used = times_ns[:, 1:].astype(np.float64) / 1e6
    direct = used > 0
    first_use = np.minimum.accumulate(np.where(direct, used, np.inf)[::-1])[::-1]  # of this version or a newer one
    ms = first_use - begun
    ms = ms[np.isfinite(ms)]
    parts = {"publish_ms": published - begun, "wait_ms": read - published, "read_ms": used - read}
    return {
        "versions": len(ms),
        "overtaken": int((~direct).sum()),
        "median_ms": float(np.median(ms)),
        "p99_ms": float(np.quantile(ms, 0.99)),
        "max_ms": float(ms.max()),
    } | {name: float(np.median(part[direct])) for name, part in parts.items()}


# ---- three processes -------------------------------------------------------------------------------------------------
def _fork(serve: Callable[[], None], *not_its_own: Channel) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for channel in not_its_own:
                channel.close()
            serve()
            code = 0
        except EOFError:
            pass  # the supervisor is gone
        finally:
            os._exit(code)
    return pid


def _supervise(learner: Channel, actor: Channel, num_versions: int) -> None:
    """Pass the learner's word on, let the actor go on for ever, and order the next version after a while."""
    wait([actor], None)  # its first rollout is made
    actor.receive()
    for version in range(1, num_versions + 1):
        learner.send(to_json({"do": "train", "version": version}))
        wait([learner], None)
        said = json.loads(learner.receive() or b"")
        actor.send(Word(Kind.PUBLISHED, value=said["version"]).encode())
        time.sleep(GAP_SECONDS)
    learner.send(to_json({"do": "stop"}))
    actor.send(Word(Kind.STOP).encode())


def _learn(blueprint: Blueprint, board: WeightBoard, channel: Channel, times_ns: Any) -> None:
    ring = _ring(blueprint)
    learner = blueprint.learner(ring, board, max_policy_lag=4)
    learner.publish()
    while True:
        wait([channel], None)
        order = json.loads(channel.receive() or b"")
        if order["do"] == "stop":
            return
        learner.version = order["version"]
        times_ns[0, learner.version] = time.monotonic_ns()
        learner.publish()
        times_ns[1, learner.version] = time.monotonic_ns()
        channel.send(to_json({"is": "trained", "version": learner.version}))


def _ring(blueprint: Blueprint) -> Ring:
    schema = blueprint.schema(blueprint.policy())
    return Ring(schema, 1, np.zeros(Ring.size_bytes(schema, 1), np.uint8))


def _act(blueprint: Blueprint, config: RunConfig, board: WeightBoard, channel: Channel, times_ns: Any) -> None:
    ring, behaviour = _ring(blueprint), blueprint.behaviour(board)
    actor = blueprint.actor(ring, behaviour)
    plan = Plan.of(config)
    history = GroupHistory(plan.group_size, blueprint.spec.action.shape, ring.slots[0].arrays["action"].dtype.str, {})
    actor.restore(0, history.state_at(0))
    while board.version < 0:
        time.sleep(0.001)
    behaviour.refresh()
    newest, stopped = 0, False

    def listen(first_version: int = 0) -> bool:
        nonlocal newest, stopped
        while (message := channel.receive()) is not None:
            word = Word.decode(message)
            stopped = stopped or word.kind is Kind.STOP
            newest = max(newest, word.value)
        if newest > behaviour.version:
            begun = time.monotonic_ns()
            version = behaviour.refresh()
            times_ns[2:, version] = begun, time.monotonic_ns()
        return stopped

    sequence = 0
    while not stopped:
        actor.fill(0, Identity(0, sequence, 0), listen)
        listen()
        if sequence == 0:
            channel.send(Word(Kind.FILLED).encode())
        sequence += 1
    actor.close()


if __name__ == "__main__":
    main()
