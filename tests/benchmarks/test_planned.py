"""Predictions beside the runs of scaling.py, and the table for 1 to 10,000 nodes: what the plan is given, and what is said of it. No speed is asserted."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import planned
import pytest
import scaling
from clusters import Place
from planned import beside_cluster, broken, cluster_lines, mean, table_lines
from rows import circumstances

import planning
from planning_costs import costs

LINK = {"latency_us": 400.0, "gbit": 8.0, "message_us": 250.0}
ROW = next(row for row in scaling.ROWS if row.name == "waiting/2")
MOVES = [
    {"name": "learner", "what": "the learner", "better": "one that is twice as fast", "gain": 0.72, "advice": "more of them (--learners)"}
]
BREAKS = {
    "nodes": 5,
    "name": "learner",
    "words": "the learner, in use 99 % of the time; one that is twice as fast: 72 % more",
    "moved_to": 10,
    "advice": "more",
}


def test_of_two_answers_every_number_is_the_mean_and_all_else_is_the_first() -> None:
    before, after = costs(costs__e=20.0), costs(costs__e=30.0, machine={"cpu": "another", "cores": 2})
    found = mean(before, after)
    assert found["costs"]["e"] == 25.0
    assert found["machine"] == before["machine"]
    assert (found["settings"], found["environment"]["waits"], found["cores"]) == (before["settings"], False, 2)
    assert type(found["settings"]["group_size"]) is int
    trial = {"acting": 0.5, "acting_us": None}
    assert mean(costs(trial=None), costs(trial=trial))["trial"] == mean(costs(trial=trial), costs(trial=None))["trial"] == trial


def test_costs_are_measured_before_and_after_the_run_and_the_plan_is_given_their_mean_and_the_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def shoal(words: Sequence[str], timeout_seconds: float = 0.0) -> dict[str, Any]:
        told.append(words[0] if words[0] == "plan" else " ".join(words[:2]))
        if words[0] == "bench":
            assert words[words.index("--sampling.groups") + 1] == "1", "costs are those of one node"
            return costs("impala", costs__l=10.0 * len(told))
        assert json.loads(Path(words[words.index("--costs") + 1]).read_text())["costs"]["l"] == 25.0
        given = dict(pairwise(words))
        assert (given["--engine"], given["--nodes"], given["--actors-per-node"], given["--sampling.groups"]) == ("ray", "2", "1", "1")
        assert (given["--link-latency"], given["--link-bandwidth"], given["--message-us"]) == ("400", "8", "250")
        assert "--one-machine" in words
        row = {"env_steps_per_second": 110.0, "lag": {"mean": 0.5}, "bottleneck": {"name": "waiting"}, "utilisation": {"cores": 0.4}}
        return {"rows": [row]}

    @contextlib.contextmanager
    def cluster(self: scaling.Row, nodes: int) -> Iterator[Place]:
        yield Place("HEAD:1", tmp_path, {})

    def trained(*given: Any) -> tuple[float, dict[str, Any]]:
        told.append("train")
        return 100.0, {"lag": {"mean": 0.75}}

    def measured_link(place: Place) -> dict[str, float]:
        told.append("link")
        return LINK

    monkeypatch.setattr(planned, "shoal", shoal)
    monkeypatch.setattr(planned, "measured_link", measured_link)
    monkeypatch.setattr(scaling.Row, "cluster", cluster)
    monkeypatch.setattr(scaling, "trained", trained)
    found = beside_cluster(ROW, 0, argparse.Namespace(costs_seconds=1.0, runs=tmp_path))
    assert told == ["bench costs", "link", "train", "bench costs", "plan"]
    assert found["error"] == pytest.approx(0.1)
    assert (found["lag"], found["lag_predicted"], found["bottleneck"], found["message_us"]) == (0.75, 0.5, "waiting", 250.0)


def test_the_command_takes_what_it_is_given(tmp_path: Path) -> None:
    options = "--preset none --sampling.groups 4 --sampling.group-size 8 --sampling.rollout-length 32 --algorithm impala"
    row = scaling.Row("toy", "CartPole-v1", tuple(options.split()), 2, 1, 0.9)
    found = planned.predicted(row, costs("impala"), LINK, argparse.Namespace(runs=tmp_path))
    assert found["nodes"] == 2
    assert found["env_steps_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


def entry(row: str, figures: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    return {"row": row, "seed": seed, "command": "", "figures": figures, **circumstances()}


def test_an_error_is_the_median_and_within_ten_percent_or_not() -> None:
    one = {"measured": 100.0, "predicted": 105.0, "lag": 0.5, "lag_predicted": 0.25, "bottleneck": None, "cores": 0.5, **LINK}
    made = [entry("scaling/waiting/2", {**one, "error": error}, n) for n, error in enumerate((0.05, -0.02, 0.30))]
    made += [entry("scaling/waiting/4", {**one, "error": -0.11})]
    told = [line.strip("| ").split(" | ") for line in cluster_lines(made)][2:]
    assert [(cells[0], cells[2], cells[5], cells[-1]) for cells in told] == [
        ("waiting/2", "3", "+5.0% (-2.0% to +30.0%)", "yes"),
        ("waiting/4", "1", "-11.0%", "no"),
    ]


def test_the_table_says_what_breaks_first_at_what_size_and_what_would_move_it() -> None:
    used = {"learner": 0.99, "driver": 0.2, "learner_cores": 1.0}
    row = {"nodes": 1000, "learners": 1, "env_steps_per_second": 4e5, "env_steps_per_second_and_node": 400.0, "lag": {"mean": 2.0}, "utilisation": used,
           "bottleneck": {"name": "learner"}, "moves": MOVES}  # fmt: skip
    figures = {"rows": [row], "breaks": BREAKS, "parts": {"e": 10.0}, "settings": {"cores": 2, "groups": 4, "group_size": 64},
               "links": {"node_bandwidth": 1.25e9, "latency": 1e-4}, "way": None}  # fmt: skip
    text = "\n".join(table_lines([entry("table/1 learner", figures)]))
    assert "| 1,000 | 1 | 400,000 | 400 | 2.0 | 99% | 20% | 100% | learner | +72% |" in text
    assert "links of 10 Gbit/s and 100 us" in text
    assert "- 1 learner: first breaks, at 5 nodes, where" in text
    assert text.endswith("Made twice as good, that moves to 10 nodes: more.")
    assert broken(None).startswith("nothing breaks")
    assert broken({**BREAKS, "moved_to": None}).endswith("beyond the table: more.")
    assert list(table_lines([])) == []


def test_every_row_of_scaling_has_one_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "why_not", lambda: "")
    assert planning.main(["--list", "--results", str(tmp_path), "--rows", "scaling/*", "table/*", "--repeats", "1"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed == [*(f"scaling/{row.name} seed 0: to do" for row in scaling.ROWS), *(f"{name} seed 0: to do" for name in planned.TABLES)]
