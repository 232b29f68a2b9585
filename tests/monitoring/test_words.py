"""Events as sentences."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.monitoring.words import counted, event_words


@pytest.mark.parametrize(
    ("kind", "facts", "words"),
    [
        (
            "died",
            {"role": "actor", "index": 1, "how": "killed by SIGKILL", "reason": ""},
            "actor 1 died, killed by SIGKILL; another one starts",
        ),
        (
            "died",
            {"role": "learner", "index": 0, "how": "x", "reason": "was stopped"},
            "the learner is gone (was stopped); another one starts",
        ),
        ("killed", {"role": "actor", "index": 0, "reason": "was stopped"}, "actor 0 was stopped: it is killed and made anew"),
        ("rolled_back", {"update": 1200, "updates_undone": 1}, "back to the checkpoint of update 1,200: 1 update will be made again"),
        ("not_restored", {"group": 2, "environments": [0, 3]}, "group 2: 2 environments could not be put back"),
        ("not_restored", {"group": 2, "environments": 1}, "group 2: 1 environment could not be put back"),
        (
            "environment_fault",
            {"message": "x: step() raised\n  where: y", "report": {"group": 0, "step": 3}},
            "environment fault: x: step() raised (group 0, step 3)",
        ),
        ("failed", {"error": "DivergedError", "message": "diverged"}, "the run ended with DivergedError: diverged"),
        ("scaled", {"actors": 1}, "now 1 actor"),
        (
            "scaled",
            {"actors": 4, "before": 2, "reason": "the learner waited for data 62% of 8 s", "autoscale": "1:4", "learner_waits": 0.62},
            "now 4 actors instead of 2: the learner waited for data 62% of 8 s",
        ),
        ("scaled", {"actors": 2, "before": 2, "reason": "", "nodes": {"a": 1, "b": 1}}, "now 2 actors (1 on a, 1 on b)"),
        (
            "scaled",
            {"actors": 4, "before": 1, "reason": "", "nodes": {"b": 2}, "there": 2},
            "4 actors wanted instead of 1, and now 2 (2 on b); the others begin as nodes are taken in",
        ),
        ("nodes_awaited", {"there": 2, "wanted": 3, "cpus": 4, "seconds": 60.0}, "waiting for nodes: 2 of 3 with 4 CPUs are there"),
        (
            "node_draining",
            {"node": "a", "reason": "preempted", "notice": "Ray takes the node away", "seconds": 30.2, "actors": [1]},
            "node a is to go in 30 s (preempted: Ray takes the node away)",
        ),
        ("node_draining", {"node": "a", "reason": "preempted", "notice": "x", "seconds": None}, "node a is to go soon (preempted: x)"),
        ("node_left", {"node": "a", "reason": "preempted"}, "node a is left: preempted"),
        ("node_lost", {"node": "a", "reason": "silent", "actors": [0]}, "node a is lost (silent)"),
        ("something_new", {"a": 1, "report": {}, "b": ""}, "something new: a 1"),
        ("died", {"of": "another version"}, "died: of another version"),
    ],
)
def test_an_event_is_a_sentence(kind: str, facts: dict[str, Any], words: str) -> None:
    assert event_words(kind, facts).startswith(words)


@pytest.mark.parametrize(
    ("kind", "words"), [("rolled_back", "back to the checkpoint of update 1,200"), ("resumed", "the run goes on from update 1,200")]
)
def test_where_no_update_is_undone_none_is_said_to_be_made_again(kind: str, words: str) -> None:
    assert event_words(kind, {"update": 1200, "updates_undone": 0}) == words


def test_every_event_that_the_package_tells_of_has_a_sentence() -> None:
    told = {
        kind
        for file in Path(shoal.__file__).parent.rglob("*.py")
        for kind in re.findall(r'\.event\(\s*"(\w+)"', file.read_text(encoding="utf-8"))
    }
    assert {"died", "warning", "rolled_back"} <= told
    assert not [kind for kind in told if event_words(kind, {}).startswith(f"{kind}: ")]
    from shoal.monitoring import words

    assert told <= set(words._SENTENCES)


def test_one_is_counted_without_an_s() -> None:
    assert (counted(1, "restart"), counted(2000, "restart")) == ("1 restart", "2,000 restarts")
