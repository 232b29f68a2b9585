"""Views: a panel on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import pty
import time

import pytest
from rich.console import Console

from shoal.monitoring.live import (
    LINE_SECONDS,
    SPARE_COLUMNS,
    STARTING,
    CountView,
    LineView,
    LiveView,
    SilentView,
    clock,
    line,
    open_view,
    panel,
    replay_words,
    sparkline,
)
from shoal.monitoring.snapshot import ActorHealth, Snapshot


def a_snapshot(update: int = 1, mean_return: float = 12.5) -> Snapshot:
    return Snapshot(
        "runs/x",
        "CartPole-v1",
        "ppo",
        "sync",
        phase="training",
        update=update,
        env_steps=128_000,
        env_steps_per_second=11_234.0,
        seconds=75.0,
        episodes=42,
        mean_return=mean_return,
        std_return=3.0,
        time_by_role={"environment": 2.0, "inference": 1.0, "waiting": 0.0, "learning": 1.0},
        max_policy_lag=4,
        produced=10,
        trained=8,
        in_flight=1,
        dropped={"actor_died": 1},
        actors=(ActorHealth(0, "running"), ActorHealth(1, "dead")),
        restarts=1,
        eta_seconds=30.0,
        stop_return=475,
    )


def test_a_line_says_everything_that_matters() -> None:
    text = line(a_snapshot())
    for part in (
        "[1:15]",
        "128,000 steps",
        "11,234 steps/s",
        "12.5 ± 3.0",
        "environment 50%",
        "1 running, 1 dead, 1 restart |",
        "ETA 0:30",
    ):
        assert part in text


REPLAY = {
    "steps": 9_000, "capacity_steps": 100_000, "inserted": 10_000, "sampled": 50_000, "surplus": 256.0,
    "age_updates_mean": 12.25, "age_updates_p99": 30, "age_updates_max": 40,
    "age_steps_mean": 800.4, "age_steps_p99": 1_900, "age_steps_max": 2_000,
}  # fmt: skip


def test_a_replay_is_shown_with_how_full_it_is_how_old_and_who_is_ahead() -> None:
    shown = dataclasses.replace(a_snapshot(), trained=0, replayed=10_000, evicted=1_000, replay=REPLAY)
    assert replay_words(shown) == "9,000 of 100,000 steps   1,000 evicted   5.00 samples for each   learner 256 samples ahead"
    behind = dataclasses.replace(shown, replay={"steps": 10, "inserted": 10, "sampled": 0, "surplus": -64.0})
    assert replay_words(behind) == "10 steps   1,000 evicted   0.00 samples for each   learner 64 samples behind"
    lines = drawn(shown, 120)
    for row, words in (
        ("ledger", "10,000 replayed"),
        ("replay", "9,000 of 100,000 steps"),
        ("age", "mean 12.2   p99 30   max 40 updates   mean 800   p99 1,900   max 2,000 steps"),
        ("lag", f"max {shown.lag_max} updates"),  # there is no bound
    ):
        assert any(row in text.split()[:2] and words in text for text in lines), (row, lines)
    assert "trained" not in "\n".join(lines)
    assert not any("age" in text.split()[:2] for text in drawn(behind, 120)), "nothing was sampled"
    assert f"max {shown.lag_max} of 4 updates" in "\n".join(drawn(a_snapshot(), 120))


def test_a_line_says_how_full_the_replay_is_and_how_old_what_is_sampled() -> None:
    shown = dataclasses.replace(a_snapshot(), max_policy_lag=0, replay=REPLAY)
    assert "| replay 9,000 of 100,000 steps, 5.00 samples for each, age 12.2 updates and 800 steps |" in line(shown)
    young = dataclasses.replace(shown, replay={"steps": 10, "capacity_steps": 50, "inserted": 10, "sampled": 0, "surplus": 0.0})
    assert "| replay 10 of 50 steps, 0.00 samples for each |" in line(young)
    assert "replay" not in line(a_snapshot())


def test_lines_come_every_few_seconds_and_the_last_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    view = LineView(stream)
    view(a_snapshot(update=0))  # nothing trained yet: nothing to say
    for update in (1, 2, 3):
        view(a_snapshot(update))
    now[0] += LINE_SECONDS
    view(a_snapshot(4))
    view(a_snapshot(5))
    view.close()
    view.close()
    assert [text.split()[2] for text in stream.getvalue().splitlines()] == ["1", "4", "5"]


def test_the_panel_is_drawn_with_messages_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "110")
    stream = io.StringIO()
    view = LiveView(stream)
    for update in range(1, 4):
        view(a_snapshot(update, mean_return=math.nan if update == 1 else 10.0 * update))
    view.message("a warning")
    view.close()
    for part in (
        "CartPole-v1",
        "30.0 ± 3.0 of 475",
        "11,234 steps/s",
        "learning 25%",
        "of 4 updates",
        "10 produced",
        "1 actor died",
        "0:30 to go",
        "[1:15] a warning",
    ):
        assert part in stream.getvalue()


def drawn(snapshot: Snapshot, columns: int) -> list[str]:
    """The panel's lines as a terminal of this width shows them."""
    console = Console(file=io.StringIO(), width=columns, highlight=False)
    console.print(panel(snapshot, [1.0, 2.0], columns - SPARE_COLUMNS))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_panel_leaves_room_for_an_echoed_interrupt_and_breaks_no_line_of_its_own(columns: int) -> None:
    lines = drawn(a_snapshot(), columns)
    assert len(lines) == 9
    assert max(map(len, lines)) <= columns - SPARE_COLUMNS


def test_a_run_without_lag_shows_none_and_one_that_is_done_no_living_actors() -> None:
    text = "\n".join(drawn(dataclasses.replace(a_snapshot(), max_policy_lag=0, phase="done"), 100))
    assert "lag" not in text
    assert "2 ended, 1 restart" in text
    assert "1:15 in all" in text


def test_a_run_that_follows_the_load_shows_its_bounds_and_why_it_last_changed() -> None:
    snapshot = dataclasses.replace(a_snapshot(), autoscale="1:8", scaled="the learner waited for data 62% of 8 s")
    assert "1 running, 1 dead, autoscale 1:8, 1 restart |" in line(snapshot)
    shown = "\n".join(drawn(snapshot, 100))
    assert "autoscale 1:8" in shown
    assert "the learner waited for data 62% of 8 s" in shown
    assert "autoscale" not in "\n".join(drawn(dataclasses.replace(snapshot, phase="done"), 100))


def all_of(screen: io.RawIOBase) -> str:
    """What was shown until the other side closed: a terminal hands it over in pieces."""
    pieces: list[bytes] = []
    with contextlib.suppress(OSError):  # how Linux says that it is closed
        while piece := screen.read(65536):
            pieces.append(piece)
    return b"".join(pieces).decode()


def test_what_starts_is_said_until_the_first_snapshot_and_then_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with os.fdopen(parent, "rb", buffering=0) as screen:
        with os.fdopen(child, "w") as stream:
            view = LiveView(stream)
            view.close()
        seen = all_of(screen)
    assert seen.index(STARTING) < seen.rindex("\x1b[2K")  # erased
    assert "\x1b[?25h" in seen  # the cursor is back


def test_counted_work_is_told_now_and_then_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    view = CountView("replay: update", 40, stream)
    for done in (10, 20):
        now[0] += LINE_SECONDS
        view(done)
        view(done)
    view.close()
    assert stream.getvalue().splitlines() == ["replay: update: 10 of 40, 0:15 to go", "replay: update: 20 of 40, 0:10 to go"]


def test_the_view_follows_the_stream() -> None:
    assert isinstance(open_view("auto", io.StringIO()), LineView)
    assert isinstance(open_view("silent"), SilentView)
    open_view("silent")(a_snapshot())


def test_a_terminal_gets_the_panel_unless_it_is_dumb(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pty.openpty()
    with os.fdopen(parent, "rb"), os.fdopen(child, "w") as stream:
        monkeypatch.setenv("TERM", "xterm-256color")
        assert isinstance(open_view("auto", stream), LiveView)
        monkeypatch.setenv("TERM", "dumb")
        assert isinstance(open_view("auto", stream), LineView)


def test_a_terminal_that_went_away_does_not_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        flush = None  # type: ignore[assignment]

    monkeypatch.setenv("TERM", "xterm")
    for view in (LiveView(Gone()), LineView(Gone())):
        view(a_snapshot())
        view.message("lost")
        view.close()


def test_a_sparkline_rises_with_its_values_and_keeps_its_width() -> None:
    assert sparkline([1.0]) == ""
    assert sparkline([0.0, 1.0]) == "▁█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    long = sparkline([float(i) for i in range(500)])
    assert len(long) == 24
    assert list(long) == sorted(long)
    assert long[-1] == "█"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3723, "1:02:03"), (-5, "0:00")])
def test_a_clock_has_hours_only_where_there_are_some(seconds: float, text: str) -> None:
    assert clock(seconds) == text
