"""Checkpoints under kills, flipped bytes and truncations; the lock of a run; text replaced in one step."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import files
from shoal.errors import CheckpointError, RunError, SchemaError
from shoal.files import CheckpointDirectory, Loaded, arrays_from_bytes, load_checkpoint, write_text_atomically
from shoal.files import staging as staging_module
from shoal.files.manifest import manifest_bytes
from shoal.locks import lock_run, run_holder
from shoal.types import CURSOR

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
KILLS = int(os.environ.get("SHOAL_SAVE_KILLS", "60"))


def save(root: Path, update: int, value: float = 0.0) -> Path:
    with CheckpointDirectory(root).begin(update) as staging:
        staging.write_arrays("learner", {"w": np.full(3, value, np.float32)})
        staging.write_json("state", {"update": update})
        return staging.commit()


def tree(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def test_what_was_written_comes_back_bit_for_bit(tmp_path: Path) -> None:
    cursor = np.zeros((2, 3), CURSOR)
    cursor["seed"] = np.arange(6).reshape(2, 3)
    cursor["episode_return"] = 0.1
    arrays = {
        "float32": np.float32([[0.1, -0.0], [np.inf, np.nan]]),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float64),
        "transposed": np.arange(6).reshape(2, 3).T,
        "flags": np.array([True, False]),
        "words": np.array([2**63], np.uint64),
        "cursor": cursor,
        "no_cursor": np.zeros(0, CURSOR),
    }
    with CheckpointDirectory(tmp_path).begin(12) as staging:
        staging.write_arrays("policy/weights", arrays)
        staging.write_json("state", {"nan": math.nan, "tenth": 0.1, "big": 2**200, "numpy": np.int64(3), "row": np.arange(2)})
        (staging.path / "by_another_process.bin").write_bytes(b"learner")
        staging.commit()
    loaded = CheckpointDirectory(tmp_path).newest()
    back = loaded.arrays("policy/weights")
    assert set(back) == set(arrays)
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape, back[name].tobytes()) == (array.dtype, array.shape, array.tobytes()), name
    state = loaded.json("state")
    assert math.isnan(state.pop("nan"))
    assert state == {"tenth": 0.1, "big": 2**200, "numpy": 3, "row": [0, 1]}
    assert loaded.read("by_another_process.bin") == b"learner"
    assert (loaded.update, loaded.path.name, loaded.warnings) == (12, "update-000000012", ())
    assert [path.name for path in tmp_path.iterdir()] == ["update-000000012"]


def test_a_dtype_without_a_place_in_safetensors_is_refused(tmp_path: Path) -> None:
    with CheckpointDirectory(tmp_path).begin(1) as staging:
        for array in (np.array([object()]), np.array(["text"]), np.zeros(1, [("a", "O")])):
            with pytest.raises(SchemaError, match="'bad'"):
                staging.write_arrays("x", {"bad": array})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/tmp/outside", "manifest"])
def test_a_file_stays_inside_its_checkpoint(tmp_path: Path, name: str) -> None:
    with CheckpointDirectory(tmp_path).begin(1) as staging, pytest.raises(ValueError, match="no name"):
        staging.write_json(name, 1)


def test_a_link_is_not_committed(tmp_path: Path) -> None:
    with CheckpointDirectory(tmp_path).begin(1) as staging:
        (staging.path / "link").symlink_to("/etc/hostname")
        with pytest.raises(CheckpointError, match="link"):
            staging.commit()
    assert CheckpointDirectory(tmp_path).paths() == []


def test_an_update_saved_again_replaces_the_first_without_an_instant_without_either(tmp_path: Path) -> None:
    save(tmp_path, 4, 1.0)
    save(tmp_path, 5, 1.0)
    assert save(tmp_path, 5, 2.0).name == "update-000000005.1"
    assert save(tmp_path, 5, 3.0).name == "update-000000005.2"
    directory = CheckpointDirectory(tmp_path)
    assert directory.newest().arrays("learner")["w"][0] == 3.0
    directory.sweep(keep=2)
    assert [path.name for path in directory.paths()] == ["update-000000004", "update-000000005.2"]
    assert directory.newest().update == 5


def test_sweep_keeps_the_newest_and_removes_the_litter_of_the_dead_only(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path)
    for update in (1, 2, 30, 4):
        save(tmp_path, update)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".staging-7-{dead.pid}", f".staging-8-{os.getpid()}", ".trash-update-000000000-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.safetensors").write_bytes(b"half")
    (tmp_path / f".staging-9-{os.getppid()}").mkdir()
    (tmp_path / "notes.txt").write_text("the user's own")
    with directory.begin(31) as own:
        directory.sweep(keep=2)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            [own.path.name, f".staging-9-{os.getppid()}", "notes.txt", "update-000000004", "update-000000030"]
        )


def test_without_any_checkpoint_the_error_says_so(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            CheckpointDirectory(root).newest()


def assert_previous_is_taken(root: Path, torn: Path) -> None:
    loaded = CheckpointDirectory(root).newest()
    assert loaded.update == 1
    assert len(loaded.warnings) == 1
    assert torn.name in loaded.warnings[0]
    with pytest.raises(CheckpointError):
        files.load_checkpoint(torn)


def test_every_byte_flipped_is_detected_and_the_previous_is_taken(tmp_path: Path) -> None:
    save(tmp_path, 1)
    torn = save(tmp_path, 2)
    for path in tree(torn):
        whole = path.read_bytes()
        for at in range(len(whole)):
            for mask in (0x01, 0x20, 0xFF):
                path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
                assert_previous_is_taken(tmp_path, torn)
        path.write_bytes(whole)
    assert CheckpointDirectory(tmp_path).newest().update == 2


def test_every_truncation_extension_and_missing_file_is_detected(tmp_path: Path) -> None:
    save(tmp_path, 1)
    torn = save(tmp_path, 2)
    for path in tree(torn):
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            assert_previous_is_taken(tmp_path, torn)
        path.write_bytes(whole + b"\n")
        assert_previous_is_taken(tmp_path, torn)
        path.unlink()
        assert_previous_is_taken(tmp_path, torn)
        path.write_bytes(whole)
    assert CheckpointDirectory(tmp_path).newest().update == 2


def test_a_manifest_of_another_update_is_torn(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "update-000000003")
    assert_previous_is_taken(tmp_path, tmp_path / "update-000000003")


def test_when_none_is_whole_every_reason_is_named(tmp_path: Path) -> None:
    for update in (1, 2):
        (save(tmp_path, update) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"(?s)no whole checkpoint.*update-000000002.*update-000000001"):
        CheckpointDirectory(tmp_path).newest()


@pytest.mark.parametrize("version", [0, files.FORMAT + 1, "two", None])
def test_another_format_is_refused_in_one_line_and_not_passed_over(tmp_path: Path, version: object) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    (newest / files.MANIFEST).write_bytes(manifest_bytes({"format": version, "update": 2, "contents": "of another kind"}))
    with pytest.raises(CheckpointError, match=re.escape(f"format {version}; this version of shoal reads format {files.FORMAT}")) as caught:
        CheckpointDirectory(tmp_path).newest()
    assert "\n" not in str(caught.value)


def test_a_file_changed_after_it_was_checked_is_not_used(tmp_path: Path) -> None:
    loaded: Loaded = files.load_checkpoint(save(tmp_path, 1))
    (loaded.path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="changed after"):
        loaded.json("state")
    with pytest.raises(CheckpointError, match=r"holds no other\.json"):
        loaded.json("other")


def test_a_disk_that_refuses_without_a_name_is_told_without_one(tmp_path: Path) -> None:
    staging = CheckpointDirectory(tmp_path).begin(2)
    with pytest.raises(CheckpointError) as caught, staging.disk_errors():
        raise OSError(errno.ENOSPC, "of a write, which names no file")
    assert str(caught.value) == f"checkpoint of update 2 was not saved: No space left on device. Free space in, or mend, {tmp_path}"


@pytest.mark.parametrize("refused", range(5))
def test_a_full_disk_leaves_those_before_whole_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int) -> None:
    save(tmp_path, 1)
    calls = iter(range(100))

    def refuse(descriptor: int) -> None:
        if next(calls) == refused:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="update 2 was not saved: No space left"):
        save(tmp_path, 2)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert CheckpointDirectory(tmp_path).newest().update == (1 if refused < 4 else 2)  # the last is that of the parent, after the rename


def test_a_write_that_the_disk_refuses_discards_the_staging_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = CheckpointDirectory(tmp_path).begin(1)
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(30, "Read-only file system", "state.json")))
    with pytest.raises(CheckpointError, match=r"Read-only file system \(state\.json\)"):
        staging.write_json("state", {})
    assert list(tmp_path.iterdir()) == []


def test_a_save_is_durable_before_it_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def recording(descriptor: int) -> None:
        real(descriptor)
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", recording)
    with CheckpointDirectory(tmp_path).begin(3) as staging:
        staging.write_arrays("policy/weights", {"w": np.zeros(2)})
        staging.write_json("state", {})
        staging.commit()
    assert synced == ["weights.safetensors", "state.json", "manifest.json", "policy", staging.path.name, tmp_path.name]


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from shoal.files import CheckpointDirectory
root, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(5)

def save_for_ever(update, told):
    directory = CheckpointDirectory(root)
    while True:
        update += rng.random() < 0.8  # else the same update is saved again
        with directory.begin(update) as staging:
            staging.write_arrays("learner", {"w": np.full(2000, update)})
            staging.write_json("state", {"update": update})
            staging.commit()
        os.write(told, b"%d\\n" % update)
        directory.sweep(2)

acknowledged = -1
for n in range(kills):
    rng.random()
    pipe = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(acknowledged, pipe[1])
    os.close(pipe[1])
    if acknowledged < 0:
        begun = time.monotonic()
        acknowledged = int(os.read(pipe[0], 2))  # there is a first one
        span = max(0.02, 3 * (time.monotonic() - begun))  # a busy machine saves slowly
    time.sleep(rng.random() * span)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = b"".join(iter(lambda: os.read(pipe[0], 65536), b""))
    os.close(pipe[0])
    acknowledged = max([acknowledged, *map(int, said.split())])
    directory = CheckpointDirectory(root)
    loaded = directory.newest()
    assert not loaded.warnings, loaded.warnings
    assert acknowledged <= loaded.update <= acknowledged + 1, (acknowledged, loaded.update)
    assert loaded.json("state") == {"update": loaded.update} and (loaded.arrays("learner")["w"] == loaded.update).all()
    directory.sweep(2)
    names = sorted(os.listdir(root))
    assert len(names) <= 2 and not [name for name in names if not name.startswith("update-")], names
print("saved up to", acknowledged)
"""


def test_kills_at_random_moments_of_a_save_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), str(KILLS)], capture_output=True, text=True, timeout=600, check=False, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0


class Watcher:
    """Notes what is unpickled while it is on; an audit hook cannot be removed again."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[object] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[object, ...]) -> None:
        if self.on and event == "pickle.find_class":
            self.seen.append(args)


watcher = Watcher()


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "on", True)
    pickle.loads(b"cbuiltins\nlen\n.")
    assert watcher.seen  # the hook sees
    watcher.seen.clear()
    save(tmp_path, 1)
    (save(tmp_path, 2) / "learner.safetensors").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    CheckpointDirectory(tmp_path).newest().arrays("learner")
    with pytest.raises(CheckpointError):
        arrays_from_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert watcher.seen == []


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_crash_the_decoders(content: bytes, framed: bool) -> None:
    if framed:
        content = len(content).to_bytes(8, "little") + content
    with contextlib.suppress(CheckpointError):
        arrays_from_bytes(content)


@pytest.mark.parametrize(
    "note", ['{"a": [[["x", "<i8"]], [3]]}', '{"a": [[["x", "O"]], [1]]}', '{"b": [[["x", "<i8"]], [1]]}', '{"a": 3}', "[]", "not json"]
)
def test_a_wrong_note_on_a_structured_array_is_an_error(tmp_path: Path, note: str) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(8, np.uint8)}, tmp_path / "x.safetensors", {"structured": note})
    with pytest.raises(CheckpointError):
        arrays_from_bytes((tmp_path / "x.safetensors").read_bytes())


def test_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    write_text_atomically(path, "old")
    write_text_atomically(path, "näw")
    assert path.read_text(encoding="utf-8") == "näw"

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match=r"cannot write .*result\.json: No space"):
        write_text_atomically(path, "newest")
    assert path.read_text(encoding="utf-8") == "näw"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


HOLDER = "import sys, time; from shoal.locks import lock_run; lock = lock_run(sys.argv[1]); print('held', flush=True); time.sleep(60)"


def test_a_living_run_is_named_and_a_killed_one_leaves_the_lock(tmp_path: Path) -> None:
    assert run_holder(tmp_path) is None
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, env=ENVIRONMENT) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert run_holder(tmp_path) == other.pid
        with pytest.raises(RunError, match=f"in use by process {other.pid}"):
            lock_run(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    with lock_run(tmp_path):
        assert run_holder(tmp_path) == os.getpid()
        with pytest.raises(RunError, match=f"{os.getpid()}"):
            lock_run(tmp_path)
    assert run_holder(tmp_path) is None


ORPHAN = """
import os, sys, time
from shoal.locks import lock_run
lock = lock_run(sys.argv[1])
if os.fork():
    os._exit(0)
print("forked", flush=True)
time.sleep(60)
"""


def test_a_forked_child_does_not_hold_the_run(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(tmp_path)], stdout=subprocess.PIPE, env=ENVIRONMENT, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        parent.wait()
        try:
            lock_run(tmp_path, wait_seconds=300).release()
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "policy/../../outside.json", "", "pipe"])
def test_a_manifest_that_points_elsewhere_is_torn_whatever_its_hashes_say(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "checkpoints", 1)
    (tmp_path / "outside.json").write_text("{}")
    os.mkfifo(path / "pipe")
    found = (path / name).read_bytes() if (path / name).is_file() else b""
    entry = {"bytes": len(found), "sha256": hashlib.sha256(found).hexdigest()}
    (path / files.MANIFEST).write_bytes(manifest_bytes({"format": files.FORMAT, "update": 1, "files": {name: entry}}))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def test_a_manifest_is_what_its_documentation_says(tmp_path: Path) -> None:
    manifest = json.loads((save(tmp_path, 6) / "manifest.json").read_text())["manifest"]
    assert (manifest["format"], manifest["update"]) == (1, 6)
    assert set(manifest["files"]) == {"learner.safetensors", "state.json"}
    assert set(manifest["files"]["state.json"]) == {"bytes", "sha256"}


def test_a_file_that_is_linked_from_the_checkpoint_before_is_not_read_again_but_verified_when_loaded(tmp_path: Path, monkeypatch) -> None:
    with CheckpointDirectory(tmp_path).begin(1) as staging:
        assert staging.previous is None
        (staging.path / "large.bin").write_bytes(b"large")
        first = staging.commit()
    read: list[str] = []
    digest = staging_module.digest
    monkeypatch.setattr(staging_module, "digest", lambda path, **how: read.append(path.name) or digest(path, **how))
    with CheckpointDirectory(tmp_path).begin(2) as staging:
        assert staging.previous == first
        os.link(first / "large.bin", staging.path / "large.bin")
        (staging.path / "small.bin").write_bytes(b"small")
        second = staging.commit()
    assert read == ["small.bin"]
    assert load_checkpoint(second).read("large.bin") == b"large"
    CheckpointDirectory(tmp_path).sweep(1)
    assert not first.exists()
    assert load_checkpoint(second).read("large.bin") == b"large"
    (second / "large.bin").write_bytes(b"lArge")
    with pytest.raises(CheckpointError, match=r"large\.bin does not have the SHA-256"):
        load_checkpoint(second)


def test_a_linked_file_that_no_checkpoint_knows_is_hashed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"content")
    with CheckpointDirectory(tmp_path / "checkpoints").begin(1) as staging:
        os.link(outside, staging.path / "linked.bin")
        committed = staging.commit()
    assert load_checkpoint(committed).files["linked.bin"] == (7, hashlib.sha256(b"content").hexdigest())
