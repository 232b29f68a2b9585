"""What the processes of a local run do from their first line to their last. The supervisor's side is local.py.

Each main builds its role from the SETUP that comes first on its channel, then serves its channel until STOP or the end of the
supervisor. A role that fails says why on its channel (FAULT, or an error object) before it exits; its log has the traceback.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from shoal.algorithms.ranks import LostRank
from shoal.config import RunConfig
from shoal.engines.actor_process import ActorProcess
from shoal.engines.beginning import IDLE_SECONDS, user_objects
from shoal.engines.errors_told import describe_error, encoded
from shoal.engines.inference_process import InferenceProcess
from shoal.engines.learner_process import LearnerProcess
from shoal.engines.looking import look
from shoal.engines.messages import Kind, Word
from shoal.engines.question import Answerer
from shoal.errors import ShoalError
from shoal.experience.envelope import Identity
from shoal.supervision.channel import wait
from shoal.supervision.zygote_main import ChildContext

_LOST_SECONDS = 5.0  # a learner that lost another one waits so long to be ended


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


def actor_main(context: ChildContext) -> int:
    """An actor's process, see ActorProcess. Waits for its set-up. Exits with 0 at STOP and where the supervisor is gone; what goes wrong with
    shoal itself is said as FAULT with value 1, and raised into its log."""
    try:
        ActorProcess(context).run()
    except EOFError:
        return 0
    except ShoalError as error:
        context.channel.send(Word(Kind.FAULT, 0, Identity(0, 0, 0), 1, encoded(describe_error(error))).encode())
        raise
    return 0


def learner_main(context: ChildContext) -> int:
    """A learner's process, see LearnerProcess. Waits for its set-up, and loads the checkpoint that it names. Exits with 0 at `stop` and where
    the supervisor is gone; a ShoalError is said as `failed`, and raised into its log, as everything else is."""
    # Sent to all processes of a run, as Ray does to those of a job that is stopped, it is a wish for a last checkpoint, which the supervisor hears.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        LearnerProcess(context).run()
    except EOFError:
        return 0
    except LostRank:
        time.sleep(_LOST_SECONDS)  # the supervisor knows who is gone, and ends this one; it is not to be taken for the one that died
        raise
    except ShoalError as error:
        context.channel.send(encoded({"is": "failed", **describe_error(error)}))
        raise
    return 0


def inference_main(context: ChildContext) -> int:
    """The inference server's process, see InferenceProcess. Waits for its set-up, says `ready`, and ends as the learner's does."""
    try:
        InferenceProcess(context).run()
    except EOFError:
        return 0
    except ShoalError as error:
        context.channel.send(encoded({"is": "failed", **describe_error(error)}))
        raise
    return 0
