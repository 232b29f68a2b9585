"""Checkpoints in a store: whole or not there, whatever is lost, torn or changed; and which of them stay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from shaky_store import rule

from shoal.errors import CheckpointError, StorageError
from shoal.files import FACTS, MANIFEST, CheckpointDirectory, TornError
from shoal.files.manifest import manifest_bytes
from shoal.storage.checkpoints import committed, fetch_newest, newest_whole, sweep, upload
from shoal.storage.objects import Store


def save(root: Path, update: int, replay: bytes = b"replay") -> Path:
    with CheckpointDirectory(root).begin(update) as staging:
        staging.write_arrays("learner", {"w": np.full(3, update, np.float32)})
        staging.write_json("policy/policy", {"update": update})
        (staging.path / "replay").mkdir()
        (staging.path / "replay" / "rows").write_bytes(replay)
        return staging.commit()


@pytest.fixture
def store(shaky: Path) -> Store:
    return Store("shaky://bucket/run")


def place(shaky: Path, update: int) -> Path:
    return shaky / "bucket" / "run" / "checkpoints" / f"update-{update:09d}"


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_what_was_uploaded_is_the_same_here_and_there_and_comes_back_bit_for_bit(store: Store, shaky: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "here", 7)
    assert upload(store, path, 0).update == 7
    assert tree(place(shaky, 7)) == tree(path)
    there = CheckpointDirectory(tmp_path / "there")
    assert fetch_newest(store, there) == (7, [])
    assert tree(there.newest().path) == tree(path)
    part = CheckpointDirectory(tmp_path / "part")
    fetch_newest(store, part, lambda file: not file.startswith("replay/"))
    assert set(tree(part.newest().path)) == {"learner.safetensors", "policy/policy.json", MANIFEST}


def test_a_store_without_checkpoints_has_none(store: Store, tmp_path: Path) -> None:
    assert fetch_newest(store, CheckpointDirectory(tmp_path)) == (None, [])
    assert newest_whole(store) == (None, [])


def test_an_upload_that_ends_before_its_manifest_is_not_there_and_is_swept(store: Store, shaky: Path, tmp_path: Path) -> None:
    upload(store, save(tmp_path / "here", 1), 0)
    second = save(tmp_path / "here", 2)
    rule(fail=[1, r"update-000000002/policy"])
    with pytest.raises(StorageError, match="hung up"):
        upload(store, second, 0)
    assert place(shaky, 2).is_dir()
    assert committed(store) == [(1, 0)]
    assert fetch_newest(store, CheckpointDirectory(tmp_path / "there")) == (1, [])
    upload(store, save(tmp_path / "here", 3), 0)
    sweep(store, 3, keep=2)
    assert not place(shaky, 2).exists()
    assert committed(store) == [(1, 0), (3, 0)]


@pytest.mark.parametrize("lost", ["learner.safetensors", "replay/rows"])
def test_what_the_store_took_and_does_not_have_is_seen_before_the_manifest_is_written(store: Store, lost: str, tmp_path: Path) -> None:
    rule(lose=lost)
    with pytest.raises(StorageError, match=f"{lost} has None bytes after"):
        upload(store, save(tmp_path, 1), 0)
    assert committed(store) == []


def test_the_guard_is_asked_before_the_manifest_is_written(store: Store, tmp_path: Path) -> None:
    def refuses() -> None:
        raise StorageError("not yours")

    with pytest.raises(StorageError, match="not yours"):
        upload(store, save(tmp_path, 1), 0, guard=refuses)
    assert committed(store) == []


def test_a_checkpoint_that_was_damaged_here_is_not_uploaded(store: Store, tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "replay" / "rows").write_bytes(b"replaY")
    with pytest.raises(TornError, match="replay/rows does not have the SHA-256"):
        upload(store, path, 0)
    assert committed(store) == []


def damages(path: Path) -> dict[str, tuple[Path, bytes | None]]:
    """What may be wrong with a committed checkpoint: a file and its content then, None where it is missing."""
    learner, manifest = path / "learner.safetensors", path / MANIFEST
    whole = learner.read_bytes()
    return {
        "a file is missing": (learner, None),
        "all its files are missing": (path, None),
        "a file is shorter": (learner, whole[:-1]),
        "a file is longer": (learner, whole + b"\0"),
        "a byte is another one": (learner, whole[:-1] + bytes([whole[-1] ^ 1])),
        "the manifest is cut": (manifest, manifest.read_bytes()[:-20]),
        "the manifest is empty": (manifest, b""),
        "the manifest is that of another update": (manifest, manifest.read_bytes().replace(b'"update":2', b'"update":9')),
        "the manifest was signed for another update": (manifest, manifest_bytes({**json.loads(manifest.read_bytes())["manifest"], "update": 9})),
        "the manifest leads outside": (manifest, manifest_bytes({"format": 1, "update": 2, "files": {"../x": {"bytes": 1, "sha256": ""}}})),
    }  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        "a file is missing", "all its files are missing", "a file is shorter", "a file is longer", "a byte is another one", "the manifest is cut",
        "the manifest is empty", "the manifest is that of another update", "the manifest was signed for another update", "the manifest leads outside",
    ],
)  # fmt: skip
def test_a_damaged_one_is_found_before_use_and_the_one_before_it_is_taken(damage: str, store: Store, shaky: Path, tmp_path: Path) -> None:
    for update in (1, 2):
        upload(store, save(tmp_path / "here", update), 0)
    path, content = damages(place(shaky, 2))[damage]
    if path.is_dir():
        for file in [file for file in path.rglob("*") if file.is_file() and file.name != MANIFEST]:
            file.unlink()
    elif content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    there = CheckpointDirectory(tmp_path / "there")
    update, said = fetch_newest(store, there)
    assert (update, there.newest().update, len(there.paths())) == (1, 1, 1)
    assert len(said) == 1
    assert "update-000000002 in shaky://bucket/run is not whole" in said[0]
    assert said[0].endswith("taking the one before it")
    assert list((tmp_path / "there").iterdir()) == [there.newest().path]
    if damage != "a byte is another one":  # which sizes do not tell
        stored, torn = newest_whole(store)
        assert (stored is not None and stored.update, len(torn)) == (1, 1)


def spoil_replay(path: Path, how: str) -> str:
    """Returns how that is said."""
    rows = path / "replay" / "rows"
    if how == "missing":
        rows.unlink()
        return "replay/rows is missing"
    rows.write_bytes(rows.read_bytes()[:-1] + (b"Y" if how == "another byte" else b""))
    return (
        "replay/rows does not have the SHA-256 that the manifest says" if how == "another byte" else "replay/rows has 5 bytes instead of 6"
    )


@pytest.mark.parametrize("how", ["missing", "shorter", "another byte"])
def test_a_damaged_replay_is_left_out_where_nobody_needs_it_and_passed_over_where_somebody_does(
    how: str, store: Store, shaky: Path, tmp_path: Path
) -> None:
    for update in (1, 2):
        upload(store, save(tmp_path / "here", update), 0)
    damage = spoil_replay(place(shaky, 2), how)
    name = "checkpoint update-000000002 in shaky://bucket/run"
    without = CheckpointDirectory(tmp_path / "without")
    assert fetch_newest(store, without, replay=False) == (2, [f"{name} is taken without its replay ({damage})"])
    loaded = without.newest_to_go_on(replay=False)
    assert (loaded.update, set(loaded.files), "replay/rows" in loaded.replay_damage) == (
        2,
        {"learner.safetensors", "policy/policy.json"},
        True,
    )
    assert (loaded.path / MANIFEST).read_bytes() == (place(shaky, 2) / MANIFEST).read_bytes(), "it is not signed for what is there"
    with pytest.raises(CheckpointError, match=r"update-000000002 is not whole \(.*replay/rows"):
        without.newest()
    within = CheckpointDirectory(tmp_path / "within")
    assert fetch_newest(store, within) == (1, [f"{name} is not whole ({damage}); taking the one before it"])
    assert within.newest().update == 1


def test_where_every_replay_is_damaged_the_error_says_how_to_go_on_without(store: Store, shaky: Path, tmp_path: Path) -> None:
    for update in (1, 2):
        upload(store, save(tmp_path / "here", update), 0)
        spoil_replay(place(shaky, update), "shorter")
    there = CheckpointDirectory(tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"which alone is damaged: `shoal resume shaky://bucket/run --checkpoint\.replay false`"):
        fetch_newest(store, there)
    (place(shaky, 2) / "learner.safetensors").unlink()
    assert fetch_newest(store, there, replay=False)[0] == 1
    (place(shaky, 1) / "learner.safetensors").unlink()
    for replay in (True, False):
        with pytest.raises(CheckpointError, match=r"or move them away, and `shoal resume` begins again from the start"):
            fetch_newest(store, there, replay=replay)


def test_a_whole_replay_is_brought_also_where_it_need_not_be(store: Store, tmp_path: Path) -> None:
    path = save(tmp_path / "here", 1)
    upload(store, path, 0)
    there = CheckpointDirectory(tmp_path / "there")
    assert fetch_newest(store, there, replay=False) == (1, [])
    assert tree(there.newest().path) == tree(path)


def test_a_store_that_does_not_answer_is_no_damage_to_a_replay(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(store, save(tmp_path / "here", 1), 0)
    get = Store.get

    def hung_up(self: Store, name: str, path: Path) -> None:
        if name.endswith("replay/rows"):
            raise StorageError("the store hung up")
        get(self, name, path)

    monkeypatch.setattr(Store, "get", hung_up)
    there = CheckpointDirectory(tmp_path / "there")
    with pytest.raises(StorageError, match="hung up"):
        fetch_newest(store, there, replay=False)
    assert there.paths() == []


def test_one_of_another_run_is_passed_over_and_what_comes_here_says_whose_it_is(store: Store, shaky: Path, tmp_path: Path) -> None:
    for name, update, run in (("here", 1, "a1" * 16), ("other", 2, "b2" * 16)):
        (tmp_path / name).mkdir()
        (tmp_path / name / FACTS).write_text(json.dumps({"run_id": run}))
        upload(store, save(tmp_path / name / "checkpoints", update), 0)
    store.write(FACTS, (tmp_path / "here" / FACTS).read_bytes())
    there = CheckpointDirectory(tmp_path / "there" / "checkpoints")
    warning = "checkpoint update-000000002 in shaky://bucket/run is of another run"
    assert fetch_newest(store, there) == (1, [f"{warning}; taking the one before it"])
    assert there.named_run() == "a1" * 16
    stored, passed = newest_whole(store)
    assert (stored is not None and stored.update, passed) == (1, [warning])
    for file in place(shaky, 1).glob("*.*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=f"no whole checkpoint of this run in shaky://bucket/run: {warning}"):
        fetch_newest(store, there)


def test_where_none_is_whole_that_is_an_error_and_where_the_store_is_away_nothing_is_taken_for_torn(
    store: Store, shaky: Path, tmp_path: Path
) -> None:
    upload(store, save(tmp_path / "here", 1), 0)
    there = CheckpointDirectory(tmp_path / "there")
    rule(away=True)
    with pytest.raises(StorageError, match="cannot list"):
        fetch_newest(store, there)
    rule()
    (place(shaky, 1) / "learner.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint of this run in shaky://bucket/run"):
        fetch_newest(store, there)
    assert there.paths() == []


def test_the_newest_updates_stay_with_their_newest_revisions_and_those_that_were_undone_go(
    store: Store, shaky: Path, tmp_path: Path
) -> None:
    for update in (1, 2, 3, 9):
        upload(store, save(tmp_path / "here", update), 0)
    upload(store, save(tmp_path / "again", 3), 0)
    upload(store, save(tmp_path / "other", 3), 2)
    (shaky / "bucket" / "run" / "checkpoints" / "notes.txt").write_text("the user's own")
    assert committed(store) == [(1, 0), (2, 0), (3, 0), (3, 1), (3, 2000), (9, 0)]
    sweep(store, 3, keep=2)  # the run went back behind 9, and made 3 again
    assert committed(store) == [(2, 0), (3, 2000)]
    assert (shaky / "bucket" / "run" / "checkpoints" / "notes.txt").exists()


def test_a_file_that_did_not_change_is_copied_within_the_store(store: Store, shaky: Path, tmp_path: Path) -> None:
    first = upload(store, save(tmp_path / "here", 1, b"large"), 0)
    rule(fail=[1, r"update-000000002/replay/rows"])  # a second transfer would fail
    second = upload(store, save(tmp_path / "here", 2, b"large"), 0, before=first)
    rule()
    assert (place(shaky, 2) / "replay" / "rows").read_bytes() == b"large"
    (place(shaky, 2) / "replay" / "rows").unlink()  # whoever cannot copy it transfers it
    upload(store, save(tmp_path / "here", 3, b"large"), 0, before=second)
    assert (place(shaky, 3) / "replay" / "rows").read_bytes() == b"large"
    assert fetch_newest(store, CheckpointDirectory(tmp_path / "there")) == (3, [])
