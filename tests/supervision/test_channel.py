import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.supervision.channel import MAX_MESSAGE_BYTES, Channel, wait


@pytest.fixture
def pair():
    ends = Channel.pair()
    yield ends
    for end in ends:
        end.close()


def test_nothing_to_receive_is_none(pair):
    assert pair[0].receive() is None
    assert pair[0].receive_with_fds() is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=3000), max_size=20))
def test_messages_arrive_whole_and_in_order(messages):
    left, right = Channel.pair()
    for message in messages:
        assert left.send(message)
    assert [right.receive() for _ in messages] == messages
    assert right.receive() is None
    left.close()
    right.close()


def test_a_message_of_the_greatest_length_arrives_whole(pair):
    assert MAX_MESSAGE_BYTES >= 128 * 1024
    message = os.urandom(MAX_MESSAGE_BYTES)
    assert pair[0].send(message)
    assert pair[1].receive() == message


@pytest.mark.parametrize("message", [b"", bytes(MAX_MESSAGE_BYTES + 1)])
def test_empty_and_overlong_messages_are_refused(pair, message):
    with pytest.raises(ValueError, match=str(MAX_MESSAGE_BYTES)):
        pair[0].send(message)
    with pytest.raises(ValueError, match=str(MAX_MESSAGE_BYTES)):
        pair[0].send_with_fds(message, [])


@pytest.mark.parametrize("size_bytes", [1, 64, 100_000])
def test_a_full_channel_refuses_and_does_not_block(pair, size_bytes):
    sent = 0
    while pair[0].send(sent.to_bytes(4, "little") * (size_bytes // 4 + 1)):
        sent += 1
    assert sent > 0
    assert not pair[0].send_with_fds(b"x" * (size_bytes + 4), [])
    assert wait([pair[0]], 0, writable=[pair[0]]) == []
    for number in range(sent):
        assert pair[1].receive()[:4] == number.to_bytes(4, "little")
    assert pair[1].receive() is None
    assert pair[0].send(b"again")
    assert pair[1].receive() == b"again"


def test_last_words_are_heard_before_the_end(pair):
    left, right = pair
    left.send(b"never read by the one that goes")
    for number in range(3):
        right.send(b"%d" % number)
    right.close()
    assert [left.receive() for _ in range(3)] == [b"0", b"1", b"2"]
    for _ in range(2):
        with pytest.raises(EOFError):
            left.receive()
    with pytest.raises(EOFError):
        left.receive_with_fds()


def test_sending_to_one_that_is_gone_is_an_end_of_file(pair):
    pair[0].close()
    with pytest.raises(EOFError):
        pair[1].send(b"hello")
    with pytest.raises(EOFError):
        pair[1].send_with_fds(b"hello", [0])


def test_descriptors_travel_and_stay_the_senders(pair):
    read_fd, write_fd = os.pipe()
    assert pair[0].send_with_fds(b"two", [write_fd, read_fd])
    message, fds = pair[1].receive_with_fds()
    assert message == b"two"
    assert len(fds) == 2
    os.write(fds[0], b"through the copy")
    assert os.read(read_fd, 100) == b"through the copy"
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in (read_fd, write_fd, *fds):
        os.close(fd)


def test_descriptors_that_nobody_asked_for_do_not_leak(pair):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        pair[0].send_with_fds(b"x", [pair[0].fileno()])
        assert pair[1].receive() == b"x"
    assert len(os.listdir("/proc/self/fd")) <= before  # what tests before this one left may go meanwhile


def test_wait_names_those_that_have_something():
    pairs = [Channel.pair() for _ in range(5)]
    mine = [left for left, _ in pairs]
    assert wait(mine, 0) == []
    pairs[3][1].send(b"x")
    pairs[1][1].close()
    assert wait(mine, 300) == [mine[1], mine[3]]
    for end in (end for ends in pairs for end in ends):
        end.close()


def test_wait_ends_with_its_time_and_not_before(pair):
    begun = time.monotonic()
    assert wait([pair[0]], 0.05) == []
    assert time.monotonic() - begun >= 0.05


def test_wait_is_unblocked_by_room_to_write(pair):
    assert wait([pair[0]], 600, writable=[pair[0]]) == []


def test_detach_leaves_the_descriptor_open(pair):
    fd = pair[0].detach()
    again = Channel(fd)
    again.send(b"still here")
    assert pair[1].receive() == b"still here"
    again.close()
