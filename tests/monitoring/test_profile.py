"""A profile holds what every process did: valid JSON, spans that nest, and what a killed process had written."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commands import answer_here
from faults.living import small_disk
from shoal.cli.control import tell_run
from shoal.errors import RunError
from shoal.monitoring.profile import begin_profile, finish_profile, profile
from shoal.monitoring.store import RunReader
from shoal.supervision.trace import DETAILED_ROLLOUTS, NullTrace, Span, Trace, open_trace, read_trace
from shoal.types import Activity, NullRecorder

SMALL = ["--preset", "none", "--sampling.groups", "2", "--sampling.group-size", "2", "--sampling.rollout-length", "16", "--view", "silent"]


def make_rollout(trace: Trace, sequence: int, rows: int = 3) -> None:
    recorder = trace.recorder(NullRecorder())
    recorder.enter(Activity.WAITING_FOR_LEASE)
    trace.begin(Span.ROLLOUT)
    for row in range(rows):
        recorder.enter(Activity.INFERRING, 0, -1, row)
        recorder.enter(Activity.STEPPING, 0, -1, row)
    trace.begin(Span.REFRESH)
    trace.end(sequence)
    trace.end(0, sequence)


def by_track(text: str) -> dict[str, list[dict[str, Any]]]:
    """Events by the name of their process, in order of time."""
    events = json.loads(text)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    tracks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["pid"] == event["tid"]
            tracks[names[event["pid"]]].append(event)
    return tracks


def spans_nest(events: list[dict[str, Any]]) -> None:
    """Each event lies inside the one that is open, or begins after its end."""
    open_until: list[int] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        begin, end = round(event["ts"] * 1000), round((event["ts"] + event["dur"]) * 1000)
        while open_until and open_until[-1] <= begin:
            open_until.pop()
        assert not open_until or end <= open_until[-1], event
        open_until.append(end)


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    trace = open_trace(str(tmp_path), "actor", 3, 1)
    assert isinstance(trace, Trace)
    for sequence in range(DETAILED_ROLLOUTS + 2):
        make_rollout(trace, sequence)
    pid, events = read_trace(tmp_path / "actor-3.1.trace")
    assert pid == os.getpid()
    rollouts = [event for event in events if event.kind is Span.ROLLOUT]
    assert [event.numbers[:2] for event in rollouts] == [(0, n) for n in range(DETAILED_ROLLOUTS + 2)]
    steps = [event for event in events if event.kind is Activity.STEPPING]
    assert len(steps) == 3 * DETAILED_ROLLOUTS  # those after them are told in sum
    first = [event.end_ns - event.begin_ns for event in steps if event.end_ns <= rollouts[0].end_ns]
    assert rollouts[0].numbers[2] == sum(first) // 1000
    tracks = by_track(profile(tmp_path))
    assert list(tracks) == ["actor 3, incarnation 1"]
    spans_nest(tracks["actor 3, incarnation 1"])


def test_a_ring_that_is_full_keeps_the_newest_and_leaves_out_what_may_be_torn(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "learner-0.0.trace", capacity=8)
    for version in range(30):
        trace.begin(Span.UPDATE)
        trace.end(version)
    _, events = read_trace(tmp_path / "learner-0.0.trace")
    assert [event.numbers[0] for event in events] == list(range(23, 30))


def test_without_a_directory_nothing_is_kept() -> None:
    trace, recorder = open_trace("", "actor"), NullRecorder()
    assert isinstance(trace, NullTrace)
    assert trace.recorder(recorder) is recorder


def test_a_disk_without_room_for_a_trace_costs_the_trace_alone(tmp_path: Path) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk", size_kib=512) as disk:
        assert isinstance(open_trace(str(disk.path), "actor", 3, warn=said.append), NullTrace)
        assert list(disk.path.iterdir()) == []
    assert len(said) == 1
    assert said[0].startswith("profile.json will say nothing of actor 3: No space left on device")


def test_what_an_earlier_part_left_is_not_mixed_in(tmp_path: Path) -> None:
    open_trace(str(begin_profile(tmp_path)), "actor", 7)
    Trace(begin_profile(tmp_path) / "actor-0.0.trace")
    text = finish_profile(tmp_path).read_text()
    assert "actor 0" in text
    assert "actor 7" not in text
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


# ---- whole runs ------------------------------------------------------------------------------------------------------
def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "shoal.cli", *args]


@pytest.mark.parametrize(
    ("options", "tracks"),
    [
        (["--actors", "2", "--algorithm", "ppo"], ["supervisor", "learner", "actor 0", "actor 1"]),
        (["--actors", "1", "--algorithm", "impala"], ["supervisor", "learner", "actor 0"]),
        (["--actors", "0", "--algorithm", "ppo"], ["all roles"]),
        (
            ["--actors", "1", "--algorithm", "ppo", "--policy.inference", "server", "--device", "cpu"],
            ["supervisor", "learner", "inference", "actor 0"],
        ),
    ],
)
def test_every_process_of_a_run_is_on_one_time_line(options: list[str], tracks: list[str], tmp_path: Path) -> None:
    begun = time.monotonic()
    run = str(tmp_path / "run")
    answer_here("train", "CartPole-v1", *SMALL, *options, "--stop.updates", "15", "--profile", "--run-dir", run)
    ended = time.monotonic()
    text = (tmp_path / "run" / "profile.json").read_text()
    found, origin = by_track(text), json.loads(text)["otherData"]["monotonic_origin_ns"] / 1e9
    assert list(found) == tracks
    for events in found.values():
        spans_nest(events)
        assert all(begun <= origin + event["ts"] / 1e6 <= origin + (event["ts"] + event["dur"]) / 1e6 <= ended for event in events)
    names = {track: {event["name"] for event in events} for track, events in found.items()}
    assert {"rollout", "step", "infer"} <= set.union(*(names[track] for track in tracks if track not in ("supervisor", "learner")))
    assert {"consume", "update", "publish", "save"} <= names["learner" if "learner" in names else "all roles"]
    if "supervisor" in names:
        assert {"dispatch", "hear", "checkpoint"} <= names["supervisor"]
        assert "wait for a batch" in names["learner"]
    if "inference" in names:
        assert {"answer", "wait for a batch"} <= names["inference"]
    updates = [event for event in found[tracks[1] if len(tracks) > 1 else tracks[0]] if event["name"] == "update"]
    assert [event["args"]["version"] for event in updates] == list(range(1, 16))
    assert not (tmp_path / "run" / "profile").exists()
    answer_here("resume", run, "--actors", "0", "--stop.updates", "17", "--view", "silent")
    assert (tmp_path / "run" / "profile.json").read_text() == text  # asked for once, kept until asked for again


def test_a_killed_actor_is_there_as_far_as_it_wrote(tmp_path: Path) -> None:
    options = [*SMALL, "--actors", "1", "--stop.updates", "1000000", "--profile", "--run-dir", "run"]
    pids: list[int] = []
    with subprocess.Popen(command("train", "CartPole-v1", *options), cwd=tmp_path, stdout=subprocess.DEVNULL) as run:
        try:
            until(run, lambda: pids.append(pid_of_actor(tmp_path / "run")) or pids[-1], "training")
            os.kill(pids[-1], signal.SIGKILL)
            until(run, lambda: recovered(tmp_path / "run"), "a rollout of another actor in its place")
            tell_run(tmp_path / "run", "stop")
            assert run.wait(timeout=300) == 130
        finally:
            run.kill()
    found = by_track((tmp_path / "run" / "profile.json").read_text())
    assert {"actor 0", "actor 0, incarnation 1"} <= set(found)
    for events in found.values():
        spans_nest(events)
    assert any(event["name"] == "rollout" for event in found["actor 0"])


def until(run: subprocess.Popen[bytes], condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert run.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"the run did not come to {what}"
        time.sleep(0.1)


def pid_of_actor(run: Path) -> int:
    """The process id of actor 0, once it has trained; 0 before."""
    with contextlib.suppress(RunError):
        state = tell_run(run, "state")["state"]
        if state["update"] > 0 and len(state["roles"]) > 1:
            return int(state["roles"][1]["pid"] or 0)
    return 0


def recovered(run: Path) -> bool:
    with RunReader(run / "run.db") as reader:
        return bool(reader.events("recovered"))
