"""Whole runs in a store, through the command line: begun here, killed, gone on with elsewhere. A machine is a cache directory of its own."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from shaky_store import SECRET, halfway, rule, waiting
from webhdfs_server import http_store

import shoal
from commands import answer_here
from faults.living import SOURCES, TINY, command, living, newest, saved
from rollout_fakes import SMALL_DQN, Drift
from shoal.cli import main
from shoal.errors import CheckpointError, ConfigError, NoRunError
from shoal.files import MANIFEST, CheckpointDirectory
from shoal.monitoring.live import SilentView
from shoal.runs import find_run, list_runs, show
from shoal.storage.lock import NAME
from shoal.urls import local_directory

URL = "shaky://bucket/runs/x"
OFTEN = ["--checkpoint.every-updates", "2", "--checkpoint.every-seconds", "none"]
ENDLESS = [*TINY, *OFTEN, "--stop.updates", "1000000"]
INLINE = {
    "preset": "none", "sampling": {"groups": 2, "group_size": 2, "rollout_length": 16}, "policy": {"hidden_sizes": [8]},
    "algorithm": {"name": "ppo", "minibatch_size": 64, "epochs": 1}, "actors": 0,
}  # fmt: skip


def done(*args: str, cwd: Path, code: int = 0) -> dict[str, Any]:
    """The answer of a command that ended with this code."""
    found, out, said = command(*args, "--json", cwd=cwd)
    assert found == code, said
    answer = json.loads(out)
    assert isinstance(answer, dict)
    return answer


def here(updates: int, **more: Any) -> shoal.Run:
    """`INLINE` in the store, in this process."""
    return shoal.train("CartPole-v1", **{**INLINE, "stop": {"updates": updates}, "run_dir": URL, "progress": silent(), **more})


def resumed_here(updates: int) -> dict[str, Any]:
    """The run in the store, gone on with in this process."""
    return shoal.resume(URL, actors=0, stop={"updates": updates}, progress=silent()).result


def on_machine(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine-{name}"))


def weights(updates: int, tmp_path: Path) -> str:
    """Of the same training on this disk, without a store, in one process."""
    run = shoal.train("CartPole-v1", **INLINE, stop={"updates": updates}, run_dir=str(tmp_path / f"straight-{updates}"), progress=silent())
    return str(run.result["weights_sha256"])


def silent() -> SilentView:
    return SilentView(io.StringIO())


def stored(shaky: Path) -> list[int]:
    """Updates whose checkpoints are committed in the store."""
    return sorted(int(path.parent.name[7:16]) for path in shaky.glob(f"bucket/runs/x/checkpoints/*/{MANIFEST}"))


def test_a_run_goes_from_machine_to_machine_with_the_same_bits(shaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = URL
    first = done("train", "CartPole-v1", *TINY, *OFTEN, "--actors", "2", "--stop.updates", "5", "--run-dir", url, cwd=tmp_path)
    assert (first["run"], first["updates"], first["weights_sha256"]) == (url, 5, weights(5, tmp_path))
    assert stored(shaky)[-1] == 5
    there = shaky / "bucket" / "runs" / "x"
    assert {path.name for path in there.iterdir()} == {"config.yaml", "run.json", "run.db", "result.json", "checkpoints"}

    on_machine("b", tmp_path, monkeypatch)
    second = done("resume", url, "--stop.updates", "9", cwd=tmp_path)
    assert (second["run"], second["weights_sha256"]) == (url, weights(9, tmp_path))
    balance = second["ledger"]
    assert balance["produced"] == balance["trained"] + sum(balance["dropped"].values()) + balance["in_flight"]

    on_machine("a", tmp_path, monkeypatch)  # whose copy is older than the store's
    third = resumed_here(12)
    assert third["weights_sha256"] == weights(12, tmp_path)
    assert stored(shaky)[-1] == 12
    assert not (tmp_path / "runs").exists()


def test_a_run_is_read_from_anywhere_and_its_working_copy_stands_for_it(
    shaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = here(3)
    resumed = shoal.resume(run.path, **{"stop.updates": 5}, progress=silent())
    assert (resumed.path, resumed.result["run"]) == (local_directory(URL), URL)
    assert stored(shaky)[-1] == 5

    on_machine("c", tmp_path, monkeypatch)  # which only reads
    shown = show(URL)
    assert (shown["run"], shown["status"], shown["process"], shown["results"]["updates"]) == (URL, "updates", None, 5)
    assert shown["checkpoint"]["update"] == 5
    assert shown["checkpoint"]["path"].startswith(f"{URL}/checkpoints/update-000000005")
    assert shown["configuration"]["run_dir"] == URL
    assert shown["warnings"] == []
    assert "upload_failed" not in shown["faults"]["counts"]
    assert shoal.evaluate(URL, episodes=2) == shoal.evaluate(resumed, episodes=2)
    replayed = shoal.replay(URL)
    assert (replayed["run"], replayed["updates"], replayed["equal"]) == (URL, 5, True)
    (row,) = list_runs(URL.removesuffix("/x"))
    assert (row["run"], row["env"], row["status"], row["updates"]) == (URL, "CartPole-v1", "updates", 5)
    assert not (tmp_path / "machine-c").exists()
    over = shoal.resume(URL, progress=silent())  # it is over: nothing is trained
    assert over.result == resumed.result
    assert command("show", URL, cwd=tmp_path)[1].split()[:2] == ["run", URL]


@pytest.mark.parametrize("half", [r"policy\.safetensors", r"run\.db"])
def test_a_run_that_is_killed_in_the_middle_of_an_upload_goes_on_elsewhere_with_the_same_bits(
    half: str, shaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with living("train", "CartPole-v1", *ENDLESS, "--actors", "1", "--run-dir", URL, cwd=tmp_path) as run:
        run.until(lambda: len(stored(shaky)) > 1, "checkpoints in the store")
        rule(half=half)
        run.until(lambda: halfway().exists(), "half an upload")
        here = newest(local_directory(URL))
        run.until(lambda: newest(local_directory(URL)) > here, "a checkpoint on this disk meanwhile")
        os.kill(run.process.pid, signal.SIGKILL)
        run.ends()
        run.gone()
    rule()
    last = stored(shaky)[-1]
    there = shaky / "bucket" / "runs" / "x"
    assert (there / NAME).exists()
    on_machine("b", tmp_path, monkeypatch)
    shown = show(URL)
    assert (shown["status"], shown["checkpoint"]["update"]) == ("stopped", last)
    resumed = resumed_here(last + 5)
    assert resumed["weights_sha256"] == weights(last + 5, tmp_path)
    balance = resumed["ledger"]
    assert balance["produced"] == balance["trained"] + sum(balance["dropped"].values()) + balance["in_flight"]
    events = show(URL)["faults"]["newest"]
    assert [event["update"] for event in events if event["kind"] == "resumed"] == [last]
    assert any("taken over from process" in event["message"] for event in events if event["kind"] == "warning")
    assert len(list((there / "checkpoints").iterdir())) == 3  # what was half there is swept
    assert not (there / NAME).exists()


def test_on_the_machine_that_made_it_a_killed_run_goes_on_from_what_was_not_copied_yet(shaky: Path, tmp_path: Path) -> None:
    with living("train", "CartPole-v1", *ENDLESS, "--actors", "1", "--run-dir", URL, cwd=tmp_path) as run:
        run.until(lambda: stored(shaky), "a checkpoint in the store")
        rule(wait="checkpoints")
        run.until(lambda: waiting().exists(), "an upload that waits")
        before = newest(local_directory(URL))
        run.until(lambda: newest(local_directory(URL)) > before + 4, "checkpoints on this disk")
        os.kill(run.process.pid, signal.SIGKILL)
        run.ends()
        run.gone()
    rule()
    last = CheckpointDirectory(local_directory(URL) / "checkpoints").newest().update
    assert last > stored(shaky)[-1]
    resumed = resumed_here(last + 3)
    assert resumed["weights_sha256"] == weights(last + 3, tmp_path)
    assert [e["update"] for e in show(URL)["faults"]["newest"] if e["kind"] == "resumed"] == [last]


def test_a_torn_upload_is_passed_over_with_a_warning(shaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(2, checkpoint={"every_updates": 2, "every_seconds": None})
    rule(damage=r"update-000000004.*/learner\.safetensors")
    resumed_here(4)
    on_machine("b", tmp_path, monkeypatch)
    code, _, said = command("evaluate", URL, "--episodes", "1", cwd=tmp_path)
    assert code == 0
    assert "update-000000004" in said
    assert "is not whole (learner.safetensors does not have the SHA-256 that the manifest says); taking the one before it" in said
    assert resumed_here(6)["weights_sha256"] == weights(6, tmp_path)
    assert [event["update"] for event in show(URL)["faults"]["newest"] if event["kind"] == "resumed"] == [2, 2]


def test_a_run_whose_replay_is_damaged_in_the_store_goes_on_without_it_where_that_is_wanted(
    shaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SMALL_DQN, "actors": 0, "run_dir": URL, "progress": silent(), "stop": {"updates": 8}, "seed": 3}
    shoal.train(Drift, **settings)
    for rows in shaky.glob("bucket/runs/x/checkpoints/*/replay/rows-000.safetensors"):
        rows.write_bytes(rows.read_bytes()[:-1])
    on_machine("b", tmp_path, monkeypatch)
    how: dict[str, Any] = {"env": Drift, "stop": {"updates": 12}, "progress": silent()}
    with pytest.raises(CheckpointError, match=rf"rows-000\.safetensors has .*: `shoal resume {URL} --checkpoint\.replay false`"):
        shoal.resume(URL, **how)
    resumed = shoal.resume(URL, checkpoint={"replay": False}, **how)
    assert resumed.result["updates"] == 12
    assert resumed.result["ledger"]["evicted"] >= 8 * 2 * 2 * 8  # all that was lost
    messages = [event["message"] for event in show(URL)["faults"]["newest"] if event["kind"] == "warning"]
    assert [said for said in messages if "is taken without its replay (replay/rows-000.safetensors has" in said]
    assert [said for said in messages if "holds no whole replay (" in said and "the weights will be others" in said]
    assert stored(shaky)[-1] == 12
    on_machine("c", tmp_path, monkeypatch)
    assert shoal.resume(URL, env=Drift, stop={"updates": 14}, progress=silent()).result["updates"] == 14  # nothing is damaged any more


@pytest.mark.parametrize("actors", ["0", "1"])
def test_a_slow_store_slows_no_training(actors: str, shaky: Path, tmp_path: Path) -> None:
    with living("train", "CartPole-v1", *ENDLESS, "--actors", actors, "--run-dir", URL, cwd=tmp_path) as run:
        run.until(lambda: stored(shaky), "a checkpoint in the store")
        rule(wait="checkpoints")
        run.until(lambda: waiting().exists(), "an upload that waits")
        here, before = local_directory(URL), stored(shaky)
        begun = newest(here)
        run.until(lambda: newest(here) > begun + 20, "twenty updates while the store takes nothing")
        assert stored(shaky) == before
        assert len(saved(here)) <= 3 + 2  # those that are kept, that which is copied and that which waits
        run.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        rule()
        assert run.ends() == 130
    assert stored(shaky)[-1] == newest(here)
    assert show(URL)["faults"]["counts"]["upload_skipped"] >= 1


def test_a_store_that_is_away_at_the_end_ends_the_run_with_1_and_a_resume_copies_it(
    shaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with living("train", "CartPole-v1", *ENDLESS, "--actors", "0", "--run-dir", URL, cwd=tmp_path) as run:
        run.until(lambda: stored(shaky), "a checkpoint in the store")
        rule(away=True)
        run.process.send_signal(signal.SIGINT)
        assert run.ends(300) == 1
        assert "but not in shaky://bucket/runs/x" in run.said
        assert "Traceback" not in run.said
        assert SECRET not in run.said
    directory = local_directory(URL)
    for file in directory.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    rule()
    last = CheckpointDirectory(directory / "checkpoints").newest().update
    resumed_here(last)
    assert stored(shaky)[-1] == last
    on_machine("b", tmp_path, monkeypatch)
    assert show(URL)["status"] == "updates"


def test_a_store_that_is_away_is_no_run_and_no_new_run(shaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(2)
    before = {path: path.read_bytes() for path in shaky.rglob("*") if path.is_file()}
    rule(away=True)
    new = ("train", "CartPole-v1", *TINY, "--run-dir", URL)
    error = done(*new, cwd=tmp_path, code=1)["error"]  # with the waits between its tries, in a process of its own
    assert (error["kind"], error["exit_code"]) == ("StorageError", 1)
    assert SECRET not in error["message"]
    monkeypatch.setattr("shoal.storage.objects.FIRST_WAIT_SECONDS", 0.001)
    for args in (("show", URL), ("resume", URL, "--stop.updates", "4"), ("evaluate", URL), ("runs", "shaky://bucket/runs"), new):
        error = answer_here(*args, code=1)["error"]
        assert (error["kind"], error["exit_code"]) == ("StorageError", 1)
        assert SECRET not in error["message"]
    rule()
    assert {path: path.read_bytes() for path in shaky.rglob("*") if path.is_file()} == before


def test_two_drivers_do_not_have_one_run(shaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with living("train", "CartPole-v1", *ENDLESS, "--actors", "1", "--run-dir", URL, cwd=tmp_path, mark="first") as run:
        run.until(lambda: stored(shaky), "a checkpoint in the store")
        on_machine("b", tmp_path, monkeypatch)
        for args in (("resume", URL), ("train", "CartPole-v1", *TINY, "--run-dir", URL)):
            error = answer_here(*args, code=1)["error"]
            assert error["kind"] == "StorageError"
            assert f"is in use by process {run.process.pid} on " in error["message"]
        shown = show(URL)
        assert (shown["status"], shown["process"]) == ("running", run.process.pid)
        assert list_runs("shaky://bucket/runs")[0]["status"] == "running"
        assert answer_here("control", URL, "state", code=2)["error"]["kind"] == "NoRunError"
        on_machine("a", tmp_path, monkeypatch)
        assert answer_here("control", URL, "state")["state"]["run"] == "x"
        on_machine("b", tmp_path, monkeypatch)
        taken = done("resume", URL, "--take-over", "--stop.updates", str(stored(shaky)[-1] + 40), cwd=tmp_path)
        assert run.ends() == 1
        assert f"{URL} was taken over by " in run.said
        run.gone()
    assert taken["weights_sha256"] == weights(taken["updates"], tmp_path)
    assert show(URL)["checkpoint"]["update"] == taken["updates"]
    error = answer_here("train", "CartPole-v1", *TINY, "--run-dir", URL, code=2)["error"]
    assert f"{URL} is a run already" in error["message"]


def test_a_run_that_never_began_leaves_nothing_anywhere(shaky: Path, tmp_path: Path) -> None:
    error = done("train", "CartPole-v9", "--run-dir", URL, cwd=tmp_path, code=2)["error"]
    assert "CartPole" in error["message"]
    assert not [path for path in shaky.rglob("*") if path.is_file()]
    assert not local_directory(URL).exists()
    assert answer_here("resume", URL, code=2)["error"]["kind"] == "NoRunError"
    assert not [path for path in shaky.rglob("*") if path.is_file()]
    assert here(1).result["updates"] == 1


def test_a_url_with_a_secret_is_refused_and_the_secret_is_nowhere(
    shaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for args in (("train", "CartPole-v1", "--run-dir"), ("resume",), ("show",), ("evaluate",), ("runs",), ("replay",), ("control",)):
        for url in (f"shaky://me:{SECRET}@bucket/x", f"shaky://bucket/x?sig={SECRET}"):
            with pytest.raises(SystemExit) as ended:
                main([*args, url, *(["state"] if args == ("control",) else []), "--json", "--debug"])
            out, said = capfd.readouterr()
            assert ended.value.code == 2, said
            assert SECRET not in out + said
            assert "may hold a secret" in said
    found = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".py" and SECRET.encode() in path.read_bytes()]
    assert not found


def test_in_python_a_run_in_memory_is_trained_loaded_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine-a"))
    url = "memory://bucket/in-python"
    run = shoal.train("CartPole-v1", **INLINE, stop={"updates": 3}, run_dir=url, progress=silent())
    assert run.path == local_directory(url)
    assert run.config.run_dir == url
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine-b"))
    loaded = shoal.load(url)
    assert loaded.result["updates"] == 3
    assert loaded.evaluate(episodes=1) == run.evaluate(episodes=1)
    resumed = shoal.resume(url, **{"stop.updates": 5}, progress=silent())
    assert resumed.result["weights_sha256"] == weights(5, tmp_path)
    with pytest.raises(NoRunError, match="is no run"):
        find_run("memory://bucket/other")
    with pytest.raises(ConfigError, match="is no URL"):
        shoal.resume(tmp_path / "straight-5", take_over=True)


def test_what_was_fetched_to_be_read_is_gone_with_the_process(shaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(1)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    done("evaluate", URL, "--episodes", "1", cwd=tmp_path)
    done("show", URL, cwd=tmp_path)
    assert list(scratch.iterdir()) == []


def test_a_damaged_database_in_the_store_costs_numbers_and_no_bit(shaky: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(2)
    (shaky / "bucket" / "runs" / "x" / "run.db").write_bytes(b"SQLite format 3\0 and nothing of it")
    on_machine("b", tmp_path, monkeypatch)
    shown = show(URL)
    assert (shown["status"], shown["results"]["updates"]) == ("updates", 2)
    assert "run.db cannot be used" in shown["warnings"][0]
    assert resumed_here(4)["weights_sha256"] == weights(4, tmp_path)
    warnings = [event["message"] for event in show(URL)["faults"]["newest"] if event["kind"] == "warning"]
    assert any("run.db cannot be used" in message for message in warnings)


def test_a_working_copy_that_was_removed_is_fetched_again(shaky: Path, tmp_path: Path) -> None:
    here(2)
    shutil.rmtree(tmp_path / "machine-a")
    assert resumed_here(4)["weights_sha256"] == weights(4, tmp_path)


def test_the_process_of_a_training_in_a_store_imports_no_torch(shaky: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom shoal.cli import main\n"
        f"try: main(['train', 'CartPole-v1', *{TINY!r}, '--actors', '1', '--stop.updates', '1', '--run-dir', '{URL}', '--json'])\n"
        "except SystemExit as end: print('torch' in sys.modules, end.code)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*SOURCES, os.environ["PYTHONPATH"]])}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.stdout.splitlines()[-1] == "False 0", ended.stderr


def test_a_run_goes_from_machine_to_machine_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with http_store() as (top, objects):
        url = f"{top}/runs/x"
        on_machine("a", tmp_path, monkeypatch)
        with living("train", "CartPole-v1", *ENDLESS, "--actors", "1", "--run-dir", url, cwd=tmp_path) as run:
            run.until(lambda: sum(name.endswith(MANIFEST) for name in list(objects)) > 1, "checkpoints in the store")
            os.kill(run.process.pid, signal.SIGKILL)
            run.ends()
        on_machine("b", tmp_path, monkeypatch)
        last = show(url)["checkpoint"]["update"]
        resumed = shoal.resume(url, **{"stop.updates": last + 5}, progress=silent())
        assert resumed.result["weights_sha256"] == weights(last + 5, tmp_path)
        assert shoal.evaluate(url, episodes=1)["episodes"] == 1
        assert list_runs(f"{top}/runs")[0]["status"] == "updates"
    monkeypatch.setattr("shoal.storage.objects.FIRST_WAIT_SECONDS", 0.001)
    error = answer_here("show", url, code=1)["error"]
    assert error["kind"] == "StorageError"
    assert "Connection refused" in error["message"]
