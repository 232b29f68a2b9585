"""`profile.json`: the traces of all processes of a run on one time line, in Chrome's trace format, which Perfetto (ui.perfetto.dev) opens.

One track per process, under its name; times in microseconds since the first event. The first rollouts of every actor are shown row by row, the
others as one event with the sums of stepping and inferring. Only the newest events of a process are kept (supervision/trace.py).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.files import write_text_atomically
from shoal.supervision.trace import SPAN_NUMBERS, SUFFIX, Event, Span, read_trace
from shoal.types import Activity

PROFILE = "profile.json"
TRACES = "profile"  # directory of the traces while the run lives

_NAMES = {
    Activity.STARTING: "start",
    Activity.STEPPING: "step",
    Activity.INFERRING: "infer",
    Activity.WAITING_FOR_LEASE: "wait for a lease",
    Activity.WAITING_FOR_BATCH: "wait for a batch",
    Activity.SAVING: "save",
    Activity.RESTORING: "restore",
    Activity.PUBLISHING: "publish",
    Activity.SHARING: "wait for the other learners",
}
_ORDER = ("supervisor", "learner", "inference", "actor", "all")


def begin_profile(directory: Path) -> Path:
    """The empty directory for traces of a run that begins; what an earlier part left is removed."""
    traces = directory / TRACES
    shutil.rmtree(traces, ignore_errors=True)
    traces.mkdir()
    return traces


def finish_profile(directory: Path) -> Path:
    """Put all traces of a run together and remove them. Returns the file."""
    traces = directory / TRACES
    path = directory / PROFILE
    write_text_atomically(path, profile(traces))
    shutil.rmtree(traces, ignore_errors=True)
    return path


def profile(traces: Path) -> str:
    """The traces in a directory as one JSON object, one event a line."""
    tracks = [(*_identity(file), *read_trace(file)) for file in traces.glob(f"*{SUFFIX}")]
    tracks.sort(key=lambda track: (_ORDER.index(track[0]), track[1], track[2]))
    origin = min((event.begin_ns for *_, events in tracks for event in events), default=0)
    lines = [json.dumps(entry) for place, track in enumerate(tracks) for entry in _track(place, *track, origin)]
    body = ",\n".join(lines)
    return f'{{"displayTimeUnit": "ms", "otherData": {{"monotonic_origin_ns": {origin}}}, "traceEvents": [\n{body}\n]}}\n'


def _identity(file: Path) -> tuple[str, int, int]:
    found = re.fullmatch(r"(\w+)-(\d+)\.(\d+)", file.name.removesuffix(SUFFIX))
    if found is None:
        raise ValueError(f"{file} is no trace of a process")
    return found[1], int(found[2]), int(found[3])


def _track(place: int, role: str, index: int, incarnation: int, pid: int, events: list[Event], origin: int) -> Iterator[dict[str, Any]]:
    name = "all roles" if role == "all" else f"{role} {index}" if role == "actor" or index else role
    name += f", incarnation {incarnation}" if incarnation else ""
    where = {"pid": pid, "tid": pid}
    yield {"ph": "M", "name": "process_name", **where, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", **where, "args": {"sort_index": place}}
    yield {"ph": "M", "name": "thread_name", **where, "args": {"name": name}}
    for event in sorted(events, key=lambda event: (event.begin_ns, -event.end_ns)):
        yield {
            "ph": "X",
            "name": _NAMES[event.kind] if isinstance(event.kind, Activity) else event.kind.name.lower(),
            "ts": (event.begin_ns - origin) / 1000,
            "dur": (event.end_ns - event.begin_ns) / 1000,
            **where,
            "args": _numbers(event),
        }


def _numbers(event: Event) -> dict[str, int]:
    if isinstance(event.kind, Span):
        return dict(zip(SPAN_NUMBERS.get(event.kind, ()), event.numbers, strict=False))
    group, row, *_ = event.numbers
    return {name: number for name, number in (("group", group), ("row", row)) if number >= 0}
