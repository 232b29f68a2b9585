"""Objects under a URL, on the file systems that fsspec brings and on one that fails: what is there, what is not, and what is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from shaky_store import SECRET, rule
from webhdfs_server import http_store

from shoal.errors import ConfigError, StorageError
from shoal.storage.objects import MissingError, Store, retried


@pytest.fixture(params=["file", "memory", "shaky", "http"])
def store(request: pytest.FixtureRequest, tmp_path: Path, shaky: Path) -> Iterator[Store]:
    if request.param == "http":
        with http_store() as (url, _):
            yield Store(f"{url}/runs/run")
        return
    place = {"file": f"{tmp_path}/store/run", "memory": f"{request.node.name.partition(chr(91))[0]}/run", "shaky": "bucket/runs/run"}[
        request.param
    ]
    yield Store(f"{request.param}://{place}")


def test_what_is_put_comes_back_and_what_is_removed_is_gone(store: Store, tmp_path: Path) -> None:
    assert store.read("config.yaml") is None
    assert store.size("checkpoints/a/b") is None
    assert store.files("checkpoints") == {}
    assert store.directories() == []
    store.write("config.yaml", b"first")
    store.write("config.yaml", b"second")
    assert store.read("config.yaml") == b"second"
    assert store.files("") == {"config.yaml": 6}
    here, back = tmp_path / "here", tmp_path / "back"
    here.write_bytes(b"0123456789")
    store.put("checkpoints/one/policy/weights", here)
    assert store.copy("checkpoints/one/policy/weights", "checkpoints/two/weights")
    assert not store.copy("checkpoints/missing", "checkpoints/three")
    store.get("checkpoints/two/weights", back)
    assert back.read_bytes() == b"0123456789"
    assert store.files("checkpoints") == {"checkpoints/one/policy/weights": 10, "checkpoints/two/weights": 10}
    assert store.directories() == ["checkpoints"]
    store.replace("config.yaml", here)
    assert store.read("config.yaml") == b"0123456789"
    store.remove("config.yaml")
    store.remove("config.yaml")
    assert store.read("config.yaml") is None
    store.remove_all("checkpoints/one")
    store.remove_all("checkpoints/one")
    assert store.files("checkpoints") == {"checkpoints/two/weights": 10}
    with pytest.raises(MissingError, match="there is no"):
        store.get("checkpoints/one/policy/weights", back)


def test_only_the_first_creates(store: Store) -> None:
    assert store.create("run.lock", b"first")
    assert not store.create("run.lock", b"second")
    assert store.read("run.lock") == b"first"


def test_what_is_too_long_for_what_it_should_be_is_not_read(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.storage.objects.SMALL_BYTES", 5)
    store.write("run.json", b"123456")
    with pytest.raises(StorageError, match="6 bytes"):
        store.read("run.json")


def test_a_store_that_cannot_be_reached_is_said_in_one_line_without_its_secrets_and_is_never_empty(shaky: Path, tmp_path: Path) -> None:
    store = Store("shaky://bucket/run")
    store.write("config.yaml", b"x")
    rule(away=True)
    calls: list[Callable[[], object]] = [
        lambda: store.read("config.yaml"), lambda: store.write("config.yaml", b"y"), lambda: store.create("new", b"y"),
        lambda: store.files(""), store.directories, lambda: store.size("config.yaml"), lambda: store.put("new", tmp_path / "plugin"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StorageError, match=r"^cannot \w+ shaky://bucket/run[^\n]*ConnectionError[^\n]*$") as failed:
            call()
        assert SECRET not in str(failed.value)
        assert failed.value.__cause__ is None
        assert failed.value.__suppress_context__
    rule()
    assert store.read("config.yaml") == b"x"


def test_what_fails_now_and_then_is_tried_again_and_what_is_missing_is_not(shaky: Path) -> None:
    store, waited = Store("shaky://bucket/run"), list[float]()
    rule(fail=[2, "config"])
    retried(lambda: store.write("config.yaml", b"x"), sleep=waited.append)
    assert store.read("config.yaml") == b"x"
    assert waited == [1.0, 2.0]
    rule(fail=[3, "config"])
    with pytest.raises(StorageError, match="hung up"):
        retried(lambda: store.write("config.yaml", b"x"), sleep=waited.append)
    del waited[:]
    with pytest.raises(MissingError):
        retried(lambda: store.get("missing", shaky / "x"), sleep=waited.append)
    assert waited == []


def test_a_protocol_that_is_not_there_is_said_with_what_to_install() -> None:
    with pytest.raises(ConfigError, match="knows no file system nowhere://"):
        Store("nowhere://x/y")
    fsspec.register_implementation("bucketless", "package_that_is_not_there.Store", clobber=True)
    with pytest.raises(
        ConfigError, match="needs the package package_that_is_not_there, which is not installed: pip install package_that_is_not_there"
    ):
        Store("bucketless://x/y")


def test_fsspec_is_imported_for_a_url_alone(tmp_path: Path) -> None:
    code = (
        "import sys, shoal.runs, shoal.api\n"
        "shoal.runs.list_runs('.')\n"
        "print('fsspec' in sys.modules)\n"
        "from shoal.storage.objects import Store\n"
        "Store('memory://x')\n"
        "print('fsspec' in sys.modules, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]
    script = "import sys\nsys.modules['fsspec'] = None\nfrom shoal.storage.objects import Store\nStore('memory://x')"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "pip install 'shoal[storage]'" in done.stderr
