"""Frames between a driver and a node: what goes in comes out, and nothing else is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engines.ray_words import Frame, Kind, decode, encode

FRAMES = st.lists(st.builds(Frame, st.sampled_from(Kind), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.binary(), st.binary()))


@given(FRAMES)
def test_frames_come_out_as_they_went_in(frames: list[Frame]) -> None:
    message = encode(frames)
    assert list(decode(message)) == frames
    assert len(message) == sum(frame.size for frame in frames)


@given(FRAMES.filter(bool), st.data())
def test_a_message_that_was_cut_is_refused(frames: list[Frame], data: st.DataObject) -> None:
    message = encode(frames)
    whole = {sum(frame.size for frame in frames[:count]) for count in range(len(frames) + 1)}
    cut = data.draw(st.integers(1, len(message) - 1).filter(lambda at: at not in whole))
    with pytest.raises(ValueError, match="are left"):
        list(decode(message[:cut]))


@given(st.binary(min_size=1))
def test_any_bytes_are_frames_or_refused(message: bytes) -> None:
    try:
        frames = list(decode(message))
    except ValueError:
        return
    assert encode(frames) == message
