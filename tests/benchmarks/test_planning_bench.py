"""The arithmetic of `make bench-plan` and its table. No time is asserted."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rows import ROOT, Store, circumstances, measure_all

import planning
from planning import ROWS, compared, driver_update_us, looks, page
from shoal.engines.plan import Plan
from shoal.settings import resolve

TRAINED: dict[str, Any] = {
    "env_steps_per_second": 10_000.0, "ceiling": 12_000.0, "result": {"lag": {"mean": 1.5}}, "processor": {"supervisor": 4.0}, "cores": 2,
    "settings": {"batch_env_steps": 1000}, "transport": {"words": 1.0, "decide": 2.0},
}  # fmt: skip


def test_the_error_is_that_of_the_prediction() -> None:
    planned = {"env_steps_per_second": 11_000.0, "lag": {"mean": 2.0}, "bottleneck": {"name": "cores"}}
    found = compared(TRAINED, planned)
    assert found["error"] == pytest.approx(0.1)
    assert (found["lag"], found["lag_predicted"], found["bottleneck"]) == (1.5, 2.0, "cores")


def test_an_update_takes_the_supervisor_what_words_and_decisions_leave() -> None:
    assert driver_update_us(TRAINED) == pytest.approx(1000 * (0.04 * 2 * 1e6 / 1e4 - 3.0))
    assert driver_update_us({**TRAINED, "processor": {}}) is None


def test_a_look_finds_nothing_to_begin_once_all_is_begun() -> None:
    found = looks(5)
    assert found["groups"] == 5
    assert min(found["look_us"], found["lease_us"]) > 0


def test_the_table_has_a_line_for_each_training_and_each_size_of_the_driver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path, "planning", lambda entry: (entry["row"], entry["seed"]), page)
    for n, predicted in enumerate((10_500.0, 10_900.0, 13_000.0)):
        planned = {"env_steps_per_second": predicted, "lag": {"mean": 2.0}, "bottleneck": {"name": None}}
        entry = {"row": ROWS[0].name, "seed": n, "command": ROWS[0].command, "figures": compared(TRAINED, planned)}
        store.append({**entry, **circumstances()})
    store.append({"row": "driver/40", "seed": 0, "figures": {"groups": 40, "look_us": 0.5, "lease_us": 9.0}, **circumstances()})
    measure_all([], store, argparse.Namespace(list=False, table=True, again=False))
    text = capsys.readouterr().out
    assert "+9.0% (+5.0% to +30.0%)" in text
    assert "| yes |" in text
    assert "| 40 | 0.50 | 9.0 |" in text


def test_what_is_there_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert planning.main(["--list", "--results", str(tmp_path), "--rows", "driver/*", "waiting fixed"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f"waiting fixed seed {n}: to do" for n in range(3)),
        *(f"driver/{groups} seed 0: to do" for groups in (40, 400, 4000)),
    ]


@pytest.mark.parametrize("row", planning.KNOWN, ids=lambda row: row.name)
def test_what_is_simulated_for_known_times_is_the_run_that_is_trained(row: planning.Known, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = {key.removeprefix("--").replace("-", "_"): value for key, value in zip(row.options[::2], row.options[1::2], strict=True)}
    config, _ = resolve("benchmarks/waiting.py:fixed", given)
    system = row.system(0.02)
    assert Plan.of(config) == system.plan
    assert (config.actors, system.costs.acting, system.costs.learning) == (system.actors, 0.02, pytest.approx(0.02 * row.learn))


@pytest.mark.parametrize("row", [row for row in ROWS if row.costs_of], ids=lambda row: row.name)
def test_costs_of_another_configuration_are_measured_before_and_after(
    row: planning.Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def shoal(words: Sequence[str], timeout_seconds: float = 0.0) -> dict[str, Any]:
        told.append(words[0] if words[0] == "plan" else words[1])
        if words[0] == "plan":
            assert json.loads(Path(words[words.index("--costs") + 1]).read_text())["cost"] == 2.0, "the mean of 1 and 3"
            assert words[2 : 2 + len(row.options)] == list(row.options)
            return {"rows": [{"env_steps_per_second": 9_000.0, "lag": {"mean": 0.0}, "bottleneck": {"name": None}}]}
        if words[1] == "costs":
            assert words[3:-3] == [*row.options, *row.costs_of]
            return {"cost": float(len(told))}
        assert words[words.index("--seconds") + 1] == "0"
        return TRAINED

    monkeypatch.setattr(planning, "shoal", shoal)
    found = planning.beside(row, argparse.Namespace(seconds=1.0, costs_seconds=2.0, runs=tmp_path))
    assert told == ["costs", "train", "costs", "plan"]
    assert found["error"] == pytest.approx(-0.1)
