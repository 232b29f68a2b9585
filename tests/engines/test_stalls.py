"""Who waits for whom, as it follows from what is seen."""

from __future__ import annotations

from typing import Any

from test_coordinator import coordinator_of, finish, plan_of

from shoal.engines.coordinator import Coordinator
from shoal.engines.stalls import Situation, in_words, report
from shoal.engines.traffic import Delivery
from shoal.engines.watch import Seen
from shoal.types import Activity, ActivityRecord


def seen(name: str, activity: Activity, age: float = 1.0, *, group: int = -1, **facts: Any) -> Seen:
    who, _, index = name.partition("-")
    record = ActivityRecord(activity, facts.pop("record_of", 0), group, -1, -1, age, 5, {})
    given = {"state": "S", "up_seconds": 60.0} | facts
    return Seen(who, int(index), 0, record=record, **given)


def found(c: Coordinator, *processes: Seen, **more: Any) -> dict[str, Any]:
    pids = more.pop("pids", [100 + n for n in range(len(processes))])
    return report(Situation(processes, c, pids, **more), [""] * len(processes))


def test_in_sync_mode_all_wait_for_the_slowest_and_while_it_learns_for_the_learner():
    c = coordinator_of(plan_of("sync", 2))
    c.place([0, 1])
    leases = c.next_leases()
    finish(c, leases[0])
    waiting = seen("learner-0", Activity.WAITING_FOR_BATCH, 3.0)
    idle = seen("actor-0", Activity.WAITING_FOR_LEASE, 2.0)
    slow = seen("actor-1", Activity.STEPPING, 2.5, group=1, order_seconds=3.0)
    said = found(c, waiting, idle, slow)
    assert [(w["who"], w["for"], w["seconds"]) for w in said["waits"]] == [("learner-0", ["actor-1"], 3.0), ("actor-0", ["actor-1"], 2.0)]
    assert said["blamed"] == ["actor-1, stepping group 1 for 2.5 s"]
    assert "learner-0 has waited for actor-1 for 3.0 s: 1 of 2 rollouts" in in_words(said)

    finish(c, leases[1])
    c.next_batch()
    learning = seen("learner-0", Activity.LEARNING, 0.5, order_seconds=0.5)
    said = found(c, learning, idle, seen("actor-1", Activity.WAITING_FOR_LEASE))
    assert [(w["who"], w["for"], w["why"]) for w in said["waits"]] == [
        ("actor-0", ["learner-0"], "an update is being made"),
        ("actor-1", ["learner-0"], "an update is being made"),
    ]
    assert said["blamed"] == ["learner-0, learning for 0.5 s"]


def test_an_actor_for_whom_something_is_long_on_its_way_is_not_said_to_do_nothing():
    c = coordinator_of(plan_of("sync", 1))
    c.place([0])
    c.next_leases()
    far = seen("actor-0", Activity.WAITING_FOR_LEASE, 17.0, order_seconds=0.0, delivery=Delivery(16.6, 2_000_000, 8_000_000))
    said = found(c, seen("learner-0", Activity.WAITING_FOR_BATCH, 17.5), far)
    assert [(w["who"], w["for"]) for w in said["waits"]] == [("learner-0", ["actor-0"])]
    on_its_way = "what it is told is on its way: 2,000,000 of 8,000,000 bytes after 17 s"
    assert said["blamed"] == [f"actor-0, waiting for a lease ({on_its_way}) for 17.0 s"]


def test_what_is_not_there_starts_is_paused_or_stopped_is_said_so():
    c = coordinator_of(plan_of("sync", 2))
    c.place([0, 1])
    c.next_leases()
    starting = seen("learner-0", Activity.LEARNING, record_of=-1, up_seconds=4.0)
    said = found(
        c, starting, seen("actor-0", Activity.WAITING_FOR_LEASE), seen("actor-1", Activity.STEPPING, up_seconds=0.2), pids=[100, 101, 0]
    )
    assert [(w["who"], w["for"], w["why"]) for w in said["waits"]] == [("actor-0", ["learner-0"], "the learner is not ready")]
    assert [p["doing"] for p in said["processes"]] == ["starting", "waiting for a lease", "not there"]
    stopped = seen("actor-0", Activity.STEPPING, 9.0, state="T", order_seconds=9.0)
    said = found(c, seen("learner-0", Activity.WAITING_FOR_BATCH), stopped, stopped)
    assert said["blamed"][0].startswith("actor-0, stopped (SIGSTOP)")

    c = coordinator_of(plan_of("sync", 1))
    c.place([0])
    said = found(c, seen("learner-0", Activity.WAITING_FOR_BATCH), seen("actor-0", Activity.WAITING_FOR_LEASE), paused=True)
    assert [w["why"] for w in said["waits"]] == ["0 of 1 rollouts of the next update are there; the run is paused", "the run is paused"]
    assert said["blamed"] == []


def test_who_waits_for_an_inference_server_is_said_and_it_is_to_blame():
    c = coordinator_of(plan_of("sync", 2))
    c.place([0, 1])
    c.next_leases()
    asking = seen("actor-0", Activity.INFERRING, 4.0, group=0, order_seconds=5.0, served=True)
    stepping = seen("actor-1", Activity.STEPPING, 0.1, group=1, order_seconds=5.0, served=True)
    stopped = seen("inference-0", Activity.WAITING_FOR_BATCH, 4.5, state="T", order_seconds=4.0)
    said = found(c, seen("learner-0", Activity.WAITING_FOR_BATCH, 6.0), asking, stepping, stopped)
    assert [(w["who"], w["for"], w["seconds"]) for w in said["waits"]] == [
        ("learner-0", ["actor-0", "actor-1"], 6.0),
        ("actor-0", ["inference-0"], 4.0),
    ]
    assert said["blamed"] == [
        "actor-1, stepping group 1 for 0.1 s",
        "inference-0, stopped (SIGSTOP); nothing moves it but SIGCONT for 4.5 s",
    ]
    assert "actor-0 has waited for inference-0 for 4.0 s: it is to choose actions for group 0, row -1" in in_words(said)
    idle = seen("inference-0", Activity.WAITING_FOR_BATCH, 0.2)
    said = found(c, seen("learner-0", Activity.LEARNING, order_seconds=0.1), stepping, idle)
    assert [p["doing"] for p in said["processes"]][2] == "waiting for a question"


def test_nobody_waits_while_all_work():
    c = coordinator_of(plan_of(groups=1, batch=1))
    c.place([0])
    leases = c.next_leases()
    finish(c, leases[0])
    c.next_batch()
    said = found(c, seen("learner-0", Activity.LEARNING, order_seconds=0.1), seen("actor-0", Activity.STEPPING, group=0, order_seconds=0.1))
    assert (said["waits"], said["blamed"]) == ([], [])
    assert "nobody waits" in in_words(said)


def test_a_learner_that_waits_for_another_says_so_and_the_other_is_to_blame():
    c = coordinator_of(plan_of(groups=1, batch=1))
    c.place([0])
    finish(c, c.next_leases()[0])
    c.next_batch()
    done = seen("learner-0", Activity.SHARING, 2.0, order_seconds=3.0)
    late = seen("learner-1", Activity.LEARNING, 3.0, order_seconds=3.0)
    said = found(c, done, late, seen("actor-0", Activity.STEPPING, group=0, order_seconds=0.1))
    assert [(w["who"], w["for"], w["seconds"]) for w in said["waits"]] == [("learner-0", ["learner-1"], 2.0)]
    assert said["blamed"] == ["learner-1, learning for 3.0 s"]
