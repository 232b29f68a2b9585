"""What a run goes on from: its own checkpoints, whatever else lies beside them, and those whose replay alone is damaged."""

from __future__ import annotations

import io
import json
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest

import shoal
from rollout_fakes import SMALL_DQN, Drift
from shoal.errors import CheckpointError, RunError
from shoal.files import FACTS, CheckpointDirectory
from shoal.files.manifest import manifest_bytes, read_manifest
from shoal.monitoring.live import SilentView
from shoal.monitoring.store import RunReader

DQN: dict[str, Any] = {**SMALL_DQN, "actors": 0}


def silent() -> SilentView:
    return SilentView(io.StringIO())


def train(directory: Path, updates: int, seed: int = 3, **more: Any) -> Path:
    return shoal.train(Drift, run_dir=str(directory), progress=silent(), stop={"updates": updates}, seed=seed, **{**DQN, **more}).path


def resume(directory: Path, updates: int, **more: Any) -> shoal.Run:
    return shoal.resume(directory, env=Drift, progress=silent(), **{"stop.updates": updates, **more})


def warnings_of(directory: Path) -> list[str]:
    with RunReader(directory / "run.db") as reader:
        return [event["message"] for event in reader.events("warning")]


def sign(checkpoint: Path, **changes: Any) -> None:
    """Make the manifest anew for what lies there now, with other words where they are given."""
    import hashlib

    files = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"):
        content = file.read_bytes()
        files[file.relative_to(checkpoint).as_posix()] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())["manifest"] | {"files": files} | changes
    (checkpoint / "manifest.json").write_bytes(manifest_bytes({name: value for name, value in manifest.items() if value is not None}))


def newest(directory: Path) -> Path:
    return CheckpointDirectory(directory / "checkpoints").paths()[-1]


# ---- whose they are --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shapes", ["the same shapes", "other shapes"])
def test_a_checkpoint_of_another_run_is_passed_over_with_a_warning_and_left_alone(shapes, tmp_path):
    expected = resume(train(tmp_path / "expected", 4), 8).result["weights_sha256"]
    run = train(tmp_path / "run", 4)
    other = train(tmp_path / "other", 6, seed=4, **({} if shapes == "the same shapes" else {"policy": {"hidden_sizes": [16, 16]}}))
    strange = run / "checkpoints" / newest(other).name
    shutil.copytree(newest(other), strange)
    assert resume(run, 8).result["weights_sha256"] == expected
    assert f"checkpoint {strange.name} is of another run; taking the one before it" in warnings_of(run)
    assert strange in CheckpointDirectory(run / "checkpoints").paths()
    assert len(CheckpointDirectory(run / "checkpoints").paths()) == 1 + 3  # and checkpoint.keep of its own


def test_where_all_are_of_another_run_the_error_says_so(tmp_path):
    run, other = train(tmp_path / "run", 2), train(tmp_path / "other", 3, seed=4)
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(newest(other), run / "checkpoints" / newest(other).name)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint of this run in .*update-000000003 is of another run\. Put a copy back"):
        resume(run, 4)
    with pytest.raises(CheckpointError, match="is of another run"):
        shoal.load(run, env=Drift).policy()


@pytest.mark.parametrize("how", ["moved", "copied", "run.json is lost", "made before checkpoints said it"])
def test_a_run_that_is_the_same_one_is_gone_on_with(how, tmp_path):
    expected = resume(train(tmp_path / "expected", 4), 8).result["weights_sha256"]
    run = train(tmp_path / "run", 4)
    name = json.loads((run / FACTS).read_text())["run_id"]
    assert read_manifest(newest(run)).run == name
    if how == "moved":
        run = run.rename(tmp_path / "elsewhere")
    elif how == "copied":
        run = Path(shutil.copytree(run, tmp_path / "elsewhere"))
    elif how == "run.json is lost":
        (run / FACTS).unlink()
    else:
        for path in CheckpointDirectory(run / "checkpoints").paths():
            sign(path, run=None)
    assert resume(run, 8).result["weights_sha256"] == expected
    assert not [said for said in warnings_of(run) if "another run" in said]
    assert json.loads((run / FACTS).read_text())["run_id"] == name
    assert read_manifest(newest(run)).run == name


# ---- damage to the replay alone ----------------------------------------------------------------------------------------
def cut(directory: Path, name: str) -> None:
    for path in CheckpointDirectory(directory / "checkpoints").paths():
        content = (path / name).read_bytes()
        (path / name).unlink()  # files are linked from checkpoint to checkpoint
        (path / name).write_bytes(content[: len(content) // 2])


def test_who_does_not_go_on_learning_does_not_mind_a_damaged_replay(tmp_path):
    run = train(tmp_path / "run", 8)
    expected = shoal.evaluate(shoal.load(run, env=Drift), episodes=2)
    cut(run, "replay/rows-000.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that none was passed over
        assert shoal.evaluate(shoal.load(run, env=Drift), episodes=2) == expected
    assert shoal.replay(run, env=Drift)["equal"]
    assert resume(run, 8).result["updates"] == 8  # it is over
    cut(run, "policy/policy.safetensors")
    with pytest.raises(CheckpointError, match=r"policy/policy.safetensors has \d+ bytes"):
        shoal.load(run, env=Drift).policy()


@pytest.mark.parametrize("actors", [0, 1])
def test_a_run_whose_replay_is_damaged_goes_on_without_it_where_that_is_wanted(actors, tmp_path):
    run = train(tmp_path / "run", 8, actors=actors)
    cut(run, "replay/rows-000.safetensors")
    way_out = rf"rows-000\.safetensors has .*: `shoal resume {run} --checkpoint\.replay false`"
    with pytest.raises(CheckpointError, match=way_out):
        resume(run, 12)
    resumed = resume(run, 12, **{"checkpoint.replay": False})
    assert resumed.result["updates"] == 12
    assert resumed.result["ledger"]["evicted"] >= 8 * 2 * 2 * 8  # all that was lost
    (said,) = [said for said in warnings_of(run) if "holds no whole replay (replay/rows-000.safetensors has" in said]
    assert "the weights will be others than those of a run that went on" in said
    with pytest.raises(RunError, match="cannot be replayed from the beginning"):
        shoal.replay(run, env=Drift)


def test_what_was_lost_is_lost_once_and_a_whole_replay_is_not_lost_at_all(tmp_path):
    run = train(tmp_path / "run", 8)
    expected = resume(Path(shutil.copytree(run, tmp_path / "expected")), 12).result["weights_sha256"]
    assert resume(run, 12, **{"checkpoint.replay": False}).result["weights_sha256"] == expected
    assert not [said for said in warnings_of(run) if "holds no" in said]


def test_other_damage_has_no_such_way_out(tmp_path):
    run = train(tmp_path / "run", 2)
    cut(run, "learner.safetensors")
    for replay in (True, False):
        with pytest.raises(CheckpointError, match=r"learner\.safetensors has .* or move them away, and `shoal resume` begins again"):
            resume(run, 4, **{"checkpoint.replay": replay})


# ---- what was signed anew ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("which", "learners"), [(-2, 1), (-2, 2), (0, 1)], ids=["one before", "one before, two learners", "empty"])
def test_a_replay_of_another_update_is_refused_with_what_to_do(which, learners, tmp_path):
    run = train(tmp_path / "run", 8, learners=learners, checkpoint={"every_updates": 1, "keep": 20})
    before, last = (CheckpointDirectory(run / "checkpoints").paths()[place] for place in (which, -1))
    shutil.rmtree(last / "replay")
    shutil.copytree(before / "replay", last / "replay")
    sign(last)
    with pytest.raises(CheckpointError, match=rf"is not the replay of this checkpoint.*update 8 .*Move {last} away, and `shoal resume`"):
        resume(run, 12)
    shutil.rmtree(last)
    assert resume(run, 12).result["updates"] == 12


def take_replay(other: Path, last: Path) -> None:
    """Another run's replay in a checkpoint's place for its own, as if it had been there from the beginning."""
    shutil.rmtree(last / "replay")
    shutil.copytree(newest(other) / "replay", last / "replay")
    sign(last)


@pytest.mark.parametrize("learners", [1, 2])
def test_a_replay_of_another_run_with_the_same_counts_is_refused_with_what_to_do(learners, tmp_path):
    often = {"learners": learners, "checkpoint": {"every_updates": 4}}
    run, other = train(tmp_path / "run", 8, **often), train(tmp_path / "other", 8, seed=4, **often)
    last = newest(run)
    take_replay(other, last)
    name = json.loads((other / FACTS).read_text())["run_id"]
    with pytest.raises(
        CheckpointError, match=rf"is the replay of run {name}, and not of this one, .* Move its checkpoint away, and `shoal res"
    ):
        resume(run, 12)
    shutil.rmtree(last)
    assert resume(run, 12).result["updates"] == 12


def test_a_replay_that_was_saved_before_replays_said_whose_they_are_is_gone_on_with(tmp_path):
    expected = resume(train(tmp_path / "expected", 4), 8).result["weights_sha256"]
    run = train(tmp_path / "run", 4)
    for path in CheckpointDirectory(run / "checkpoints").paths():
        state = path / "replay" / "state.json"
        body = json.loads(state.read_bytes()[9:])
        assert body["facts"].pop("run") == json.loads((run / FACTS).read_text())["run_id"]
        content = json.dumps(body).encode()
        state.write_bytes(b"%08x\n" % zlib.crc32(content) + content)
        sign(path, run=None)
    assert resume(run, 8).result["weights_sha256"] == expected


def test_zeroed_rows_are_refused_with_what_to_do(tmp_path):
    run = train(tmp_path / "run", 8)
    rows = newest(run) / "replay" / "rows-000.safetensors"
    content = rows.read_bytes()
    rows.unlink()
    rows.write_bytes(content[:-64] + bytes(64) if content[-64:] != bytes(64) else content[:200] + bytes(len(content) - 200))
    sign(newest(run))
    with pytest.raises(CheckpointError, match=r"rows-000\.safetensors is damaged: .*Move its checkpoint away, and `shoal resume` goes on"):
        resume(run, 12)
