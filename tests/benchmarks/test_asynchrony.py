"""The arithmetic of `make bench-async`, its table and figure, and that a full queue makes samples as old as it says."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import asynchrony
import pytest
from asynchrony import CURVE, LAGS, ROWS, TASKS, Row, area, curve, draw, page, reached_at, settings_of, summary
from rows import Entry, Store, circumstances


def told(task: asynchrony.Task, scale: float = 1.0) -> Entry:
    """What curve.py would say of a run of ten updates whose return rises in a line."""
    steps = [task.env_steps * k // 10 for k in range(1, 11)]
    result = {
        "env_steps": task.env_steps, "updates": 10, "seconds": 5.0, "env_steps_per_second": task.env_steps / 5, "lag": {"mean": 1.5, "max": 2},
        "ledger": {"dropped": {}}, "evaluation": {"mean_return": 99.0},
    }  # fmt: skip
    returns = [scale * task.threshold * k / 5 for k in range(1, 11)]
    return {"env_steps": steps, "seconds": [0.5 * k for k in range(1, 11)], "mean_return": returns, "result": result}


def full_store(directory: Path) -> Store:
    store = Store(directory, "asynchrony", lambda entry: (entry["row"], entry["seed"]), page)
    for row in ROWS:
        for seed in (0, 1, 2):
            code = {"code": "0123abcd"} if seed else {}  # an old row
            store.append({"row": row.name, "seed": seed} | summary(told(row.task, 1 - 0.3 * seed), row.task) | code | circumstances())
    return store


def test_the_grid_is_complete_and_every_configuration_resolves_to_another() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for task in TASKS:
        of_lag = {(r.algorithm, r.bound, r.vtrace) for r in ROWS if r.task is task and r.full and r.bound}
        assert of_lag == {(algorithm, lag, vtrace) for algorithm in ("appo", "impala") for lag in LAGS for vtrace in (True, False)}
    assert len({settings_of(row, seed) for row in ROWS for seed in (0, 1)}) == 2 * len(ROWS)


def test_area_is_the_mean_of_the_steps_of_a_curve() -> None:
    rng = random.Random(0)
    for _ in range(50):
        at = sorted(rng.sample(range(1, 120), rng.randint(1, 20)))
        value = [rng.uniform(-5, 5) for _ in at]
        slow = [next((y for x, y in reversed(list(zip(at, value, strict=True))) if x <= unit), value[0]) for unit in range(100)]
        assert math.isclose(area(at, value, 100), sum(slow) / 100, abs_tol=1e-9)


def test_a_curve_has_equal_distances_and_what_was_known_there() -> None:
    kept = curve([10, 20, 100], [1.0, 2.0, 3.0], [5.0, 6.0, 7.0], 100)
    assert len(kept["mean_return"]) == asynchrony.CURVE_POINTS
    assert (kept["mean_return"][0], kept["mean_return"][7], kept["mean_return"][-2], kept["mean_return"][-1]) == (5.0, 6.0, 6.0, 7.0)
    assert kept["seconds"][-1] == 3.0


def test_a_seed_that_never_came_there_counts_as_later_than_all_others() -> None:
    entries = [{"threshold": None if t is None else {"seconds": t}} for t in (3.0, None, 5.0)]
    assert reached_at(entries, "seconds") == "5 (2 of 3)"
    assert reached_at(entries[1:2], "seconds") == "not reached (0 of 1)"


def test_the_table_has_a_line_for_every_configuration(tmp_path: Path) -> None:
    text = "\n".join(page(full_store(tmp_path)))
    for task in TASKS:
        assert f"## {task.environment}, {task.env_steps:,} environment steps" in text
    assert text.count("\n| appo/lag-8/uncorrected | 3 | 1.5 (2) |") == 2
    assert "| 99 (99 to 99) |" in text
    assert text.count(" | unknown, 0123abcd |") == len(ROWS)


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `bench`")
    draw(full_store(tmp_path), tmp_path / "figures" / "a.png")
    assert (tmp_path / "figures" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_full_queue_makes_samples_as_old_as_its_depth(tmp_path: Path) -> None:
    settings = {
        "algorithm": "impala", "preset": "none", "max_policy_lag": 6, "stop.updates": 40, "actors": 1, "sampling.groups": 2,
        "sampling.group_size": 1, "sampling.rollout_length": 200, "run_dir": str(tmp_path / "run"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(CURVE), "CartPole-v1", json.dumps(settings), "6"], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)["result"]
    assert result["lag"]["max"] == 6
    assert result["lag"]["mean"] > 4
    assert set(result["ledger"]["dropped"]) == {"shutdown"}


def test_rows_are_named_as_they_are_made() -> None:
    task = TASKS[0]
    assert Row(task, "ppo").name == "CartPole-v1/ppo"
    assert Row(task, "appo", 8, vtrace=False).name == "CartPole-v1/appo/lag-8/uncorrected"
    assert Row(task, "impala", 4, full=False).name == "CartPole-v1/impala/shipped-4"
