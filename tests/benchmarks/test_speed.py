"""The arithmetic of `make bench-speed`, what it reads, and its table. No time is asserted."""

from __future__ import annotations

import gc
import math
import mmap
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import speed
from observing import first_scalars_time, growth_mb, mb_per_hour, memory_mb, rate, tree
from peers import COMPARISONS
from rows import CommandError, Entry, Store, circumstances
from speed import ROWS, at_least, at_most, loss_of_others, page, settings_of, solved_seconds, with_options
from waiting import EPISODE_STEPS, Waiting, fixed, straggler

from shoal.benching.replays import CASES
from shoal.monitoring.store import MetricPoint
from shoal.monitoring.tensorboard import TensorBoardWriter
from shoal.supervision.memory import SharedMemory
from weights import summary

BY_NAME = {row.name: row for row in ROWS}
USUAL = speed._parse([])


def test_the_rate_is_between_updates_after_the_warm_up() -> None:
    points = [MetricPoint(u, steps, seconds, 0.0) for u, (seconds, steps) in enumerate([(1, 7), (6, 100), (8, 300), (10, 500), (99, 500)])]
    assert rate(points) == 100.0
    with pytest.raises(CommandError, match="too short"):
        rate(points[:3])


def test_others_lose_nothing_where_only_the_straggler_is_slow() -> None:
    alone = 100.0
    others = alone * (speed.NUM_WAITING - 1)
    assert math.isclose(loss_of_others(alone * speed.NUM_WAITING, others + alone / speed.STRAGGLER_TIMES), 0.0, abs_tol=1e-12)
    assert math.isclose(loss_of_others(alone * speed.NUM_WAITING, 0.9 * others + alone / speed.STRAGGLER_TIMES), 0.1)


def test_a_seed_that_did_not_solve_it_never_got_there() -> None:
    figures = [{"seconds": s, "mean_return": r} for s, r in ((8.0, 480.0), (9.0, 500.0), (5.0, 300.0))]
    assert solved_seconds(figures, 475) == 9.0
    assert solved_seconds(figures[1:], 475) == math.inf


def test_growth_is_from_the_given_second_to_the_end() -> None:
    samples = [(10.0, 50.0), (20.0, 400.0), (30.1, 300.0), (40.0, 302.0), (50.0, 301.0), (60.0, 299.0), (70.0, 350.0), (80.0, 305.0)]
    assert growth_mb(samples, 30.0) == (301.0, 305.0, 4.0)
    with pytest.raises(CommandError, match="memory-seconds"):
        growth_mb(samples[:3], 30.0)


def leaking(mb_per_hour: float, seconds: float = 600.0, noise: float = 0.0) -> list[tuple[float, float]]:
    rng = random.Random(0)
    times = [5.0 * k for k in range(1, int(seconds / 5) + 1)]
    return [(at, 300.0 + min(at, 60.0) + mb_per_hour * at / 3600 + rng.uniform(-noise, noise)) for at in times]


def memory_figures(samples: list[tuple[float, float]]) -> dict[str, float]:
    begin, end, growth = growth_mb(samples, 90.0)
    return {
        "begin_mb": begin, "end_mb": end, "growth_mb": growth, "most_mb": max(mb for _, mb in samples), "seconds": samples[-1][0],
        "mb_per_hour": mb_per_hour(samples),
    }  # fmt: skip


def test_the_slope_of_memory_is_that_of_the_second_half() -> None:
    assert mb_per_hour(leaking(30.0)) == pytest.approx(30.0)
    assert mb_per_hour(leaking(0.0)) == 0.0
    assert mb_per_hour(leaking(30.0, noise=1.0)) == pytest.approx(30.0, abs=6.0)
    peak = [(at, mb + 50.0 * (at % 100 == 0)) for at, mb in leaking(0.0)]
    assert mb_per_hour(peak) == 0.0  # a checkpoint is written now and then
    step = [(at, mb + (at > 450)) for at, mb in leaking(0.0)]
    assert mb_per_hour(step) == pytest.approx(13.0, abs=0.5)
    with pytest.raises(CommandError, match="memory-seconds"):
        mb_per_hour(leaking(0.0, 20.0))


def test_a_steady_leak_of_30_mb_an_hour_is_no_even_where_it_grew_by_less_than_is_allowed() -> None:
    row, leak, steady = BY_NAME["memory"], memory_figures(leaking(30.0)), memory_figures(leaking(3.0))
    assert leak["growth_mb"] < speed.GROWTH_MB
    assert [row.answer([figures]) for figures in (leak, steady, steady | {"most_mb": 501.0}, steady | {"growth_mb": 5.1})] == [
        "no", "yes", "no", "no",
    ]  # fmt: skip
    assert "+30.0 MB an hour in the second half" in row.figure([leak])


def test_memory_that_was_measured_before_slopes_were_is_readable_and_answers_nothing() -> None:
    row, old = BY_NAME["memory"], memory_figures(leaking(3.0))
    del old["mb_per_hour"]
    assert (row.answer([old]), row.answer([old | {"most_mb": 501.0}])) == ("unknown", "no")
    assert "slope not recorded" in row.figure([old])


def test_the_curve_of_memory_is_part_of_the_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    samples = leaking(30.0)
    monkeypatch.setattr(speed, "memory_of", lambda *given: [(at, mb + 90.0 - at / 10, mb) for at, mb in samples])
    row = BY_NAME["memory"]
    found = speed.measure(row, 0, speed._parse(["--runs", str(tmp_path)]))["figures"]
    assert found["curve"] == [[at, round(mb + 90.0 - at / 10, 2), round(mb, 2)] for at, mb in samples]
    assert found["mb_per_hour"] == mb_per_hour(samples)  # of their own memory
    assert (found["begin_mb"], found["end_mb"], found["growth_mb"]) == growth_mb(samples, speed.MEMORY_FROM_SECONDS)
    assert found["most_mb"] > 400.0
    assert row.answer([found]) == "no"


def test_a_server_is_worth_asking_where_the_way_costs_less_than_what_it_saves() -> None:
    row = BY_NAME["inference/server"]
    figures = {
        "way_ms": 0.1,
        "image_way_ms": 0.2,
        "small_weights": 9,
        "small_ms": 0.01,
        "served_weights": 1_000_001,
        "served_ms": 0.25,
        "image_ms": 2.0,
    }
    assert [row.answer([figures | {"way_ms": way}]) for way in (0.1, 0.16)] == ["yes", "no"]
    assert "0.25 with 1,000,001" in row.figure([figures])
    assert row.command == "benchmarks/served.py"
    assert (Path(speed.__file__).with_name(row.script)).exists()


def test_a_row_of_the_replay_is_one_case_of_what_the_command_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    fast = {"insert_per_second": 600_000.0, "sample_per_second": 510_000.0}
    cases = {case.name: {**fast, "capacity_steps": n, "rollout_length": 128, "size_bytes": 55_000_000} for n, case in enumerate(CASES)}
    monkeypatch.setattr(speed, "shoal", lambda arguments: asked.append(arguments) or {"cases": cases})
    rows = [row for row in ROWS if row.name.startswith("replay/")]
    assert [row.name for row in rows] == [f"replay/{name}" for name in cases]
    for row in rows:
        entry = speed.measure(row, 0, USUAL)
        assert entry["figures"] == cases[row.name.partition("/")[2]]
        assert entry["command"] == f"shoal {' '.join(asked.pop()).removesuffix(' --json')}"
    assert "600,000 inserted/s, 510,000 sampled/s" in rows[0].figure([cases["vector"]])
    slow = [fast | {name: 499_999.0} for name in fast]
    assert [BY_NAME["replay/vector"].answer([one]) for one in (fast, *slow)] == ["yes", "no", "no"]
    for name in fast:
        answers = [BY_NAME["replay/stacks"].answer([fast | {name: number}]) for number in (20_000.0, 19_999.0)]
        assert answers == ["yes", "no"]
    assert BY_NAME["replay/short rollouts"].answer([fast]) == "–"


def test_limits_hold_for_the_median() -> None:
    figures = [{"a": 1.0, "b": 9.0}, {"a": 2.0, "b": 1.0}, {"a": 9.0, "b": 1.0}]
    assert at_least("a", 2.0)(figures)
    assert not at_least("a", 2.1)(figures)
    assert at_most({"a": 2.0, "b": 1.0})(figures)
    assert not at_most({"a": 2.0, "b": 0.5})(figures)


def test_a_version_that_was_overtaken_counts_until_a_newer_one_was_there() -> None:
    times_ms = [[0, 1, 2, 3, 4], [0, 1.5, 2.5, 3.5, 4.5], [0, 2.5, 0, 6, 0], [0, 3, 0, 7, 0]]  # of versions 0 to 4
    found = summary((np.array(times_ms) * 1e6).astype(np.int64))
    assert (found["versions"], found["overtaken"]) == (3, 2)  # the last one was not used before the end
    assert (found["median_ms"], found["max_ms"]) == (4.0, 5.0)
    assert (found["publish_ms"], found["wait_ms"], found["read_ms"]) == (0.5, 1.75, 0.75)


def test_the_time_of_the_first_numbers_is_read_from_the_event_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []
    monkeypatch.setattr(time, "time", lambda: ticks.append(len(ticks) + 0.5) or ticks[-1])
    writer = TensorBoardWriter(tmp_path)
    writer.scalars(8, {"a": 1.0})
    first = ticks[-1]
    writer.scalars(16, {"a": 2.0})
    writer.close()
    assert first_scalars_time(tmp_path) == first


def test_memory_is_summed_over_a_process_and_its_descendants() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    assert {os.getpid(), child} <= set(tree(os.getpid()))
    os.close(write)
    os.waitpid(child, 0)
    os.close(read)
    assert child not in tree(os.getpid())


def test_a_processes_own_memory_is_what_it_allocates_and_shares() -> None:
    gc.collect()  # what tests before this one left
    pss, own = memory_mb([os.getpid()])
    assert 0 < own < pss
    own_pages = mmap.mmap(-1, 30_000_000, mmap.MAP_PRIVATE)  # an array may lie where freed ones lay, which is no new memory
    np.frombuffer(own_pages, np.uint8).fill(1)
    shared = SharedMemory.create(20_000_000)
    shared.buffer.fill(1)
    assert memory_mb([os.getpid()])[1] - own == pytest.approx(50.0, abs=2.0)
    assert memory_mb([2**22 + 1]) == (0.0, 0.0)  # nobody


def test_of_all_stragglers_that_live_one_is_slow_and_another_takes_its_place(tmp_path: Path) -> None:
    def asked(env: Waiting) -> float:
        env.reset(seed=0)
        env.step(np.int64(0))
        return env.requested_seconds

    lock = str(tmp_path / "lock")
    first, second = straggler(lock, 1e-4, 3.0), straggler(lock, 1e-4, 3.0)
    assert (asked(first), asked(second)) == pytest.approx((3e-4, 1e-4))
    first.close()
    assert asked(straggler(lock, 1e-4, 3.0)) == pytest.approx(3e-4)


def test_waiting_environments_end_their_episodes() -> None:
    env = fixed(0.0)
    env.reset(seed=0)
    assert [env.step(np.int64(1))[2] for _ in range(EPISODE_STEPS)] == [False] * (EPISODE_STEPS - 1) + [True]


def test_options_of_the_command_line_replace_those_of_throughput_only() -> None:
    given = speed._parse(["--groups", "8"])
    row = BY_NAME["throughput/impala-python"]
    other = with_options(row, given)
    assert other.options[other.options.index("--sampling.groups") + 1] == "8"
    assert settings_of(other, given) != settings_of(row, given)
    assert with_options(BY_NAME["memory"], given) is BY_NAME["memory"]


def test_every_row_has_settings_and_presets_are_part_of_them() -> None:
    assert len({settings_of(row, USUAL) for row in ROWS}) == len(ROWS)
    row = BY_NAME["atari/pong-cpu"]
    assert settings_of(row, USUAL) != settings_of(replace(row, options=("--preset", "none")), USUAL)


def test_what_was_measured_for_other_seconds_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rows_of_other_settings(*given: str) -> set[str]:
        return {row.name.partition("/")[0] for row in ROWS if settings_of(row, speed._parse(given)) != settings_of(row, USUAL)}

    assert rows_of_other_settings("--seconds", "8") == {"waiting", "throughput", "ceiling", "atari"}
    assert rows_of_other_settings("--memory-seconds", "60") == {"memory"}
    assert rows_of_other_settings("--repeats", "1", "--seconds", "20", "--memory-seconds", "600") == set()
    calls: list[float] = []

    def measure(row: speed.Row, repeat: int, options: Any) -> Entry:
        calls.append(options.seconds)
        return {
            "row": row.name,
            "seed": repeat,
            "command": row.command,
            "figures": {"env_steps_per_second": 1.0, "steps_of_an_update": 1.0},
        }

    monkeypatch.setattr(speed, "measure", measure)
    for seconds in ("8", "8", "20", "20"):
        speed.main(["--results", str(tmp_path), "--rows", "throughput/impala-python", "--repeats", "1", "--seconds", seconds])
    assert calls == [8.0, 20.0]


def test_throughput_is_measured_as_beside_other_libraries() -> None:
    peers = [comparison for comparison in COMPARISONS if comparison.floor is not None]
    own = [row for row in ROWS if row.name.startswith("throughput/")]
    assert [row.command for row in own] == [comparison.command(0.0).removesuffix(" --stop.seconds 0") for comparison in peers]
    assert [row.target for row in own] == [f"≥ {comparison.floor:,} env steps/s" for comparison in peers]


@pytest.mark.parametrize("name", ["atari/pong", "atari/pong-cpu"])
def test_ataris_native_form_is_beside_the_same_without_it(name: str) -> None:
    plain, native = BY_NAME[name], BY_NAME[f"{name}-native"]
    assert native.command == f"{plain.command} --env.form native"
    assert (native.target, native.repeats) == (plain.target, plain.repeats)


def test_the_table_says_command_figure_target_and_whether_it_is_reached(tmp_path: Path) -> None:
    store = Store(tmp_path, "speed", lambda entry: (entry["row"], entry["seed"]), page)
    made = {
        "waiting/fixed": {"env_steps_per_second": 5900.0, "blocking_ms": 10.1, "fraction": 0.93},
        "waiting/straggler": {
            "env_steps_per_second": 5000.0,
            "without": 6000.0,
            "loss": 0.15,
            "steps_of_an_update": 100.0,
            "update_without": 4096.0,
        },
        "start": {"first_update": 4.0, "import_torch": 2.7, "more": 1.3, "help": 0.4},
        "solve/CartPole-v1": {"seconds": 9.0, "mean_return": 470.0, "env_steps": 70000},
        "memory": {"begin_mb": 300.0, "end_mb": 301.0, "growth_mb": 1.0, "mb_per_hour": 2.0, "most_mb": 310.0, "seconds": 600.0},
        "weights": {"median_ms": 1.0, "p99_ms": 11.0, "publish_ms": 0.3, "wait_ms": 0.4, "read_ms": 0.3, "megabytes": 7.0},
        "throughput/impala-native": {"env_steps_per_second": 160_000.0, "steps_of_an_update": 16384.0},
        "atari/pong": {"env_steps_per_second": 500.0, "ceiling": 600.0, "fraction": 0.83},
    }
    for name, figures in made.items():
        code = {} if name == "start" else {"code": "0123abcd"}  # an old row
        store.append({"row": name, "seed": 0, "command": BY_NAME[name].command, "figures": figures} | code | circumstances())
    lines = [text.split(" | ") for text in page(store) if text.startswith("| ")][2:]
    answers = {cells[0].removeprefix("| "): cells[5] for cells in lines}
    assert answers == {
        "waiting/fixed": "yes", "waiting/straggler": "no", "start": "yes", "solve/CartPole-v1": "no", "memory": "yes", "weights": "no",
        "throughput/impala-native": "yes", "atari/pong": "yes",
    }  # fmt: skip
    assert all(cells[1].startswith("`") for cells in lines)
    assert [cells[7] for cells in lines] == ["0123abcd |", "0123abcd |", "unknown |", *["0123abcd |"] * 5]
