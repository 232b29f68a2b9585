"""Words between the supervisor and its actors."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engines.messages import Kind, Word, place_of, to_json
from shoal.experience.envelope import Identity

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)


@given(st.sampled_from(Kind), u32, u32, u64, u32, st.integers(-(2**63), 2**63 - 1), st.binary(max_size=40))
def test_a_word_comes_back_as_it_was_sent(kind, slot, group, sequence, attempt, value, body):
    word = Word(kind, slot, Identity(group, sequence, attempt), value, body)
    again = Word.decode(word.encode())
    assert again == word
    assert isinstance(again.kind, Kind)
    assert isinstance(again.identity, Identity)


def test_a_word_without_body_has_a_fixed_size_and_layout():
    word = Word(Kind.LEASE, 5, Identity(6, 7, 8), -9)
    assert word.encode() == struct.pack("<BxxxIIIQq", 2, 5, 6, 8, 7, -9)
    assert len(word.encode()) == 32
    assert Word(Kind.STOP) == Word.decode(Word(Kind.STOP, 0, Identity(0, 0, 0), 0, b"").encode())


def test_kinds_have_fixed_numbers():
    assert {k.name: k.value for k in Kind} == {
        "SETUP": 1, "LEASE": 2, "RESTORE": 3, "RELEASE": 4, "PUBLISHED": 5, "STOP": 6, "CONNECT": 7, "FILLED": 17, "RESTORED": 18, "FAULT": 19,
    }  # fmt: skip


def test_json_rides_along():
    word = Word.decode(Word(Kind.FAULT, body=to_json({"row": 3, "why": "ä"})).encode())
    assert word.json == {"row": 3, "why": "ä"}


@pytest.mark.parametrize("message", [b"", b"\x02" * 31])
def test_too_few_bytes_are_no_word(message):
    with pytest.raises(ValueError, match=rf"^a word has at least 32 bytes, got {len(message)}$"):
        Word.decode(message)


def test_an_unknown_kind_is_no_word():
    with pytest.raises(ValueError, match="99 is not a valid Kind"):
        Word.decode(b"\x63" + bytes(31))


@given(learners=st.integers(1, 6), actors=st.integers(0, 9))
def test_no_two_roles_write_at_one_place_of_the_board_of_activities(learners: int, actors: int) -> None:
    roles = [*(("learner", i) for i in range(learners)), *(("actor", i) for i in range(actors)), ("inference", 0)]
    places = [place_of(role, index, 1 + learners + actors) for role, index in roles]
    assert sorted(places) == list(range(1 + learners + actors))
    assert places[0] == 0
