"""The inference server's process: the supervisor's orders on one side, the server and the actors that ask it on the other."""

from __future__ import annotations

import json
from contextlib import suppress

from shoal.engines.beginning import Stopped, attach, receive_setup
from shoal.engines.inference import InferenceServer, MailLayout
from shoal.engines.messages import to_json
from shoal.supervision.channel import Channel
from shoal.supervision.zygote_main import ChildContext


class InferenceProcess:
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
