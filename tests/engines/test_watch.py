"""What is wrong with a process, from what is seen of it; and how long it was missed."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.engines.recovery import Recoveries
from shoal.engines.watch import INFER_SECONDS, SAVE_SECONDS, SHARE_SECONDS, START_SECONDS, STOPPED_SECONDS, UNHEARD_SECONDS, Seen, Watch
from shoal.types import CLOSING, Activity, ActivityRecord

LIMIT, UPDATE = 5.0, 100.0


def watch() -> Watch:
    return Watch(LIMIT, UPDATE)


def seen(name: str = "actor", activity: Activity = Activity.STEPPING, age: float = 0.0, **facts: Any) -> Seen:
    record = ActivityRecord(
        activity,
        facts.pop("record_of", 2),
        4,
        facts.pop("env", -1),
        facts.pop("row", 7),
        age,
        facts.pop("beats", 50),
        {},
        facts.pop("whole", True),
    )
    given = {"state": "S", "up_seconds": 1000.0, "order_seconds": 1.0} | facts
    return Seen(name, 0, 2, record=record, **given)


@pytest.mark.parametrize(
    ("what", "row", "age", "kind"),
    [
        (Activity.STEPPING, 7, LIMIT, "environment"),
        (Activity.RESTORING, 0, LIMIT, "environment"),
        (Activity.RESTORING, CLOSING, LIMIT, "environment"),
        (Activity.INFERRING, 7, INFER_SECONDS, "stuck"),
    ],
)
def test_an_actor_that_is_too_long_in_one_thing_is_seen(what, row, age, kind):
    assert watch().look(seen(activity=what, row=row, age=age - 0.1), 0.0) is None
    verdict = watch().look(seen(activity=what, row=row, age=age + 0.1), 0.0)
    assert verdict is not None
    assert verdict.kind == kind


def test_a_hang_is_named_by_row_and_where_it_is_known_by_environment():
    verdicts = [watch().look(seen(age=6.0, env=env), 0.0) for env in (-1, 3)]
    assert [v.reason for v in verdicts if v] == ["in one step (row 7) for 6.0 s", "in one step (row 7, environment 3) for 6.0 s"]


def test_what_an_environment_does_when_it_is_put_back_or_closed_has_a_name():
    verdicts = [watch().look(seen(activity=Activity.RESTORING, age=6.0, row=row), 0.0) for row in (0, CLOSING)]
    assert [v.reason for v in verdicts if v] == ["being put back for 6.0 s", "being closed for 6.0 s"]


def test_an_actor_that_waits_without_an_order_may_wait_for_ever_and_one_with_an_order_may_not():
    waiting = {"activity": Activity.WAITING_FOR_LEASE, "age": 9e9}
    assert watch().look(seen(**waiting, order_seconds=None), 0.0) is None
    assert watch().look(seen(**waiting, order_seconds=UNHEARD_SECONDS - 1), 0.0) is None
    assert watch().look(seen(**waiting, order_seconds=UNHEARD_SECONDS + 1), 0.0) is not None
    just_began = {"activity": Activity.WAITING_FOR_LEASE, "age": 1.0}
    assert watch().look(seen(**just_began, order_seconds=9e9), 0.0) is None


@pytest.mark.parametrize("name", ["actor", "learner", "inference"])
@pytest.mark.parametrize("how", [{"record_of": 1}, {"activity": Activity.STARTING}])
def test_a_process_that_does_not_come_up_is_seen(name, how):
    assert watch().look(seen(name, **how, up_seconds=START_SECONDS - 1), 0.0) is None
    assert watch().look(seen(name, **how, up_seconds=START_SECONDS + 1), 0.0) is not None


def test_a_learner_that_does_not_finish_is_seen_and_one_without_an_order_is_not():
    for saving, limit in ((False, UPDATE), (True, SAVE_SECONDS)):
        learner = {"name": "learner", "activity": Activity.LEARNING, "saving": saving}
        assert watch().look(seen(**learner, order_seconds=limit - 1), 0.0) is None
        verdict = watch().look(seen(**learner, order_seconds=limit + 1), 0.0)
        assert verdict is not None
        assert ("save" in verdict.reason) is saving
    assert watch().look(seen("learner", Activity.WAITING_FOR_BATCH, 9e9, order_seconds=None), 0.0) is None


def test_an_inference_server_that_does_not_answer_is_seen_and_one_that_nobody_asks_is_not():
    for activity, limit in ((Activity.INFERRING, INFER_SECONDS), (Activity.WAITING_FOR_BATCH, UNHEARD_SECONDS)):
        assert watch().look(seen("inference", activity, limit - 1, order_seconds=9e9), 0.0) is None
        verdict = watch().look(seen("inference", activity, limit + 1, order_seconds=9e9), 0.0)
        assert verdict is not None
        assert verdict.kind == "stuck"
    just_asked = {"activity": Activity.WAITING_FOR_BATCH, "age": 9e9}
    assert watch().look(seen("inference", **just_asked, order_seconds=0.1), 0.0) is None
    assert watch().look(seen("inference", **just_asked, order_seconds=None), 0.0) is None
    assert (
        looks(watch(), *((at, {"name": "inference", "state": "T", **just_asked, "order_seconds": at}) for at in (0.1, 0.6)))[1] == "stopped"
    )


def test_an_actor_that_has_a_server_choose_waits_until_that_can_be_made_anew():
    limit = INFER_SECONDS + START_SECONDS
    assert watch().look(seen(activity=Activity.INFERRING, age=limit - 1, served=True), 0.0) is None
    assert watch().look(seen(activity=Activity.INFERRING, age=limit + 1, served=True), 0.0) is not None


def test_a_torn_record_accuses_nobody():
    assert watch().look(seen(age=9e9, whole=False), 0.0) is None


def looks(w: Watch, *frames: tuple[float, dict[str, Any]]) -> list[str | None]:
    return [verdict and verdict.kind for verdict in (w.look(seen(**facts), now) for now, facts in frames)]


def test_a_stopped_process_is_seen_after_a_while_and_pulses_are_not():
    stopped = {"state": "T"}
    assert looks(watch(), (0.0, stopped), (STOPPED_SECONDS - 0.01, stopped), (STOPPED_SECONDS, stopped)) == [None, None, "stopped"]
    assert looks(watch(), (0.0, stopped), (0.2, {}), (0.4, stopped), (0.7, stopped)) == [None] * 4
    ran = [{"state": "T", "beats": beats} for beats in (50, 51, 52, 52)]
    assert looks(watch(), *zip((0.0, 0.5, 1.0, 1.5), ran, strict=True)) == [None, None, None, "stopped"]


def test_a_stopped_process_that_has_nothing_to_do_is_left_alone_until_it_has():
    idle = {"state": "T", "activity": Activity.WAITING_FOR_LEASE, "order_seconds": None}
    busy = {**idle, "order_seconds": 0.1}
    assert looks(watch(), (0.0, idle), (9.0, idle), (10.0, busy), (10.5, busy)) == [None, None, None, "stopped"]
    starting = {"state": "T", "record_of": 1, "order_seconds": None, "up_seconds": 1.0}
    assert looks(watch(), (0.0, starting), (0.5, starting)) == [None, "stopped"]


def test_of_two_learners_in_a_long_update_the_one_that_the_other_waits_for_is_stuck():
    looked = {what: watch().look(seen("learner", what, order_seconds=UPDATE + 1.0), 0.0) for what in (Activity.SHARING, Activity.LEARNING)}
    assert looked[Activity.SHARING] is None
    assert looked[Activity.LEARNING] is not None
    assert watch().look(seen("learner", Activity.SHARING, order_seconds=UPDATE + SHARE_SECONDS + 1.0), 0.0) is not None


# ---- recoveries ------------------------------------------------------------------------------------------------------
def test_an_absence_lasts_from_the_first_fault_to_the_first_achievement():
    recoveries = Recoveries()
    assert recoveries.back("actor", 1, 1.0) is None
    recoveries.lost("actor", 1, "killed by SIGKILL", 10.0)
    recoveries.lost("actor", 1, "exit code 1", 10.5)  # on its way back
    recoveries.lost("group", 1, "raised", 10.0)
    recoveries.restored("actor", 1, 0.2)
    recoveries.restored("actor", 1, 0.1)
    recoveries.restored("actor", 2, 5.0)
    facts = recoveries.back("actor", 1, 11.0)
    assert facts == {"role": "actor", "index": 1, "after": "killed by SIGKILL", "seconds": 1.0, "restoring_seconds": pytest.approx(0.3)}
    assert recoveries.back("actor", 1, 12.0) is None
    recoveries.forget("group")
    assert recoveries.back("group", 1, 12.0) is None


def test_a_learner_is_ready_before_it_is_back():
    recoveries = Recoveries()
    recoveries.lost("learner", 0, "killed by SIGKILL", 10.0)
    recoveries.ready("learner", 0, 10.4)
    facts = recoveries.back("learner", 0, 11.0)
    assert facts is not None
    assert (facts["ready_seconds"], facts["seconds"]) == (pytest.approx(0.4), 1.0)
