"""`benchmarks/soak_hosts.py`: what makes a row hold, its tables, and that the guide has what was measured. No host is made here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import soak_hosts
import summary
from rows import Measurement, Store, hold_all
from soak_hosts import ROWS, Row, lines, measure, page

from faults.host_faults import LARGE_SECONDS, Absence


def test_the_guide_has_the_table_that_the_results_make() -> None:
    text = summary.GUIDE.read_text(encoding="utf-8")
    assert summary.written(text, summary.GUIDE) == text, "python benchmarks/summary.py writes it anew"


def test_every_row_has_limits_and_those_of_a_host_that_comes_back_three() -> None:
    assert {name: len(row.within) for name, row in ROWS.items()} == {
        "actor": 2, "learner": 2, "fleet": 3, "raylet": 3, "driver": 2, "partition": 3, "head": 2, "slow": 2,
    }  # fmt: skip
    assert all(limit < 65.0 for row in ROWS.values() for limit in row.within)
    assert ROWS["slow"].within[1] < 1.5 * LARGE_SECONDS, "weights that go twice are no success"


def struck(absences: list[Absence], *, fails: bool = False) -> Row:
    def work(found: Any, into: list[Absence], place: Path) -> None:
        for absence in absences:
            into.append(absence)
            found.times += 1
        found.figure = "7 updates"
        if fails:
            raise AssertionError("the run stands still")

    return Row("a fault", "an outcome", (1.0, 5.0, 30.0), work)


@pytest.mark.parametrize(
    ("absences", "wrong"),
    [
        ([Absence(0.5, 4.0, 20.0), Absence(0.9, 5.0, 30.0)], []),
        ([Absence(0.5, 4.0)], []),
        ([Absence(0.5, 4.0, 20.0), Absence(1.5, 4.0, 20.0)], ["noticed, s: 1.5, 1 wanted"]),
        ([Absence(0.5, 6.0, 40.0)], ["back, s: 6.0, 5 wanted", "host takes part again, s: 40.0, 30 wanted"]),
    ],
)
def test_no_figure_may_pass_its_limit(absences: list[Absence], wrong: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROWS, "raylet", struck(absences))
    entry = measure("raylet", tmp_path)
    assert (entry["times"], entry["wrong"], entry["noticed"]) == (len(absences), wrong, [absence.noticed for absence in absences])
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_before_a_run_failed_is_kept_and_the_bench_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ROWS, "raylet", struck([Absence(0.5, 4.0, 20.0)], fails=True))
    store = Store(tmp_path / "results", soak_hosts.STEM, lambda entry: entry["row"], page)
    wanted = Measurement("raylet", 0, "raylet", "", lambda: measure("raylet", tmp_path), soak_hosts.brief)
    assert hold_all([wanted], store, argparse.Namespace(list=False, table=False, again=False)) == 1
    assert (
        "1 times, not held: noticed after 0.5 s; back after 4.0 s; again after 20.0 s; 7 updates; the run stands still"
        in capsys.readouterr().err
    )
    table = store.table_path.read_text()
    assert "| a fault | 1 | an outcome | 0.5, limit 1 | 4.0, limit 5 | 20.0, limit 30 | 7 updates; the run stands still | **no** |" in table
    assert f"0 of 1 rows held; {len(ROWS) - 1} rows are not measured." in table


def test_the_tables_line_has_medians_and_limits_in_the_order_of_the_rows() -> None:
    entries = [
        {"row": "driver", "times": 1, "noticed": [3.0], "back": [9.04], "again": [], "wrong": []},
        {"row": "actor", "times": 3, "noticed": [0.1, 0.2, 0.9], "back": [1.0, 2.0, 4.0], "again": [], "wrong": ["other weights"]},
    ]
    _, _, first, second = lines(entries)
    assert first == "| SIGKILL of an actor on a host | 3 | 0.2 (0.1 to 0.9), limit 1 | 2.0 (1.0 to 4.0), limit 5 | - | **no** |"
    assert second.startswith("| SIGKILL of the driver, then `shoal resume` | 1 | 3.0, limit ")
