"""The results in README, guide and docs/scaling.md are those of the benches."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import speed
import summary

FIGURES = {"first_update": 2.0, "import_torch": 1.5, "more": 0.5, "help": 0.1}


@pytest.mark.parametrize("page", summary.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_tables_that_the_results_make(page: Path):
    text = page.read_text(encoding="utf-8")
    assert summary.written(text, page) == text, "python benchmarks/summary.py writes it anew"


def test_every_measured_row_and_seed_is_in_the_table():
    lines = list(summary.table())
    for environment, algorithm, _ in summary.newest(summary.entries("learning"), "environment", "algorithm", "seed"):
        (found,) = [text for text in lines if text.startswith(f"| {environment}, {algorithm} |")]
        measured = {
            entry["seed"] for entry in summary.entries("learning") if (entry["environment"], entry["algorithm"]) == (environment, algorithm)
        }
        assert f"({len(measured)} seed" in found


def test_every_line_says_when_where_and_under_which_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    lines = [text for text in summary.table() if text.startswith("| ") and not text.startswith(("| ---", "| what", "| speed"))]
    assert lines
    for text in lines:
        assert re.search(r"\| \d{4}-\d\d-\d\d(?: to \d{4}-\d\d-\d\d)?, [^,|]+, load [\d.]+(?: to [\d.]+)? \|$", text), text
    made = [
        {
            "row": "start",
            "seed": n,
            "command": "",
            "date": f"2026-11-2{n}",
            "load": 1.5 + n / 4,
            "machine": {"cpu": cpu},
            "figures": FIGURES,
        }
        for n, cpu in enumerate(("Intel(R) Xeon(R) Processor @ 2.80GHz", "AMD EPYC", "AMD EPYC"))
    ]
    (tmp_path / "speed.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in made) + '{"row": "sta')
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    (text,) = summary.speed_lines()
    assert text.endswith(" | yes | 2026-11-20 to 2026-11-22, Intel Xeon @ 2.80GHz and AMD EPYC, load 1.5 to 2.0 |")


def test_every_measured_row_of_the_speed_bench_is_in_the_table():
    names = {row for row, _ in summary.newest(summary.entries("speed"), "row", "seed")}
    assert names & {row.name for row in speed.ROWS}
    lines = list(summary.table())
    for row in speed.ROWS:
        assert any(text.startswith(f"| {row.name} | ") for text in lines) == (row.name in names)
