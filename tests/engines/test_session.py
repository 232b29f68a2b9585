"""The session: its clock, when it saves, why it ends, and what a roll-back leaves."""

from __future__ import annotations

from typing import Any

import pytest

from rollout_fakes import poisoned_ring, scripted_schema, scripted_spec, write_rollout
from shoal.config import RunConfig, against_divergence
from shoal.engines.coordinator import Coordinator
from shoal.engines.plan import Plan
from shoal.engines.session import Session
from shoal.errors import CheckpointError, DivergedError
from shoal.experience.limiter import Rate, RateLimiter
from shoal.files import CheckpointDirectory


class Watcher:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[Any] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.wants_end = False
        self.flushed = 0

    def updated(self, report) -> bool:
        self.reports.append(report)
        return self.wants_end

    def event(self, kind: str, **details: Any) -> None:
        self.events.append((kind, details))

    def tick(self, activities) -> None:
        pass

    def flush(self) -> None:
        self.flushed += 1

    def state(self) -> dict[str, Any]:
        return {}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def session_in(directory, mode: str = "sync", **stop: Any):
    config = RunConfig(mode=mode, stop=stop)
    config.sampling.groups, config.sampling.group_size, config.sampling.rollout_length = 2, 2, 4
    config.checkpoint.every_seconds, config.checkpoint.every_updates, config.checkpoint.keep = 10.0, None, 2
    plan, spec = Plan.of(config), scripted_spec()
    coordinator = Coordinator(plan, spec, poisoned_ring(scripted_schema(4, 2), plan.num_slots), config.stop)
    coordinator.place([0])
    watcher, clock = Watcher(), Clock()
    return Session(config, spec, coordinator, directory, watcher, clock), watcher, clock


def update(session: Session, dropped: Any = None, **metrics: float) -> str | None:
    c = session.coordinator
    for lease in c.next_leases():
        write_rollout(c.ring.slots[lease.slot], lease.identity, version=c.version)
        c.filled(lease.slot, lease.identity)
    batch = c.next_batch()
    assert batch is not None
    c.consumed({i: dropped for _, i in batch} if dropped else {})
    return session.finish_update({} if dropped else {"num_env_steps": 16.0, "loss": 0.5, "lag/0": 16.0, **metrics})


def save(session: Session):
    staging, arrays, facts = session.begin_checkpoint()
    with staging:
        return session.commit(staging, arrays, facts)


def test_an_update_is_reported_with_what_it_was_made_of(tmp_path):
    session, watcher, _ = session_in(tmp_path)
    assert update(session) is None
    (report,) = watcher.reports
    assert (report.update, report.env_steps, report.metrics["loss"]) == (1, 16, 0.5)
    assert [e["id"] for e in report.consumption] == [[0, 0, 0], [1, 0, 0]]
    assert update(session) is None
    assert [e["id"][1] for e in watcher.reports[1].consumption] == [1, 1]


def test_what_was_dropped_whole_is_no_update_and_is_told_with_the_next(tmp_path):
    """Otherwise it would take the place of the update before it in the log that replay follows."""
    from shoal.experience.envelope import Fate

    session, watcher, _ = session_in(tmp_path, "async", updates=1)
    assert update(session, dropped=Fate.OVER_LAG) is None
    assert watcher.reports == []
    assert update(session) == "updates"
    (report,) = watcher.reports
    assert [e["fate"] for e in report.consumption] == ["over_lag"] * 2 + ["trained"] * 2


@pytest.mark.parametrize(
    ("stop", "expected"),
    [({"updates": 2}, [None, "updates"]), ({"env_steps": 17}, [None, "env_steps"]), ({"seconds": 2.5}, [None, "seconds"])],
)
def test_it_ends_for_the_reason_that_was_asked_for(tmp_path, stop, expected):
    session, _, clock = session_in(tmp_path, **stop)
    session.begun(int(99e9))
    found = []
    for _ in expected:
        found.append(update(session))
        clock.now += 2.0
    assert found == expected


def test_it_ends_when_the_observer_wants_and_a_stop_condition_goes_first(tmp_path):
    session, watcher, _ = session_in(tmp_path, updates=2)
    watcher.wants_end = True
    assert update(session) == "interrupted"
    assert update(session) == "updates"
    other, watcher, _ = session_in(tmp_path / "other")
    other.wanted_end, watcher.wants_end = "interrupted by the socket", True
    assert update(other) == "interrupted by the socket"


def test_seconds_count_from_the_first_environment_step(tmp_path):
    session, _, clock = session_in(tmp_path)
    clock.now = 130.0
    assert session.seconds == 0.0
    session.begun(int(128e9))
    session.begun(int(129e9))
    assert session.seconds == pytest.approx(2.0)
    session.seconds_before = 40.0
    clock.now = 131.0
    assert session.seconds == pytest.approx(43.0)


def test_a_first_step_in_the_future_counts_as_now(tmp_path):
    session, _, _ = session_in(tmp_path)
    session.begun(int(500e9))
    assert session.seconds == 0.0


def test_a_checkpoint_is_due_by_time_or_by_updates(tmp_path):
    session, watcher, clock = session_in(tmp_path)
    clock.now += 9.9
    assert not session.checkpoint_due()
    clock.now += 0.1
    assert session.checkpoint_due()
    save(session)
    assert watcher.flushed == 1
    assert not session.checkpoint_due()
    session.config.checkpoint.every_updates, session.config.checkpoint.every_seconds = 2, None
    clock.now += 1e9
    update(session)
    assert not session.checkpoint_due()
    update(session)
    assert session.checkpoint_due()
    path = save(session)
    assert not session.checkpoint_due()
    assert watcher.events[-1] == ("checkpoint", {"update": 2, "path": path.name})


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    session, _, _ = session_in(tmp_path)
    for _ in range(4):
        update(session)
        save(session)
    assert len(CheckpointDirectory(tmp_path / "checkpoints").paths()) == 2


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    session, _, clock = session_in(tmp_path)
    session.begun(int(100e9))
    update(session)
    clock.now, session.restarts = 107.0, 3
    path = save(session)
    update(session)
    resumed, _, _ = session_in(tmp_path)
    resumed.load(CheckpointDirectory(tmp_path / "checkpoints").newest())
    c = resumed.coordinator
    assert (c.version, c.env_steps, resumed.restarts, resumed.seconds) == (1, 16, 3, 7.0)
    assert resumed.checkpoint_path == path
    c.place([0])
    assert [le.identity for le in c.next_leases()] == [(0, 1, 1), (1, 1, 1)]
    assert c.ledger.balance() == {"produced": 16, "trained": 16, "dropped": {}, "in_flight": 0}


@pytest.mark.parametrize("saved", [False, True])
def test_a_roll_back_leads_to_the_last_checkpoint_as_often_as_it_takes(tmp_path, saved):
    session, watcher, _ = session_in(tmp_path)
    path, base = None, 0
    if saved:
        update(session)
        path, base = save(session), 1
    for times in (1, 2):
        for _ in range(2):
            update(session)
        assert session.return_to_checkpoint() == path
        assert watcher.events[-1] == ("rolled_back", {"update": base, "updates_undone": 2})
        c = session.coordinator
        assert (c.version, c.env_steps) == (base, 16 * base)
        c.ledger.check()
        assert c.ledger.balance() == {
            "produced": 16 * base + 32 * times,
            "trained": 16 * base,
            "dropped": {"rolled_back": 32 * times},
            "in_flight": 0,
        }


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_roll_back_that_meets_a_damaged_checkpoint_takes_the_one_before(tmp_path):
    session, watcher, _ = session_in(tmp_path)
    paths = []
    for _ in range(2):
        update(session)
        paths.append(save(session))
    update(session)
    flip(paths[1] / "coordinator.safetensors")
    assert session.return_to_checkpoint() == paths[0]
    c = session.coordinator
    assert (c.version, c.env_steps, session.checkpoint_path) == (1, 16, paths[0])
    assert [kind for kind, _ in watcher.events[-2:]] == ["warning", "rolled_back"]
    assert "not whole" in watcher.events[-2][1]["message"]
    c.ledger.check()
    flip(paths[0] / "coordinator.safetensors")
    assert session.return_to_checkpoint() is None  # this process began the run, and knows its beginning
    assert (c.version, c.ledger.balance()["trained"]) == (0, 0)
    c.place([0])
    assert [le.identity.sequence for le in c.next_leases()] == [0, 0]


def test_a_resumed_run_whose_checkpoints_are_all_damaged_ends(tmp_path):
    session, _, _ = session_in(tmp_path)
    update(session)
    path = save(session)
    resumed, _, _ = session_in(tmp_path)
    resumed.load(CheckpointDirectory(tmp_path / "checkpoints").newest())
    flip(path / "coordinator.json")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        resumed.return_to_checkpoint()


def test_a_run_that_went_on_from_a_damaged_replay_comes_back_to_it_without_its_replay(tmp_path):
    session, _, _ = session_in(tmp_path)
    update(session)
    with session.begin_checkpoint()[0] as staging:
        (staging.path / "replay").mkdir()
        (staging.path / "replay" / "rows").write_bytes(b"rows")
        path = staging.commit()
    (path / "replay" / "rows").write_bytes(b"row")
    resumed, _, _ = session_in(tmp_path)
    resumed.config.checkpoint.replay = False
    resumed.load(resumed.checkpoints.newest_to_go_on(replay=False))
    assert not resumed.replay_whole
    resumed.replay_whole = True
    assert resumed.return_to_checkpoint() == path
    assert not resumed.replay_whole
    save(resumed)
    assert resumed.replay_whole
    resumed.config.checkpoint.replay = True
    assert resumed.return_to_checkpoint() != path


def test_no_checkpoint_is_made_of_a_barren_update_and_refused_steps_are_counted(tmp_path):
    session, watcher, clock = session_in(tmp_path)
    clock.now = 200.0
    for skipped, steps, may_save in ((2, 2, True), (0, 0, True), (4, 0, False), (0, 0, False), (4, 0, False), (0, 0, False), (0, 4, True)):
        for lease in session.coordinator.next_leases():
            write_rollout(session.coordinator.ring.slots[lease.slot], lease.identity, version=session.coordinator.version)
            session.coordinator.filled(lease.slot, lease.identity)
        session.coordinator.next_batch()
        session.coordinator.consumed({})
        session.finish_update({"num_env_steps": 16.0, "skipped_steps": float(skipped), "optimizer_steps": float(steps)})
        assert (session.may_save, session.checkpoint_due()) == (may_save, may_save)
    assert session.skipped_steps == 10
    assert [(kind, facts["steps"]) for kind, facts in watcher.events] == [("not_finite", 2), ("not_finite", 4)]


def test_the_epoch_of_the_streams_outlives_a_resume_and_no_roll_back_lowers_it(tmp_path):
    session, _, _ = session_in(tmp_path)
    update(session)
    save(session)
    session.epoch = 1
    session.return_to_checkpoint()
    assert session.epoch == 1
    update(session)
    save(session)
    resumed, _, _ = session_in(tmp_path)
    resumed.load(CheckpointDirectory(tmp_path / "checkpoints").newest())
    assert resumed.epoch == 1


def test_a_checkpoint_without_a_part_is_refused_in_one_line(tmp_path):
    session, _, _ = session_in(tmp_path)
    update(session)
    staging, arrays, facts = session.begin_checkpoint()
    staging.write_json("coordinator", {"version": 1})
    session.commit(staging, arrays, facts)
    resumed, _, _ = session_in(tmp_path)
    with pytest.raises(CheckpointError, match=r"^[^\n]*does not hold the state that this run needs \(KeyError: 'ledger'\)[^\n]*$"):
        resumed.load(CheckpointDirectory(tmp_path / "checkpoints").newest())


def test_a_run_whose_last_update_had_no_finite_step_did_not_end_well(tmp_path):
    session, _, _ = session_in(tmp_path, updates=2)
    assert update(session) is None
    with pytest.raises(DivergedError, match=r"met its stop condition \(updates\)"):
        update(session, skipped_steps=4.0, optimizer_steps=0.0)


def test_a_run_did_not_end_well_whose_last_steps_were_refused_though_an_update_without_any_came_after(tmp_path):
    session, _, _ = session_in(tmp_path, updates=2)
    assert update(session, skipped_steps=4.0, optimizer_steps=0.0) is None
    with pytest.raises(DivergedError, match=r"met its stop condition \(updates\)"):
        update(session, skipped_steps=0.0, optimizer_steps=0.0)


@pytest.mark.parametrize("replayed", [False, True], ids=["batches in order", "a replay"])
def test_whoever_diverged_is_advised_what_the_algorithm_takes(replayed, tmp_path):
    session, _, _ = session_in(tmp_path, updates=1)
    if replayed:
        session.coordinator.limiter = RateLimiter(Rate(1.0, 4, 0))
    with pytest.raises(DivergedError) as caught:
        update(session, skipped_steps=4.0, optimizer_steps=0.0)
    assert str(caught.value).endswith(f"no loss or gradient was finite; {against_divergence(session.config, replayed=replayed)}")
    assert ("policy.normalise_rewards" in str(caught.value)) == (not replayed)
