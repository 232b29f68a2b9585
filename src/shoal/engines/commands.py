"""What a living run does when it is told to: the commands of the control socket (supervision/control.py)."""

from __future__ import annotations

from typing import Any, Protocol

from shoal.engines.fleet import MAX_ACTORS
from shoal.engines.session import Session
from shoal.supervision.control import Reply

COMMANDS = ("state", "stalls", "save", "pause", "continue", "scale", "stop")


class Commanded(Protocol):
    """An engine that can be talked to while it runs."""

    @property
    def session(self) -> Session: ...
    def pause(self, paused: bool) -> None: ...
    def save(self, reply: Reply) -> None: ...
    def explain(self, reply: Reply) -> None: ...
    def scale(self, actors: int) -> None: ...


def obey(engine: Commanded, request: dict[str, Any], reply: Reply) -> None:
    """Do what one request says. `save` and `stalls` are answered later, once it is done."""
    command = request["command"]
    if command == "state":
        reply({"ok": True, "state": engine.session.observer.state()})
    elif command == "stalls":
        engine.explain(reply)
    elif command == "save":
        engine.save(reply)
    elif command in ("pause", "continue"):
        engine.pause(command == "pause")
        reply({"ok": True})
    elif command == "stop":
        engine.session.wanted_end = "interrupted"
        reply({"ok": True})
    elif command == "scale":
        _scale(engine, request.get("actors"), reply)
    else:
        reply({"ok": False, "error": f"no command {command!r}; there are {', '.join(COMMANDS)}"})


def _scale(engine: Commanded, wanted: object, reply: Reply) -> None:
    groups = engine.session.coordinator.plan.num_groups
    if not isinstance(wanted, int) or not 1 <= wanted <= min(MAX_ACTORS, groups):
        reply({"ok": False, "error": f"actors must be 1 to {groups} (the number of groups), got {wanted!r}"})
        return
    engine.scale(wanted)
    reply({"ok": True, "actors": wanted})
