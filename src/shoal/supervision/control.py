"""The control socket of a living run: a Unix socket in its directory (mode 0600), one JSON object per line in each direction.

    {"command": "state"}                 -> {"ok": true, "state": {...}}
    {"command": "stalls"}                -> {"ok": true, "stalls": {...}}, once every process wrote its stack
    {"command": "save"}                  -> {"ok": true, "update": 123}, once the checkpoint is whole
    {"command": "pause"} / "continue"    -> {"ok": true}; a paused run orders no more rollouts
    {"command": "scale", "actors": 4}    -> {"ok": true, "actors": 4}; on a cluster also {"nodes": {name: actors}}
    {"command": "scale", "autoscale": "1:8"} or "none" -> {"ok": true, "actors": 4, "autoscale": "1:8"}
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import RunError
from shoal.supervision.channel import HasFileno

NAME = "control.sock"
MAX_LINE_BYTES = 64 * 1024
MAX_CLIENTS = 32
MAX_ANSWER_BYTES = 16 * 2**20
DEAF_SECONDS = 1.0
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
        """All of it, or the end of the connection: half an answer would be waited for."""
        line = json.dumps(answer, default=str).encode() + b"\n"
        try:
            whole = self.connection.send(line, getattr(socket, "MSG_NOSIGNAL", 0)) == len(line)
        except OSError:
            whole = False
        if not whole:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


class ControlServer:
    """Listens in `directory`. Only the user who runs it may connect (mode 0600). Raises OSError where there can be no socket."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / NAME
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.setblocking(False)
            before = os.umask(0o177)
            try:
                with _short_address(self._path) as address:
                    self._listener.bind(address)
            finally:
                os.umask(before)
            self._listener.listen(8)
        except OSError:
            self._listener.close()
            raise
        self._clients: list[_Client] = []
        self._deaf_until = 0.0  # on the monotonic clock: no descriptor was left for who called

    def sources(self) -> list[HasFileno]:
        """What to wait for. Who calls while nobody more can be heard is not waited for: he would be there at once, again and again."""
        deaf = len(self._clients) >= MAX_CLIENTS or time.monotonic() < self._deaf_until
        return [*self._clients] if deaf else [self._listener, *self._clients]

    def receive(self) -> list[tuple[dict[str, Any], Reply]]:
        """Requests that arrived, each with the function that answers it."""
        try:
            while len(self._clients) < MAX_CLIENTS:
                connection, _ = self._listener.accept()
                connection.setblocking(False)
                self._clients.append(_Client(connection))
        except BlockingIOError:  # nobody else waits
            pass
        except OSError:
            self._deaf_until = time.monotonic() + DEAF_SECONDS
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
            request = _object(line)
            if request is not None and isinstance(request.get("command"), str):
                requests.append((request, client.reply))
            else:
                client.reply({"ok": False, "error": 'not a request: expected {"command": "..."}'})
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
                if len(answer) > MAX_ANSWER_BYTES:
                    raise RunError(f"who listens on {path} is no run: its answer does not end")
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise RunError(f"the run in {directory} is not alive: nobody listens on {NAME}") from error
        except BlockingIOError as error:
            raise RunError(f"the run in {directory} has too many connections waiting on {NAME}; close them, or try again") from error
        except TimeoutError as error:
            raise RunError(f"the run in {directory} did not answer within {timeout_seconds:g} s") from error
    said = _object(answer)
    if said is None:
        raise RunError(f"who listens on {path} is no run: its answer is no JSON object")
    if not said.get("ok"):
        raise RunError(f"the run in {directory} refused: {said.get('error')}")
    return said


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
