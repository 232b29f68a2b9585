"""The control socket of a living run: a Unix socket in its directory (mode 0600), one JSON object per line in each direction.

    {"command": "state"}                 -> {"ok": true, "state": {...}}
    {"command": "stalls"}                -> {"ok": true, "stalls": {...}}, once every process wrote its stack
    {"command": "save"}                  -> {"ok": true, "update": 123}, once the checkpoint is whole
    {"command": "pause"} / "continue"    -> {"ok": true}; a paused run orders no more rollouts
    {"command": "scale", "actors": 4}    -> {"ok": true, "actors": 4}
    {"command": "stop"}                  -> {"ok": true}; the run ends as after Ctrl-C
    anything wrong                       -> {"ok": false, "error": "..."}

The server never blocks its caller: it reads what is there, and drops a client that does not read or sends too much.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import RunError
from shoal.supervision.channel import HasFileno

NAME = "control.sock"
MAX_LINE_BYTES = 64 * 1024
MAX_CLIENTS = 32
Reply = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def _short_address(path: Path) -> Any:
    """A Unix address has 108 bytes at most; through a descriptor of its directory any path is short."""
    if sys.platform != "linux":
        yield str(path)
        return
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


class _Client:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.pending = b""

    def fileno(self) -> int:
        return self.connection.fileno()

    def reply(self, answer: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(json.dumps(answer, default=str).encode() + b"\n", getattr(socket, "MSG_NOSIGNAL", 0))


class ControlServer:
    """Listens in `directory`. Only the user who runs it may connect (mode 0600)."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        before = os.umask(0o177)
        try:
            with _short_address(self._path) as address:
                self._listener.bind(address)
        finally:
            os.umask(before)
        self._listener.listen(8)
        self._clients: list[_Client] = []

    def sources(self) -> list[HasFileno]:
        """What to wait for."""
        return [self._listener, *self._clients]

    def receive(self) -> list[tuple[dict[str, Any], Reply]]:
        """Requests that arrived, each with the function that answers it."""
        with contextlib.suppress(OSError):  # nobody else waits, or no descriptor is left for who does
            while len(self._clients) < MAX_CLIENTS:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                self._clients.append(_Client(connection))
        requests: list[tuple[dict[str, Any], Reply]] = []
        for client in list(self._clients):
            requests += self._read(client)
        return requests

    def _read(self, client: _Client) -> list[tuple[dict[str, Any], Reply]]:
        try:
            received = client.connection.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            received = b""
        if not received or len(client.pending) + len(received) > MAX_LINE_BYTES:
            client.connection.close()
            self._clients.remove(client)
            return []
        *lines, client.pending = (client.pending + received).split(b"\n")
        requests: list[tuple[dict[str, Any], Reply]] = []
        for line in lines:
            try:
                request = json.loads(line)
                if not isinstance(request, dict) or not isinstance(request.get("command"), str):
                    raise ValueError('expected {"command": "..."}')
            except (ValueError, RecursionError) as error:
                client.reply({"ok": False, "error": f"not a request: {error}"})
                continue
            requests.append((request, client.reply))
        return requests

    def close(self) -> None:
        for client in self._clients:
            client.connection.close()
        self._listener.close()
        self._path.unlink(missing_ok=True)


def ask(directory: Path, request: dict[str, Any], timeout_seconds: float = 60.0) -> dict[str, Any]:
    """Send one request to the living run in `directory` and return its answer.

    Raises:
      RunError: the run is not alive, does not answer in time, or refuses (with its reason).
    """
    path = directory / NAME
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_seconds)
        try:
            with _short_address(path) as address:
                connection.connect(address)
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = b""
            while not answer.endswith(b"\n"):
                part = connection.recv(MAX_LINE_BYTES)
                if not part:
                    raise RunError(f"the run in {directory} ended before it answered")
                answer += part
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise RunError(f"the run in {directory} is not alive: nobody listens on {NAME}") from error
        except TimeoutError as error:
            raise RunError(f"the run in {directory} did not answer within {timeout_seconds:g} s") from error
    said: dict[str, Any] = json.loads(answer)
    if not said.get("ok"):
        raise RunError(f"the run in {directory} refused: {said.get('error')}")
    return said
