"""A store over HTTP on this machine: as much of WebHDFS (hadoop.apache.org) as fsspec's own client speaks, with objects in memory."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_PREFIX = "/webhdfs/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and content are sent one after the other, and neither waits for the other's receipt
    objects: dict[str, bytes]

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _json(self, answer: object, code: int = 200) -> None:
        self._answer(code, json.dumps(answer).encode())

    def _respond(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path).removeprefix(_PREFIX), {name: values[0] for name, values in parse_qs(parts.query).items()}
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        inside = {name for name in list(self.objects) if name.startswith(f"{path.rstrip('/')}/")}
        op = query["op"]
        if op in ("CREATE", "APPEND") and "second" not in query:
            self._answer(307, Location=f"http://{self.headers['Host']}{self.path}&second=1")
        elif op == "CREATE":
            self.objects[path] = content
            self._answer(201)
        elif op == "APPEND":
            self.objects[path] += content
            self._answer(200)
        elif op == "MKDIRS":
            self._json({"boolean": True})
        elif op == "DELETE":
            for name in {path} | (inside if query["recursive"] == "true" else set()):
                self.objects.pop(name, None)
            self._json({"boolean": True})
        elif op == "RENAME":
            self.objects[query["destination"]] = self.objects.pop(path)
            self._json({"boolean": True})
        elif path not in self.objects and not inside:
            self._json({"RemoteException": {"exception": "FileNotFoundException", "message": f"File does not exist: {path}"}}, 404)
        elif op == "GETFILESTATUS":
            self._json({"FileStatus": self._status(path)})
        elif op == "LISTSTATUS":
            names = {name[len(path.rstrip("/")) + 1 :].partition("/")[0] for name in inside}
            self._json(
                {"FileStatuses": {"FileStatus": [self._status(f"{path.rstrip('/')}/{name}") | {"pathSuffix": name} for name in names]}}
            )
        else:
            begin = int(query["offset"])
            self._answer(200, self.objects[path][begin : begin + int(query["length"])])

    def _status(self, path: str) -> dict[str, object]:
        there = path in self.objects
        return {"type": "FILE" if there else "DIRECTORY", "length": len(self.objects[path]) if there else 0, "pathSuffix": ""}

    do_GET = do_PUT = do_POST = do_DELETE = _respond


@contextlib.contextmanager
def http_store() -> Iterator[tuple[str, dict[str, bytes]]]:
    """The URL of its top, and its objects by path."""
    objects: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"objects": objects}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"webhdfs://127.0.0.1:{server.server_port}", objects
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
