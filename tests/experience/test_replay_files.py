"""A replay's files: what is written, what is linked, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from replay_world import IMAGE, VECTOR, Kind, World
from shoal.config import ReplayConfig
from shoal.errors import CheckpointError
from shoal.experience import replay_rows
from shoal.experience.replay import Replay
from shoal.files import CheckpointDirectory

KIND = Kind((IMAGE, VECTOR), mask=True, memory=True)
STEPS = ReplayConfig(capacity_steps=600, prioritised=True, n_step=3)
SEQUENCES = STEPS.model_copy(update={"sequence_length": 10, "burn_in": 3})


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(replay_rows, "_LEAST_CHUNK_BYTES", 512)


def filled(world: World, config: ReplayConfig, rounds: int, run: str | None = None) -> Replay:
    replay = Replay(world.schema, KIND.groups, config, gamma=0.9, run=run)
    grow(replay, world, rounds)
    return replay


def grow(replay: Replay, world: World, rounds: int, *also: Replay) -> None:
    for _ in range(rounds):
        for group in range(KIND.groups):
            slot, _ = world.rollout(group, end_share=0.1)
            for one in (replay, *also):
                one.insert(slot, 0)


def drawn(replay: Replay, config: ReplayConfig) -> bytes:
    draw = replay.sample if config.sequence_length is None else replay.sample_sequences
    return b"".join(array.tobytes() for array in flat(vars(draw(50, np.random.default_rng(5), beta=0.5))))


def flat(values) -> list:
    return [a for v in values.values() for a in (flat(v) if isinstance(v, dict) else [np.asarray(v)])]


def inodes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in directory.iterdir()}


@pytest.mark.parametrize("config", [STEPS, SEQUENCES], ids=["steps", "sequences"])
def test_chunks_that_did_not_change_are_linked_and_the_others_written(config, tmp_path):
    world = World(KIND)
    replay = filled(world, config, 12)
    replay.save(tmp_path / "1", None)
    grow(replay, world, 1)
    replay.save(tmp_path / "2", tmp_path / "1")
    before, after = inodes(tmp_path / "1"), inodes(tmp_path / "2")
    shared = {name for name in after if after[name] == before.get(name)}
    changed = {name for name in after if name.startswith("rows") and name not in shared}
    assert len(shared) > len(changed) >= 1
    assert not any(name.startswith("state") for name in shared)


def test_a_chunk_that_is_linked_is_not_written_again_through_its_link(tmp_path):
    replay = filled(World(KIND), STEPS, 12)
    replay.save(tmp_path / "1", None)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "1").iterdir()}
    replay.save(tmp_path / "2", tmp_path / "1")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "1").iterdir()} == before


def rewritten(path: Path, content: bytes, time_ns: int) -> None:
    path.write_bytes(content)
    os.utime(path, ns=(time_ns, time_ns))


def replaced(path: Path, content: bytes, time_ns: int) -> None:
    new = path.with_name("new")
    rewritten(new, content, time_ns)
    new.rename(path)


@pytest.mark.parametrize(
    ("change", "length", "time"),
    [(replaced, 0, 0), (rewritten, 1, 0), (rewritten, 0, 1)],
    ids=["inode", "size", "time of change"],
)
def test_a_file_that_somebody_changed_is_not_linked_whatever_gives_it_away(change, length, time, tmp_path):
    replay = filled(World(KIND), STEPS, 12)
    replay.save(tmp_path / "1", None)
    path = tmp_path / "1" / "rows-000.safetensors"
    content, status = path.read_bytes(), path.stat()
    change(path, bytes(len(content) + length), status.st_mtime_ns + time)
    replay.save(tmp_path / "2", tmp_path / "1")
    assert (tmp_path / "2" / path.name).read_bytes() == content


def draw_and_rank(replay: Replay, config: ReplayConfig, scale: float = 0.3) -> np.ndarray:
    draw = replay.sample if config.sequence_length is None else replay.sample_sequences
    sample = draw(100, np.random.default_rng(3), beta=0.5)
    replay.update_priorities(sample.index_M, scale * np.linspace(0.03, 1.0, 100))
    return sample.index_M


@pytest.mark.parametrize("config", [STEPS, SEQUENCES], ids=["steps", "sequences"])
def test_what_is_restored_from_linked_chunks_goes_on_bit_for_bit(config, tmp_path):
    world = World(KIND)
    replay = filled(world, config, 12)
    for save in range(1, 13):
        replay.save(tmp_path / str(save), tmp_path / str(save - 1))
        draw_and_rank(replay, config)
        grow(replay, world, 1)
        replay.save(tmp_path / f"{save}b", tmp_path / str(save))
        again = Replay(world.schema, KIND.groups, config, gamma=0.9)
        again.load(tmp_path / f"{save}b")
        for _ in range(4):
            assert drawn(again, config) == drawn(replay, config)
            grow(replay, world, 1, again)


def test_what_was_loaded_is_linked_on(tmp_path):
    world = World(KIND)
    filled(world, STEPS, 12).save(tmp_path / "1", None)
    again = Replay(world.schema, KIND.groups, STEPS, gamma=0.9)
    again.load(tmp_path / "1")
    again.save(tmp_path / "2", tmp_path / "1")
    before, after = inodes(tmp_path / "1"), inodes(tmp_path / "2")
    assert {name for name in after if after[name] != before[name]} == {"state.json", "state.safetensors"}


def test_a_directory_is_made_with_those_above_it_and_may_be_there(tmp_path):
    """One of several learners saves into replay/0-of-2."""
    world = World(KIND)
    replay = filled(world, STEPS, 2)
    for _ in range(2):
        replay.save(tmp_path / "replay" / "0-of-2", None)
    again = Replay(world.schema, KIND.groups, STEPS, gamma=0.9)
    again.load(tmp_path / "replay" / "0-of-2")
    assert drawn(again, STEPS) == drawn(replay, STEPS)


def test_a_file_of_another_time_line_is_not_taken_for_ones_own(tmp_path):
    world = World(KIND)
    filled(World(KIND, seed=9), STEPS, 12).save(tmp_path / "other", None)
    replay = filled(world, STEPS, 12)
    replay.save(tmp_path / "1", None)
    replay.save(tmp_path / "2", tmp_path / "other")
    replay.save(tmp_path / "3", tmp_path / "not there")
    for directory in ("2", "3"):
        again = Replay(world.schema, KIND.groups, STEPS, gamma=0.9)
        again.load(tmp_path / directory)
        assert drawn(again, STEPS) == drawn(replay, STEPS)


def test_a_save_that_failed_halfway_takes_nothing_from_the_next(tmp_path, monkeypatch):
    world = World(KIND)
    replay = filled(world, STEPS, 12)
    replay.save(tmp_path / "1", None)
    grow(replay, world, 2)
    written = Path.write_bytes

    def full(path, content):
        if path.name == "state.safetensors":
            raise OSError(28, "No space left on device", str(path))
        return written(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            replay.save(tmp_path / "2", tmp_path / "1")
    for path in (tmp_path / "2").iterdir():
        path.unlink()
    grow(replay, world, 1)
    replay.save(tmp_path / "3", tmp_path / "1")
    again = Replay(world.schema, KIND.groups, STEPS, gamma=0.9)
    again.load(tmp_path / "3")
    assert drawn(again, STEPS) == drawn(replay, STEPS)


@pytest.mark.parametrize("config", [STEPS, SEQUENCES], ids=["steps", "sequences"])
def test_a_flipped_byte_in_any_file_is_found_before_it_is_used(config, tmp_path):
    world = World(KIND)
    filled(world, config, 3).save(tmp_path / "replay", None)
    rng = np.random.default_rng(0)
    for path in sorted((tmp_path / "replay").iterdir()):
        content = path.read_bytes()
        for at in {0, len(content) - 1, *rng.integers(0, len(content), 6).tolist()}:
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << int(rng.integers(8))]) + content[at + 1 :])
            with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
                Replay(world.schema, KIND.groups, config, gamma=0.9).load(tmp_path / "replay")
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError):
            Replay(world.schema, KIND.groups, config, gamma=0.9).load(tmp_path / "replay")
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            Replay(world.schema, KIND.groups, config, gamma=0.9).load(tmp_path / "replay")
        path.write_bytes(content)
    Replay(world.schema, KIND.groups, config, gamma=0.9).load(tmp_path / "replay")


def test_a_checkpoint_with_a_damaged_chunk_is_passed_over(tmp_path):
    world = World(KIND)
    replay, directory = filled(world, STEPS, 12), CheckpointDirectory(tmp_path)
    for update in (1, 2):
        grow(replay, world, 1)
        with directory.begin(update) as staging:
            replay.save(staging.path / "replay", staging.previous and staging.previous / "replay")
            staging.commit()
    newest, before = reversed(directory.paths())
    own = next(p for p in sorted((newest / "replay").iterdir()) if p.stat().st_nlink == 1)
    assert any(p.stat().st_nlink == 2 for p in (newest / "replay").iterdir())
    content = bytearray(own.read_bytes())
    content[-1] ^= 1
    own.write_bytes(bytes(content))
    loaded = directory.newest()
    assert loaded.path == before
    assert own.name in loaded.warnings[0]


def test_a_replay_of_other_settings_is_refused_with_what_to_do(tmp_path):
    world = World(KIND)
    filled(world, STEPS, 2).save(tmp_path / "replay", None)
    for capacity in (300, 594, 606, 1200):
        other = STEPS.model_copy(update={"capacity_steps": capacity})
        with pytest.raises(CheckpointError, match=r"rows for each environment.*resume with the replay\.capacity_"):
            Replay(world.schema, KIND.groups, other, gamma=0.9).load(tmp_path / "replay")
    with pytest.raises(CheckpointError, match="does not hold the state"):
        Replay(world.schema, KIND.groups, SEQUENCES, gamma=0.9).load(tmp_path / "replay")


def test_an_empty_replay_is_saved_and_loaded(tmp_path):
    world = World(KIND)
    Replay(world.schema, KIND.groups, STEPS, gamma=0.9).save(tmp_path / "replay", None)
    assert sorted(os.listdir(tmp_path / "replay")) == ["state.json", "state.safetensors"]
    again = Replay(world.schema, KIND.groups, STEPS, gamma=0.9)
    again.load(tmp_path / "replay")
    assert again.num_steps == 0
    grow(again, world, 1)
    assert drawn(again, STEPS) == drawn(filled(World(KIND), STEPS, 1), STEPS)


@pytest.mark.parametrize("config", [STEPS, SEQUENCES], ids=["steps", "sequences"])
def test_ages_and_the_share_of_new_steps_are_those_from_before_the_save(config, tmp_path):
    """What is inserted next enters at the largest priority so far."""
    world = World(KIND)
    replay = filled(world, config, 8)
    slot, _ = world.rollout(0, version=3)
    replay.insert(slot, 7)
    names = np.unique(draw_and_rank(replay, config, scale=20.0))
    replay.update_priorities(names, np.full(len(names), 0.5))
    replay.save(tmp_path / "replay", None)
    again = Replay(world.schema, KIND.groups, config, gamma=0.9)
    again.load(tmp_path / "replay")
    assert drawn(again, config) == drawn(replay, config)
    assert (again.inserted_steps, again.evicted_steps) == (replay.inserted_steps, replay.evicted_steps)
    assert again._version == 7
    grow(replay, world, 4, again)
    assert drawn(again, config) == drawn(replay, config)


def test_the_replay_finds_it_when_a_sequence_can_be_drawn_that_is_not_whole_or_not_there():
    replay = filled(World(KIND), SEQUENCES, 40)
    replay.check_valid()
    starts = replay._starts
    every = np.arange(len(replay._priorities.tree.leaves))
    since = replay._newest_C[every // starts.rows.num_rows] - starts.rows.take("row", every)
    waits = np.flatnonzero((replay._priorities.tree.leaves == 0) & (since < starts.length))
    gone = np.flatnonzero(since > replay._store.layout.reach)
    for wrong in (waits, gone):
        assert len(wrong)
        replay._priorities.enter(wrong[:1])
        with pytest.raises(AssertionError):
            replay.check_valid()
        replay._priorities.clear(wrong[:1])
        replay.check_valid()


@pytest.mark.parametrize("rounds", [0, 3], ids=["empty", "with rows"])
@pytest.mark.parametrize(("saved", "loaded", "refused"), [("a", "b", True), ("a", "a", False), (None, "b", False), ("a", None, False)])
def test_a_replay_that_says_it_is_of_another_run_is_refused_and_one_that_says_nothing_is_read(saved, loaded, refused, rounds, tmp_path):
    filled(World(KIND), STEPS, rounds, saved and saved * 32).save(tmp_path, None)
    again = filled(World(KIND), STEPS, 0, loaded and loaded * 32)
    if refused:
        with pytest.raises(
            CheckpointError, match=rf"{tmp_path} is the replay of run {'a' * 32}, and not of this one, {'b' * 32}\. Move its"
        ):
            again.load(tmp_path)
    else:
        again.load(tmp_path)
        assert (again.inserted_steps > 0) == (rounds > 0)
