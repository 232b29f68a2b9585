import os
import subprocess
import sys

import pytest

from shoal.supervision import heartbeat as module
from shoal.supervision.heartbeat import RECORD, Activity, ActivityBoard


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved: clock.ns."""

    class Clock:
        ns = 1_000

        def monotonic_ns(self):
            return self.ns

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_role_that_has_not_begun_is_starting():
    record = ActivityBoard.create(2).records()[1]
    assert (record.activity, record.num_beats, record.age_seconds) == (Activity.STARTING, 0, 0.0)
    assert set(record.seconds.values()) == {0.0}


def test_a_record_says_what_was_entered_last_and_for_how_long(clock):
    board = ActivityBoard.create(3)
    heartbeat = board.heartbeat(1, incarnation=4)
    clock.ns += 2_000_000_000
    heartbeat.enter(Activity.STEPPING, group=5, env=6, row=7)
    clock.ns += 500_000_000
    record = board.records()[1]
    assert (record.activity, record.incarnation, record.group, record.env, record.row) == (Activity.STEPPING, 4, 5, 6, 7)
    assert record.age_seconds == 0.5
    assert record.num_beats == 2
    assert record.seconds[Activity.STARTING] == 2.0
    assert record.seconds[Activity.STEPPING] == 0.5
    assert [board.records()[other].num_beats for other in (0, 2)] == [0, 0]


def test_time_by_activity_adds_up_over_incarnations(clock):
    board = ActivityBoard.create(1)
    for incarnation in range(2):
        heartbeat = board.heartbeat(0, incarnation)
        for _ in range(3):
            heartbeat.enter(Activity.INFERRING)
            clock.ns += 1_000_000_000
            heartbeat.enter(Activity.WAITING_FOR_LEASE)
            clock.ns += 2_000_000_000
    (record,) = board.records()
    assert record.incarnation == 1
    assert record.seconds[Activity.INFERRING] == 6.0
    # the last stretch of the first incarnation was never finished: its end is not known
    assert record.seconds[Activity.WAITING_FOR_LEASE] == 10.0
    assert record.num_beats == 14


def test_another_process_would_see_the_same():
    board = ActivityBoard.create(2)
    other = ActivityBoard.attach(os.dup(board.fd), 2)
    other.heartbeat(0).enter(Activity.SAVING, row=9)
    assert (board.records()[0].activity, board.records()[0].row) == (Activity.SAVING, 9)
    other.close()
    board.close()


ENTER_NUMBERS_FOR_EVER = """
import sys
from shoal.supervision.heartbeat import ActivityBoard
heartbeat = ActivityBoard.attach(int(sys.argv[1]), 1).heartbeat(0)
number = 0
while True:
    number += 1
    heartbeat.enter(1, number, number, number)
"""


def test_records_are_never_torn_between_two_moments():
    """Another process enters (group n, env n, row n): a reader that saw half of one and half of the next would find them unequal."""
    board = ActivityBoard.create(1)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writer = subprocess.Popen([sys.executable, "-c", ENTER_NUMBERS_FOR_EVER, str(board.fd)], pass_fds=[board.fd], env=environ)
    try:
        while board.records()[0].num_beats < 2:
            assert writer.poll() is None
        num_whole = num_reads = 0
        (record,) = board.records()
        while num_reads < 20_000 or record.num_beats <= 1_000:
            (record,) = board.records()
            num_reads += 1
            assert num_reads <= 20_000 or writer.poll() is None
            assert not record.whole or record.group == record.env == record.row
            num_whole += record.whole
    finally:
        writer.kill()
        writer.wait()
    assert num_whole > 1_000


def test_a_read_that_a_write_came_into_is_made_again():
    board = ActivityBoard.create(1)
    heartbeat = board.heartbeat(0)
    heartbeat.enter(Activity.STEPPING, 1, 1, 1)
    live = board._bytes

    class WrittenInTheMiddle:
        num_reads = 0

        def __getitem__(self, span):
            first_half = bytes(live[:16])
            if self.num_reads < 3:
                heartbeat.enter(Activity.STEPPING, 2, 2, 2 + self.num_reads)
            self.num_reads += 1
            return first_half + bytes(live[16:])

    board._bytes = WrittenInTheMiddle()
    (record,) = board.records()
    assert (record.whole, record.group, record.env, record.row) == (True, 2, 2, 4)
    assert board._bytes.num_reads == 4


def test_a_writer_killed_in_the_middle_does_not_hang_the_reader():
    board = ActivityBoard.create(1)
    board.heartbeat(0).enter(Activity.LEARNING)
    board._words[0] += 1  # begun, never finished
    board._words[3] = 0  # since_ns: what is packed is zeros first
    (record,) = board.records()
    assert record.activity == Activity.LEARNING
    assert not record.whole
    assert record.age_seconds == 0.0  # else it would have been at it since the machine was started


def test_two_roles_never_share_a_cache_line():
    assert RECORD.itemsize % 64 == 0
    offsets = {name: offset for name, (_, offset) in RECORD.fields.items()}
    assert (offsets["activity"], offsets["beat"], offsets["total_ns"]) == (
        module._FIELDS_OFFSET,
        8 * module._BEAT_WORD,
        8 * module._TOTAL_WORD,
    )
    assert offsets["activity"] + module._FIELDS.size == offsets["beat"]
