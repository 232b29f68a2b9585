"""The README's results are those of the benches."""

from __future__ import annotations

import summary


def test_the_readme_has_the_table_that_the_results_make():
    text = summary.README.read_text(encoding="utf-8")
    assert summary.written(text) == text, "python benchmarks/summary.py writes it anew"


def test_every_measured_row_and_seed_is_in_the_table():
    lines = list(summary.table())
    for environment, algorithm, _ in summary.newest(summary.entries("learning"), "environment", "algorithm", "seed"):
        (found,) = [text for text in lines if text.startswith(f"| {environment}, {algorithm} |")]
        measured = {
            entry["seed"] for entry in summary.entries("learning") if (entry["environment"], entry["algorithm"]) == (environment, algorithm)
        }
        assert f"({len(measured)} seed" in found
