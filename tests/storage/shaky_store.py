"""A store for fsspec, `shaky://`, that keeps objects in the directory SHAKY_ROOT, and does with them what the rules in the file `SHAKY_ROOT.rules` say, in any process.

fail: [n, pattern]     the next n writes to matching names raise
away: true             nothing can be reached; the error holds a secret
wait: pattern          a write to a matching name makes `SHAKY_ROOT.waiting`, and waits until the rule is gone
half: pattern          half of a matching file is written, `SHAKY_ROOT.halfway` is made, and nothing more happens
lose: pattern          a write to a matching name is taken, and nothing is there
damage: pattern        a byte of a matching file is another one
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

SECRET = "AKIAnobodyshallsee"
HERE = Path(__file__).parent


def root() -> Path:
    return Path(os.environ["SHAKY_ROOT"])


def _beside(ending: str) -> Path:
    return root().with_name(f"{root().name}.{ending}")


def halfway() -> Path:
    return _beside("halfway")


def waiting() -> Path:
    return _beside("waiting")


def rule(**rules: Any) -> None:
    """From now on these, and no others."""
    aside = _beside("rules.new")
    aside.write_text(json.dumps(rules))
    aside.replace(_beside("rules"))


def _rules() -> dict[str, Any]:
    try:
        found = json.loads(_beside("rules").read_text())
    except FileNotFoundError:
        return {}
    assert isinstance(found, dict)
    return found


class ShakyFileSystem(LocalFileSystem):
    protocol = "shaky"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        path = os.fspath(path)
        return (f"{root()}/{path.removeprefix('shaky://')}" if path.startswith("shaky://") else path).rstrip("/")

    def ls(self, path: Any, detail: bool = False, **kwargs: Any) -> Any:
        self._reached()
        return super().ls(path, detail=detail, **kwargs)

    def info(self, path: Any, **kwargs: Any) -> Any:
        self._reached()
        return super().info(path, **kwargs)

    def _reached(self) -> None:
        if _rules().get("away"):
            raise ConnectionError(f"no route to https://store.example/?X-Amz-Signature={SECRET}&expires=3 for sftp://user:{SECRET}@there")

    def _before(self, path: str) -> dict[str, Any]:
        self._reached()
        rules = _rules()
        left, pattern = rules.get("fail", (0, ""))
        if left and re.search(pattern, path):
            rule(**{**rules, "fail": [left - 1, pattern]})
            raise ConnectionError("the store has hung up")
        while "wait" in rules and re.search(rules["wait"], path):
            waiting().touch()
            time.sleep(0.02)
            rules = _rules()
        return rules

    def put_file(self, path1: str, path2: str, callback: Any = None, **kwargs: Any) -> None:
        rules, content = self._before(path2), Path(path1).read_bytes()
        if re.search(rules.get("lose", "^$"), path2):
            return
        if re.search(rules.get("half", "^$"), path2):
            Path(path2).write_bytes(content[: len(content) // 2])
            halfway().touch()
            time.sleep(600)
        if re.search(rules.get("damage", "^$"), path2) and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        Path(path2).write_bytes(content)
        if callback is not None:
            callback.relative_update(len(content))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        rules = self._before(path)
        if not re.search(rules.get("lose", "^$"), path):
            super().pipe_file(path, value, mode=mode, **kwargs)


@pytest.fixture
def shaky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the store's objects; `shaky://` is known in this process and in those that it starts."""
    plugin = tmp_path / "plugin"
    facts = plugin / "shaky_store-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: shaky-store\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[fsspec.specs]\nshaky = shaky_store.ShakyFileSystem\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(plugin), str(HERE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("SHAKY_ROOT", str(tmp_path / "objects"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine-a"))
    fsspec.register_implementation("shaky", ShakyFileSystem, clobber=True)
    return tmp_path / "objects"
