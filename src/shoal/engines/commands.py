"""What a living run does when it is told to: the commands of the control socket (supervision/control.py)."""

from __future__ import annotations

from typing import Any, Protocol

from shoal.engines.scaling import Scaling
from shoal.engines.session import Session
from shoal.supervision.control import Reply

COMMANDS = ("state", "stalls", "save", "pause", "continue", "scale", "stop")


class Commanded(Protocol):
    """An engine that can be talked to while it runs."""

    @property
    def session(self) -> Session: ...
    @property
    def scaling(self) -> Scaling: ...
    def pause(self, paused: bool) -> None: ...
    def save(self, reply: Reply) -> None: ...
    def explain(self, reply: Reply) -> None: ...


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
        _scale(engine.scaling, request, reply)
    else:
        reply({"ok": False, "error": f"no command {command!r}; there are {', '.join(COMMANDS)}"})


def _scale(scaling: Scaling, request: dict[str, Any], reply: Reply) -> None:
    actors, bounds = request.get("actors"), request.get("autoscale")
    try:
        if (bounds is None) == (actors is None):
            raise ValueError("either actors (a number) or autoscale (MIN:MAX, or none) was expected")
        if bounds is not None:
            facts = scaling.follow(str(bounds))
        elif isinstance(actors, int):
            facts = scaling.fix(actors)
        else:
            raise ValueError(f"actors must be a number, got {actors!r}")
    except ValueError as error:
        reply({"ok": False, "error": str(error)})
        return
    reply({"ok": True, **facts})
