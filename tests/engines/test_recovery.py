"""Real faults in whole runs: processes that are killed and stopped, environments that crash and hang, numbers that diverge."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from walls import Wall

import shoal
from shoal.engines import deaths, ending, environment_faults, watch
from shoal.engines.fleet import Fleet
from shoal.engines.local import LocalEngine
from shoal.engines.process import Process
from shoal.engines.saves import Saves
from shoal.engines.session import Session
from shoal.errors import CheckpointError, DivergedError, EnvironmentFault, ProcessError, RunError
from shoal.files import Staging, load_checkpoint
from shoal.monitoring.live import SilentView
from shoal.monitoring.store import RunReader
from shoal.runs import show
from shoal.streams import episode_seed
from shoal.supervision.processes import process_state
from stopping import stop_process

SMALL = {
    "sampling": {"groups": 2, "group_size": 2, "rollout_length": 8},
    "policy": {"hidden_sizes": [8]},
    "algorithm": {"name": "ppo", "minibatch_size": 16, "epochs": 1},
    "seed": 3,
    "preset": "none",
}
ASYNC = {**SMALL, "algorithm": {"name": "appo", "minibatch_size": 16, "epochs": 1}}


LIMIT_SECONDS = 3.0  # of a step where one hangs: the machine may stand still for a moment
WALLS = f"{Path(__file__).parent / 'walls.py'}:Wall"


DYING_NETWORK = """
import torch


class Trunk(torch.nn.Module):
    num_features = 4

    def forward(self, prepared):
        if open("/proc/self/comm").read().startswith("shoal:{role}"):
            raise RuntimeError("no memory is left on this device")
        return self.layer(torch.cat([value.flatten(1) for value in prepared.values()], 1))


def make(spec, config):
    trunk = Trunk()
    trunk.layer = torch.nn.Linear(sum(leaf.size for leaf in spec.observation), 4)
    return trunk
"""


def train(directory: Path, **settings: Any) -> Any:
    chosen = {**SMALL, "actors": 2, "env": {"id": WALLS}, **settings}
    return shoal.train(run_dir=str(directory), progress=SilentView(io.StringIO()), **chosen)


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    with RunReader(directory / "run.db") as reader:
        return reader.events(kind)


def pid_of(name: str) -> int:
    """The living process of this name among the descendants of this one; it is waited for."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{entry}/comm").read_text().strip() == name and _descends(int(entry)):
                    return int(entry)
        time.sleep(0.01)
    raise AssertionError(f"no process {name}")


def _descends(pid: int) -> bool:
    while pid > 1:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX":
            return False
        pid = int(fields[1])
        if pid == os.getpid():
            return True
    return False


def at(moments: dict[int, Callable[[], Any]]) -> Callable[[Any], None]:
    """A callback that does things between updates, once each."""

    def callback(facts: Any) -> None:
        if action := moments.pop(facts["update"], None):
            action()

    return callback


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tmp_path_factory.mktemp("undisturbed") / "run", actors=0, stop={"updates": 12}).result


def test_actors_that_are_killed_and_stopped_are_replaced_and_one_that_wakes_harms_nothing(undisturbed, tmp_path):
    stopped: list[int] = []

    def stop() -> None:
        stopped.append(pid_of("shoal:actor-1"))
        stop_process(stopped[0])

    def wake() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(stopped[0], signal.SIGCONT)

    moments = {3: lambda: os.kill(pid_of("shoal:actor-0"), signal.SIGKILL), 5: stop, 6: wake, 8: wake}
    run = train(tmp_path / "run", stop={"updates": 12}, callbacks=[at(moments)])
    assert run.result["weights_sha256"] == undisturbed["weights_sha256"]
    assert run.result["restarts"] == 2
    back = events(run.path, "recovered")
    assert [(e["role"], e["index"], e["after"]) for e in back] == [("actor", 0, "killed by SIGKILL"), ("actor", 1, "was stopped")]
    assert all(0 <= e["restoring_seconds"] <= e["seconds"] for e in back)
    assert show(run.path)["recovery"]["actor"]["count"] == 2
    assert "recovered" not in show(run.path)["faults"]["counts"]


def test_a_stopped_learner_is_replaced_a_stopped_helper_is_woken_and_the_weights_are_the_same(undisturbed, tmp_path):
    moments = {
        4: lambda: stop_process(pid_of("shoal:learner-0")),
        9: lambda: stop_process(pid_of("shoal:zygote")),
        10: lambda: os.kill(pid_of("shoal:actor-0"), signal.SIGKILL),  # it needs the helper
    }
    run = train(tmp_path / "run", stop={"updates": 12}, callbacks=[at(moments)], checkpoint={"every_updates": 3})
    assert run.result["weights_sha256"] == undisturbed["weights_sha256"]
    assert [e["role"] for e in events(run.path, "woken")] == ["zygote"]
    back = {e["role"]: e for e in events(run.path, "recovered")}
    assert set(back) == {"learner", "actor"}
    assert back["learner"]["after"] == "was stopped"
    assert back["learner"]["ready_seconds"] <= back["learner"]["seconds"]
    assert run.result["restarts"] == 2


def test_an_inference_server_that_is_stopped_or_killed_with_the_helper_is_made_again(tmp_path):
    served = {"policy": {"hidden_sizes": [8], "inference": "server"}, "device": "cpu", "stop": {"updates": 12}}
    alone = train(tmp_path / "alone", actors=0, **served)
    moments = {
        3: lambda: stop_process(pid_of("shoal:inference")),
        7: lambda: os.kill(pid_of("shoal:zygote"), signal.SIGKILL),
    }
    run = train(tmp_path / "run", **served, callbacks=[at(moments)], checkpoint={"every_updates": 3})
    assert run.result["weights_sha256"] == alone.result["weights_sha256"]
    back = {e["role"]: e["after"] for e in events(run.path, "recovered")}
    assert back["inference"] == "was stopped"
    assert back["learner"].startswith("the helper process is gone")


def test_a_callback_that_takes_long_is_not_the_actors_fault(tmp_path, monkeypatch):
    """What they said meanwhile is heard before they are judged by it."""
    patient = watch.UNHEARD_SECONDS

    def long() -> None:
        monkeypatch.setattr(watch, "UNHEARD_SECONDS", 3.0)
        time.sleep(3.6)

    def short() -> None:
        """Patience is short for an update only: a busy machine may let an actor wait for its first word."""
        monkeypatch.setattr(watch, "UNHEARD_SECONDS", patient)

    moments = {4: long, 5: short, 6: long, 7: short}
    environment = {"id": WALLS, "kwargs": {"step_seconds": 0.002}}
    run = train(tmp_path / "run", **ASYNC, env=environment, stop={"updates": 8}, callbacks=[at(moments)])
    assert events(run.path, "killed") == []
    assert run.result["restarts"] == 0


class Seeing(SilentView):
    """Keeps whom it was told of."""

    def __init__(self) -> None:
        super().__init__(io.StringIO())
        self.roles: list[str] = []
        self.num_actors: set[int] = set()
        self.answering = 0.0

    def __call__(self, snapshot: Any) -> None:
        self.roles = [role.role for role in snapshot.roles]
        self.num_actors.add(len(snapshot.actors))
        self.answering = max([self.answering, *(r.seconds.get("inferring", 0.0) for r in snapshot.roles if r.role == "inference")])


def test_the_server_is_told_apart_from_the_actors(tmp_path):
    served = {**SMALL, "policy": {"hidden_sizes": [8], "inference": "server"}, "device": "cpu", "actors": 2, "env": {"id": WALLS}}
    view = Seeing()
    seen = [lambda facts: facts["update"] < 20 or not view.answering]  # a look comes a few times a second
    shoal.train(run_dir=str(tmp_path / "run"), progress=view, stop={"updates": 10**6, "seconds": 300.0}, callbacks=seen, **served)
    assert view.roles == ["learner", "actor 0", "actor 1", "inference"]
    assert view.num_actors - {0} == {2}
    assert view.answering > 0


def test_a_server_that_dies_again_and_again_ends_the_run_with_its_log(tmp_path):
    network = tmp_path / "network.py"
    network.write_text(DYING_NETWORK.format(role="inference"))
    policy = {"network": f"{network}:make", "inference": "server"}
    with pytest.raises(ProcessError, match=r"(?s)the inference server died 5 times .*exit code 1.*no memory is left on this device"):
        train(tmp_path / "run", policy=policy, device="cpu", stop={"updates": 12})
    assert len(events(tmp_path / "run", "died")) == 5


def test_a_killed_helper_process_and_all_roles_with_it_are_made_again(undisturbed, tmp_path):
    killed: list[int] = []

    def kill() -> None:
        killed.append(pid_of("shoal:zygote"))
        os.kill(killed[-1], signal.SIGKILL)

    run = train(tmp_path / "run", stop={"updates": 12}, callbacks=[at({4: kill, 9: kill})], checkpoint={"every_updates": 3})
    assert len(set(killed)) == 2
    assert run.result["weights_sha256"] == undisturbed["weights_sha256"]
    assert [e["role"] for e in events(run.path, "died")] == ["zygote", "zygote"]
    assert [e["role"] for e in events(run.path, "recovered")] == ["learner", "learner"]


def test_a_learner_that_dies_again_and_again_backs_off_and_ends_the_run_with_its_log(tmp_path, monkeypatch):
    network = tmp_path / "network.py"
    network.write_text(DYING_NETWORK.format(role="learner"))
    early, waits, start, back_off = [], [], Fleet.start, deaths.back_off_seconds

    def noted(self: Fleet, process: Process, *more: Any) -> None:
        if process.name == "learner":
            early.append(time.monotonic() < process.not_before)
        start(self, process, *more)

    monkeypatch.setattr(Fleet, "start", noted)
    monkeypatch.setattr(deaths, "back_off_seconds", lambda deaths: waits.append(back_off(deaths)) or waits[-1])
    with pytest.raises(ProcessError, match=r"(?s)the learner died 5 times .*exit code 1.*no memory is left on this device"):
        train(tmp_path / "run", policy={"network": f"{network}:make"}, stop={"updates": 12})
    died = [e["time"] for e in events(tmp_path / "run", "died") if e["role"] == "learner"]
    assert (len(died), early) == (5, [False] * 5)
    assert waits == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.8])


def test_a_helper_process_that_is_killed_while_it_starts_is_replaced_too(tmp_path, monkeypatch):
    opened, begin = [], Fleet.open

    def killed_at_once(self: Fleet) -> None:
        begin(self)
        opened.append(self.zygote.pid)
        if len(opened) == 2:
            os.kill(self.zygote.pid, signal.SIGKILL)

    monkeypatch.setattr(Fleet, "open", killed_at_once)
    moments = {4: lambda: os.kill(pid_of("shoal:zygote"), signal.SIGKILL)}
    run = train(tmp_path / "run", stop={"updates": 8}, callbacks=[at(moments)], checkpoint={"every_updates": 3})
    assert len(opened) == 3
    assert run.result["updates"] == 8
    assert [e["role"] for e in events(run.path, "died")] == ["zygote", "zygote"]


def test_a_role_that_is_killed_before_it_hears_its_first_word_is_replaced(undisturbed, tmp_path, monkeypatch):
    kept, start = [], Fleet.start

    def killed_at_once(self: Fleet, process: Process, setup: dict[str, Any], *more: Any) -> None:
        """The supervisor gets no processor until the new process is dead."""
        if process.incarnation == 1 and process.name not in kept:
            kept.append(process.name)
            fork = self.zygote.fork

            def forked(*args: Any) -> int:
                request = fork(*args)
                pid = pid_of(f"shoal:{process.name}-0")
                os.kill(pid, signal.SIGKILL)
                while process_state(pid) not in (None, "Z"):
                    time.sleep(0.005)
                return request

            monkeypatch.setattr(self.zygote, "fork", forked)
            start(self, process, setup, *more)
            monkeypatch.setattr(self.zygote, "fork", fork)
        else:
            start(self, process, setup, *more)

    monkeypatch.setattr(Fleet, "start", killed_at_once)
    moments = {
        3: lambda: os.kill(pid_of("shoal:actor-0"), signal.SIGKILL), 7: lambda: os.kill(pid_of("shoal:learner-0"), signal.SIGKILL)
    }  # fmt: skip
    run = train(tmp_path / "run", stop={"updates": 12}, callbacks=[at(moments)], checkpoint={"every_updates": 3}, actors=1)
    assert sorted(kept) == ["actor", "learner"]
    assert run.result["weights_sha256"] == undisturbed["weights_sha256"]


@pytest.mark.parametrize(
    ("settings", "actors", "whats", "deaths"),
    [
        ({**SMALL, "form": "python"}, 2, ["segfault", "grip", "raise"], 4),
        ({**SMALL, "form": "threads"}, 2, ["exit", "hang"], 2),  # the actor sees a hang itself
        ({**ASYNC, "form": "threads"}, 1, ["hang", "segfault"], 2),
    ],
    ids=["one by one", "threads", "threads, async"],
)
def test_a_step_that_breaks_each_time_is_given_up_as_an_invalid_episode(settings, actors, whats, deaths, tmp_path, monkeypatch):
    """Single episodes are poisoned, of environment 1 of both groups."""
    monkeypatch.setattr(environment_faults, "EARLY_SECONDS", 0.0)
    settings = dict(settings)
    what = {str(episode_seed(3, n % 2, 1, 2 + n)): what for n, what in enumerate(whats)}
    kwargs = {"what": what, "at": 5, "length": 7, "step_seconds": 0.0 if actors == 2 else 0.003}
    chosen = {"id": WALLS, "form": settings.pop("form"), "step_timeout_seconds": LIMIT_SECONDS, "kwargs": kwargs}

    def goes_on(facts: Any) -> bool:
        """A paced group goes on while one environment hangs: until all is seen, and given up at the next attempt."""
        if facts["update"] % 10 == 0 and not ends and len(events(tmp_path / "run", "environment_fault")) == 2 * len(whats):
            ends.append(facts["update"] + 40)
        return not ends or facts["update"] < ends[0]

    ends: list[int] = []
    how = {"stop": {"updates": 16}} if actors == 2 else {"stop": {"updates": 10**6, "seconds": 300.0}, "callbacks": [goes_on]}
    run = train(tmp_path / "run", **{**settings, "env": chosen}, actors=actors, **how)
    result = run.result
    died = [e for e in events(run.path, "died") if e["role"] == "actor"]
    faults = events(run.path, "environment_fault")
    assert (len(died), len(faults), result["restarts"]) == (deaths, 2 * len(whats), 2 * len(whats))
    named = [fault["report"]["env"] for fault in faults if fault["report"]["env"] is not None]
    assert set(named) == {1}
    assert len(named) >= len(whats)  # the second time at the latest it has a name
    assert (result["reason"], result["updates"]) == (("updates", 16) if actors == 2 else ("interrupted", ends[0]))
    assert result["ledger"]["dropped"]["environment_fault"] > 0
    assert result["ledger"]["in_flight"] == 0
    if settings["algorithm"]["name"] == "ppo":
        assert {len(e["places"]) for e in events(run.path, "given_up")} == {1}
        assert shoal.replay(run.path)["equal"]
    if actors == 2:  # one row of each has no value
        assert result["env_steps"] == 16 * 2 * 2 * 8 - len(whats)


def test_a_hang_while_an_environment_is_closed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(environment_faults, "EARLY_SECONDS", 0.0)
    chosen = {"id": WALLS, "form": "python", "restart_budget": 1, "step_timeout_seconds": LIMIT_SECONDS, "kwargs": {"what": "close"}}
    with pytest.raises(EnvironmentFault, match=r"close\(\) has not returned for \d+\.\d s"):
        train(tmp_path / "run", env=chosen, sampling={**SMALL["sampling"], "groups": 1}, stop={"updates": 6}, actors=1)


def test_a_crash_loop_backs_off_and_ends_with_the_last_traceback_when_the_budget_is_spent(tmp_path, monkeypatch):
    monkeypatch.setattr(environment_faults, "EARLY_SECONDS", 0.0)
    chosen = {"id": WALLS, "restart_budget": 3, "kwargs": {"what": "segfault", "at": 2}}
    with pytest.raises(EnvironmentFault, match=r"its process ended in step\(\): killed by SIGSEGV") as caught:
        train(tmp_path / "run", env=chosen, stop={"updates": 6})
    assert len(events(tmp_path / "run", "environment_fault")) == 4
    assert "Fatal Python error: Segmentation fault" in str(caught.value)
    assert "walls.py" in str(caught.value)


# ---- the end ---------------------------------------------------------------------------------------------------------
def spoil(staging: Staging) -> None:
    """Nobody can write into it any more."""
    shutil.rmtree(staging.path)
    staging.path.write_text("in the way")


@pytest.mark.parametrize("who", ["the learner", "the supervisor"])
def test_an_end_whose_last_checkpoint_is_refused_is_no_good_end(who, tmp_path, monkeypatch):
    begin, commit = Session.begin_checkpoint, Session.commit

    def spoiled_begin(self: Session) -> Any:
        begun = begin(self)
        if who == "the learner" and self.coordinator.version == 3:
            spoil(begun[0])
        return begun

    def spoiled_commit(self: Session, staging: Staging, *parts: Any) -> Any:
        if who == "the supervisor" and staging.update == 3:
            spoil(staging)
        return commit(self, staging, *parts)

    monkeypatch.setattr(Session, "begin_checkpoint", spoiled_begin)
    monkeypatch.setattr(Session, "commit", spoiled_commit)
    with pytest.raises(CheckpointError, match=r"the last checkpoint could not be saved.* Not a directory"):
        train(tmp_path / "run", stop={"updates": 3}, actors=1)
    assert not (tmp_path / "run" / "result.json").exists()
    assert len(events(tmp_path / "run", "checkpoint_failed")) == 1


def test_an_end_at_an_update_that_is_kept_already_is_a_good_one(tmp_path, monkeypatch):
    begin, commit = Session.begin_checkpoint, Session.commit
    kept: list[Path] = []

    def spoiled_once_kept(self: Session) -> Any:
        begun = begin(self)
        if kept:
            spoil(begun[0])
        return begun

    def interrupted_once_kept(self: Session, staging: Staging, *parts: Any) -> Path:
        path = commit(self, staging, *parts)
        if staging.update == 2:
            kept.append(path)
            os.kill(os.getpid(), signal.SIGINT)
        return path

    monkeypatch.setattr(Session, "begin_checkpoint", spoiled_once_kept)
    monkeypatch.setattr(Session, "commit", interrupted_once_kept)
    result = train(tmp_path / "run", stop={"updates": 9}, actors=1, checkpoint={"every_updates": 1}).result
    assert (result["reason"], result["updates"]) == ("interrupted", 2)
    assert result["weights_sha256"] == load_checkpoint(kept[0]).json("learner")["weights_sha256"]
    assert len(events(tmp_path / "run", "checkpoint_failed")) == 1


def test_who_is_stopped_in_the_last_save_is_seen(undisturbed, tmp_path, monkeypatch):
    """The learner is replaced, and makes what it lost again; the helper process is woken."""
    begin = Session.begin_checkpoint
    stopped: list[str] = []

    def stops(self: Session) -> Any:
        if self.coordinator.version == 12 and not stopped:
            stopped.extend(("shoal:learner-0", "shoal:zygote"))
            for name in stopped:
                stop_process(pid_of(name))
        return begin(self)

    monkeypatch.setattr(Session, "begin_checkpoint", stops)
    run = train(tmp_path / "run", stop={"updates": 12}, checkpoint={"every_updates": 5})
    assert run.result["weights_sha256"] == undisturbed["weights_sha256"]
    assert [e["reason"] for e in events(run.path, "died")] == ["was stopped"]
    assert len(events(run.path, "woken")) == 1


def test_a_learner_that_hangs_in_an_update_while_a_run_without_a_checkpoint_ends_is_seen(tmp_path, monkeypatch):
    begin, say = Session.begin_checkpoint, LocalEngine.tell_learner
    refused: list[int] = []

    def refuses_once(self: Session) -> Any:
        if not refused:
            refused.append(self.coordinator.version)
            raise CheckpointError("no room")
        return begin(self)

    def stops_once(self: LocalEngine, order: dict[str, Any]) -> None:
        if self._coordinator.version == 3:
            stop_process(pid_of("shoal:learner-0"))
            os.kill(os.getpid(), signal.SIGINT)
        say(self, order)

    monkeypatch.setattr(Session, "begin_checkpoint", refuses_once)
    monkeypatch.setattr(LocalEngine, "tell_learner", stops_once)
    run = train(tmp_path / "run", stop={"updates": 12}, actors=1, checkpoint={"every_updates": None, "every_seconds": None})
    assert (run.result["reason"], run.result["updates"]) == ("interrupted", 0)
    assert [e["reason"] for e in events(run.path, "died")] == ["was stopped"]


def test_a_run_that_goes_back_to_where_it_is_to_end_makes_no_update_more(tmp_path, monkeypatch):
    train(tmp_path / "run", stop={"updates": 3}, actors=1)
    begin = Saves.begin
    killed: list[int] = []

    def kills_once(self: Saves) -> None:
        if not killed:
            killed.append(pid_of("shoal:learner-0"))
            os.kill(killed[0], signal.SIGKILL)  # first, or it may have written its part already
        begin(self)

    monkeypatch.setattr(Saves, "begin", kills_once)
    run = shoal.resume(tmp_path / "run", stop={"updates": 2}, progress=SilentView(io.StringIO()))
    assert (run.result["reason"], run.result["updates"], run.result["restarts"]) == ("updates", 3, 1)


def test_whoever_is_waited_for_at_an_end_without_the_last_update_was_told_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(ending, "END_SECONDS", 60.0)  # a busy machine takes its time
    say, wait = LocalEngine.tell_learner, Fleet.wait_for_ends
    left: list[list[str]] = []

    def interrupted(self: LocalEngine, order: dict[str, Any]) -> None:
        say(self, order)
        if order["do"] == "train":
            os.kill(os.getpid(), signal.SIGINT)

    def noted(self: Fleet, *given: Any) -> Any:
        lost = wait(self, *given)
        left.append([p.name for p in self.processes if p.up])
        return lost

    monkeypatch.setattr(LocalEngine, "tell_learner", interrupted)
    monkeypatch.setattr(Fleet, "wait_for_ends", noted)
    slow = f"{Path(__file__).parents[1] / 'faults' / 'simulated.py'}:Slow"
    settings = {"algorithm": {"name": slow}, "policy": {"hidden_sizes": [8], "inference": "server"}, "device": "cpu"}
    run = train(tmp_path / "run", **settings, actors=1, stop={"updates": 9})
    assert (run.result["reason"], run.result["updates"]) == ("interrupted", 0)
    assert left == [[], []]


def test_a_hang_in_the_evaluation_at_the_end_is_named(tmp_path):
    chosen = {"id": WALLS, "step_timeout_seconds": LIMIT_SECONDS, "kwargs": {"what": "grip", "role": "evaluator"}}
    with pytest.raises(EnvironmentFault, match=r"step\(\) has not returned for \d+\.\d s") as caught:
        train(tmp_path / "run", env=chosen, stop={"updates": 2}, actors=1, evaluation={"episodes": 2})
    report = caught.value.report
    assert (report["kind"], report["step"]) == ("hang", 3)
    assert "walls.py" in report["traceback"]
    assert load_checkpoint(next((tmp_path / "run" / "checkpoints").glob("*2"))).update == 2


def test_a_hang_in_an_evaluation_in_this_process_is_named(tmp_path):
    chosen = {"id": WALLS, "step_timeout_seconds": LIMIT_SECONDS, "kwargs": {"what": "hang", "role": ""}}
    run = train(tmp_path / "run", env=chosen, stop={"updates": 1}, actors=1)
    with pytest.raises(EnvironmentFault, match=r"step\(\) has not returned for \d+\.\d s") as caught:
        run.evaluate(episodes=2)
    assert (caught.value.report["kind"], caught.value.report["step"]) == ("hang", 3)


# ---- learning --------------------------------------------------------------------------------------------------------
class Blowing(Wall):
    """Its rewards are too large to be squared, in episodes whose seeds are on its list."""

    seeds: frozenset[int] = frozenset()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, 1e30 if self._seed in self.seeds else reward, terminated, truncated, info


class BlowingOnce(Blowing):
    """With the streams of epoch 0, from the fourth episode on; with those of another epoch never."""

    seeds = frozenset(episode_seed(3, g, b, n, 0) for g in range(2) for b in range(2) for n in range(4, 200))


class BlowingAlways(Blowing):
    seeds = frozenset(episode_seed(3, g, b, n, e) for g in range(2) for b in range(2) for n in range(4, 200) for e in (0, 1))


def test_a_run_that_diverges_goes_back_once_and_another_way_the_same_on_every_engine(tmp_path):
    settings = {**SMALL, "checkpoint": {"every_updates": 2}, "stop": {"updates": 30}}
    runs = [
        shoal.train(BlowingOnce, run_dir=str(tmp_path / f"run-{n}"), progress=SilentView(io.StringIO()), **settings, actors=n)
        for n in (0, 1)
    ]
    for run in runs:
        assert (run.result["reason"], run.result["updates"]) == ("updates", 30)
        assert run.result["skipped_steps"] > 0
        assert len(events(run.path, "diverged")) == 1
        (back,) = events(run.path, "rolled_back")
        assert back["updates_undone"] >= 9
        assert events(run.path, "not_finite")
        assert run.result["ledger"]["dropped"]["rolled_back"] > 0
        assert run.result["ledger"]["trained"] == run.result["env_steps"]
    assert runs[0].result["weights_sha256"] == runs[1].result["weights_sha256"]
    with pytest.raises(RunError, match="diverged once"):
        shoal.replay(runs[0].path, env=BlowingOnce)


def test_a_run_that_diverges_again_ends_and_leaves_a_policy(tmp_path):
    settings = {**SMALL, "checkpoint": {"every_updates": 2}, "stop": {"updates": 60}, "actors": 1}
    with pytest.raises(DivergedError, match="not finite in 10 updates in a row") as caught:
        shoal.train(BlowingAlways, run_dir=str(tmp_path / "run"), progress=SilentView(io.StringIO()), **settings)
    assert caught.value.exit_code == 4
    assert len(events(tmp_path / "run", "rolled_back")) == 1
    policy = shoal.load(tmp_path / "run", env=BlowingAlways).policy()
    assert policy is not None
