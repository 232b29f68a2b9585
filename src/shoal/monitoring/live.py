"""What a person sees while a run trains: a live panel on a terminal, a line every few seconds elsewhere, or nothing.

A view is called with snapshots, as often as anyone likes, and draws when it is time; it never waits and keeps no thread.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, Protocol, TextIO

from shoal.monitoring.snapshot import ROLES, Snapshot
from shoal.monitoring.words import age_words, counted, held_words, samples_per_insert

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

DRAW_SECONDS = 0.25
LINE_SECONDS = 5.0
WIDEST = 110  # columns of the panel
SPARE_COLUMNS = 4  # right of the panel: a terminal echoes ^C there, and would begin a new line without
LONGEST_BAR = 24
_FRAME_COLUMNS = 13  # of the panel: border, padding, names
STARTING = "starting: processes are made, and the environment is measured ..."
_SPARKS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    """Shows a run. Calling it with a snapshot may draw; `message` always says its line; `close` draws the last snapshot."""

    def __call__(self, snapshot: Snapshot) -> None: ...
    def message(self, text: str) -> None: ...
    def close(self) -> None: ...


def open_view(kind: Literal["auto", "live", "lines", "silent"] = "auto", stream: TextIO | None = None) -> View:
    """The view of this kind on a stream (standard error); auto is the panel on a terminal that can move its cursor, else lines."""
    stream = stream or sys.stderr
    if kind == "auto":
        kind = "live" if stream.isatty() and _can_draw() else "lines"
    views: dict[str, Callable[[TextIO], View]] = {"live": LiveView, "lines": LineView, "silent": SilentView}
    return views[kind](stream)


def _can_draw() -> bool:
    return os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


class SilentView:
    """Shows nothing."""

    def __init__(self, stream: TextIO) -> None:
        del stream

    def __call__(self, snapshot: Snapshot) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class LineView:
    """One line every LINE_SECONDS, for files and pipes."""

    def __init__(self, stream: TextIO, line_seconds: float = LINE_SECONDS) -> None:
        self._stream, self._line_seconds = stream, line_seconds
        self._said = -math.inf
        self._last: Snapshot | None = None
        self._line = ""

    def __call__(self, snapshot: Snapshot) -> None:
        self._last = snapshot
        if time.monotonic() - self._said >= self._line_seconds and snapshot.update > 0:
            self._say()

    def message(self, text: str) -> None:
        self._print(_stamped(text, self._last))

    def close(self) -> None:
        if self._last is not None:
            self._say()

    def _say(self) -> None:
        assert self._last is not None
        self._said = time.monotonic()
        if (text := line(self._last)) != self._line:
            self._line = text
            self._print(text)

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(text, file=self._stream, flush=True)


class LiveView:
    """A panel that is drawn anew in place, with messages above it. Falls silent, and never fails, where the terminal goes away.

    Until the first snapshot comes it says that the run is starting; `close` takes that away where none came.
    """

    def __init__(self, stream: TextIO) -> None:
        from rich.text import Text

        self._console = _console(stream)
        self._live: Live | None = None
        self._drawn = -math.inf
        self._last: Snapshot | None = None
        self._returns: deque[float] = deque(maxlen=240)
        self._show(Text(STARTING, style="dim"))

    def __call__(self, snapshot: Snapshot) -> None:
        if math.isfinite(snapshot.mean_return) and (self._last is None or snapshot.update != self._last.update):
            self._returns.append(snapshot.mean_return)
        self._last = snapshot
        if time.monotonic() - self._drawn >= DRAW_SECONDS:
            self._draw()

    def message(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._console.print(_stamped(text, self._last), markup=False)

    def close(self) -> None:
        if self._live is None:
            return
        if self._last is not None:
            self._draw()
        with contextlib.suppress(OSError):
            self._live.transient = self._last is None
            self._live.stop()
        self._live = None

    def _draw(self) -> None:
        assert self._last is not None
        self._drawn = time.monotonic()
        self._show(panel(self._last, list(self._returns), min(WIDEST, self._console.width - SPARE_COLUMNS)))

    def _show(self, what: RenderableType) -> None:
        from rich.live import Live

        try:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
                self._live.start()
            self._live.update(what, refresh=True)
        except OSError:
            self._live = None


class CountView:
    """How far some counted work is: rewritten in place on a terminal, a line every LINE_SECONDS elsewhere."""

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._what, self._total = what, total
        self._in_place = self._stream.isatty() and _can_draw()
        self._begun = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if now - self._said < (DRAW_SECONDS if self._in_place else LINE_SECONDS):
            return
        self._said = now
        left = (now - self._begun) * (self._total - done) / max(done, 1)
        text = f"{self._what}: {done:,} of {self._total:,}, {clock(left)} to go"
        self._write(f"\r\x1b[2K{text}" if self._in_place else f"{text}\n")

    def close(self) -> None:
        if self._in_place:
            self._write("\r\x1b[2K")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


def _stamped(text: str, last: Snapshot | None) -> str:
    return text if last is None else f"[{clock(last.seconds)}] {text}"


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    class QuietConsole(Console):
        """Where the reader has gone: rich would end the process, and close its standard output; this one falls silent."""

        def on_broken_pipe(self) -> None:
            self.quiet = True

    return QuietConsole(file=stream, highlight=False)


def line(snapshot: Snapshot) -> str:
    """The state of a run on one line."""
    goal = f" of {snapshot.stop_return:g}" if snapshot.stop_return is not None else ""
    parts = [
        f"update {snapshot.update:,}",
        f"{snapshot.env_steps:,} steps",
        f"{snapshot.env_steps_per_second:,.0f} steps/s",
        f"return {_spread(snapshot)}{goal}",
        f"{snapshot.episodes:,} episodes",
    ]
    if snapshot.max_policy_lag:
        parts.append(f"lag {snapshot.lag_mean:.2f}")
    if snapshot.replay:
        parts.append(_replay_part(snapshot.replay))
    if shares := _shares(snapshot):
        parts.append(" ".join(f"{role} {share:.0%}" for role, share in shares.items()))
    if snapshot.phase != "done":
        parts.append(f"actors {_actor_words(snapshot)}")
        if snapshot.eta_seconds is not None:
            parts.append(f"ETA {clock(snapshot.eta_seconds)}")
    if snapshot.phase != "training":
        parts.append(snapshot.phase)
    return f"[{clock(snapshot.seconds)}] " + " | ".join(parts)


def _replay_part(facts: Mapping[str, float]) -> str:
    """The replay, and the age of what was sampled last, as far as a line has room."""
    words = f"replay {held_words(facts)} steps, {samples_per_insert(facts):.2f} samples for each"
    if "age_updates_mean" in facts:
        words += f", age {facts['age_updates_mean']:,.1f} updates and {facts['age_steps_mean']:,.0f} steps"
    return words


def panel(snapshot: Snapshot, returns: list[float], width: int | None = None) -> RenderableType:
    """The state of a run as a rich panel; `returns` is the history of the mean return, oldest first; `width` in columns."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    rows = Table.grid(padding=(0, 2), expand=True)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(ratio=1)
    goal = f" of {snapshot.stop_return:g}" if snapshot.stop_return is not None else ""
    rows.add_row(
        "return", Text.assemble((_spread(snapshot), "bold"), f"{goal}   {snapshot.episodes:,} episodes   ", (sparkline(returns), "cyan"))
    )
    rows.add_row("steps", f"{snapshot.env_steps:,}   {snapshot.env_steps_per_second:,.0f} steps/s   update {snapshot.update:,}")
    rows.add_row("time", _time_bar(snapshot, (width or WIDEST) - _FRAME_COLUMNS))
    if snapshot.max_policy_lag:
        bound = "" if snapshot.replay else f" of {snapshot.max_policy_lag}"  # a replay takes what is of any age
        lag = f"mean {snapshot.lag_mean:.2f}   p99 {snapshot.lag_p99:.0f}   max {snapshot.lag_max}{bound} updates"
        rows.add_row("lag", lag)
    rows.add_row("actors", _actor_dots(snapshot))
    dropped = "".join(f"   {count:,} {reason.replace('_', ' ')}" for reason, count in snapshot.dropped.items() if count)
    consumed = f"{snapshot.replayed:,} replayed" if snapshot.replay else f"{snapshot.trained:,} trained"
    rows.add_row("ledger", f"{snapshot.produced:,} produced   {consumed}   {snapshot.in_flight:,} in flight{dropped}")
    if snapshot.replay:
        rows.add_row("replay", replay_words(snapshot))
        if ages := [f"{words} {unit}" for unit in ("updates", "steps") if (words := age_words(snapshot.replay, unit, "   "))]:
            rows.add_row("age", "   ".join(ages))
    rows.add_row("clock", _clock_words(snapshot))
    title = Text.assemble(
        (f"{snapshot.env} · {snapshot.algorithm} {snapshot.mode} · seed {snapshot.seed} · ", "bold"),
        (snapshot.phase, f"bold {_PHASE_COLOURS.get(snapshot.phase, 'yellow')}"),
    )
    return Panel(rows, title=title, subtitle=Text(snapshot.run, style="dim"), title_align="left", subtitle_align="right", width=width)


def replay_words(snapshot: Snapshot) -> str:
    """How full the replay is, how often what went in is sampled, and who is ahead."""
    facts = snapshot.replay
    words = f"{held_words(facts)} steps   {snapshot.evicted:,} evicted   {samples_per_insert(facts):.2f} samples for each"
    surplus = facts["surplus"]
    return words if abs(surplus) < 1 else words + f"   learner {abs(surplus):,.0f} samples {'ahead' if surplus > 0 else 'behind'}"


def _clock_words(snapshot: Snapshot) -> str:
    gone = clock(snapshot.seconds)
    if snapshot.phase == "done":
        return f"{gone} in all"
    return f"{gone} gone, " + ("until a stop condition" if snapshot.eta_seconds is None else f"at most {clock(snapshot.eta_seconds)} to go")


_PHASE_COLOURS = {"training": "green", "done": "cyan"}
_ROLE_COLOURS = dict(zip(ROLES, ("green", "blue", "bright_black", "magenta"), strict=True))
_STATE_COLOURS = {"starting": "yellow", "running": "green", "stalled": "yellow", "dead": "red", "stopped": "bright_black"}


def _shares(snapshot: Snapshot) -> dict[str, float]:
    total = sum(snapshot.time_by_role.values())
    return {role: snapshot.time_by_role.get(role, 0.0) / total for role in ROLES} if total > 0 else {}


def _time_bar(snapshot: Snapshot, num_columns: int) -> RenderableType:
    from rich.text import Text

    text, shares, drawn, total = Text(), _shares(snapshot), 0, 0.0
    if not shares:
        return Text("nothing yet", style="dim")
    words = [f" {role} {share:.0%}" for role, share in shares.items()]
    bar_columns = max(0, min(LONGEST_BAR, num_columns - sum(map(len, words))))
    for role, share in shares.items():
        total += share
        columns = round(total * bar_columns) - drawn
        drawn += columns
        text.append("█" * columns, style=_ROLE_COLOURS[role])
    for role, said in zip(shares, words, strict=True):
        text.append(said, style=_ROLE_COLOURS[role])
    return text


def _actor_dots(snapshot: Snapshot) -> RenderableType:
    from rich.text import Text

    text = Text()
    for actor in snapshot.actors[:32] if snapshot.phase != "done" else ():
        text.append("● ", style=_STATE_COLOURS[actor.state])
    text.append(_actor_words(snapshot))
    if snapshot.autoscale and snapshot.scaled and snapshot.phase != "done":
        text.append(f"\n{snapshot.scaled}", style="dim")
    return text


def _actor_words(snapshot: Snapshot) -> str:
    counts: dict[str, int] = {}
    for actor in snapshot.actors:
        state = "ended" if snapshot.phase == "done" else actor.state
        counts[state] = counts.get(state, 0) + 1
    restarts = [counted(snapshot.restarts, "restart")] if snapshot.restarts else []
    states = [f"{count} {state}" for state, count in counts.items()] or ["all roles in this process"]
    bounds = [f"autoscale {snapshot.autoscale}"] if snapshot.autoscale and snapshot.phase != "done" else []
    return ", ".join([*states, *bounds, *restarts])


def _spread(snapshot: Snapshot) -> str:
    if not math.isfinite(snapshot.mean_return):
        return "none yet"
    return (
        f"{snapshot.mean_return:.1f} ± {snapshot.std_return:.1f}" if math.isfinite(snapshot.std_return) else f"{snapshot.mean_return:.1f}"
    )


def sparkline(values: list[float], width: int = 24) -> str:
    """The course of some numbers in at most `width` characters, lowest to highest."""
    if len(values) < 2:
        return ""
    step = max(1.0, len(values) / width)
    picked = [values[min(len(values) - 1, int((i + 1) * step) - 1)] for i in range(min(width, len(values)))]
    low, high = min(picked), max(picked)
    span = (high - low) or 1.0
    return "".join(_SPARKS[int((value - low) / span * (len(_SPARKS) - 1))] for value in picked)


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` under an hour."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
