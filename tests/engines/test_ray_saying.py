"""What a node says is kept without secrets, wherever it is cut, and its logs in bounds."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faults.decoders import NodeSays
from shoal.engines.fleet import rebuild_error
from shoal.engines.messages import Kind as Told
from shoal.engines.messages import Word, to_json
from shoal.engines.ray_joining import report_of
from shoal.engines.ray_saying import TAIL_BYTES, Allowance, BoundedLog, LogText, without_secrets
from shoal.engines.ray_security import make_secrets, redact
from shoal.engines.ray_words import Frame, Kind
from shoal.errors import EnvironmentFault

TOKEN = "c0ffee" * 10


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.fixture
def node(tmp_path: Path) -> NodeSays:
    return NodeSays(tmp_path)


REPORT: dict[str, Any] = {
    "error": "EnvironmentFault", "message": f'it said "Bearer {TOKEN}"', "traceback": f"line 1 {TOKEN}\n",
    "report": {"last_action": [1, {"key": TOKEN}], TOKEN: 3, "step": 7},
}  # fmt: skip
FRAMES = [
    Frame(Kind.WORD, head=Word(Told.FAULT, body=to_json(REPORT)).encode()),
    Frame(Kind.LEAVING, head=f"SIGTERM {TOKEN}".encode()),
    Frame(Kind.HAPPENED, head=to_json({"is": "lost", "reason": f"it said {TOKEN}"})),
    Frame(Kind.HAPPENED, head=to_json({"is": "exited", "pid": 7, "status": None, "error": f"no {TOKEN}"})),
    Frame(Kind.SAID, head=to_json({"is": "failed", **REPORT})),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: frame.kind.name)
def test_no_word_of_a_node_comes_with_the_token(frame: Frame) -> None:
    said = without_secrets(frame)
    assert TOKEN.encode() not in said.head
    assert b"***" in said.head


def test_rollouts_and_other_words_are_what_they_were() -> None:
    for frame in (
        Frame(Kind.WORD, 1, 2, Word(Told.FILLED).encode(), TOKEN.encode()),
        Frame(Kind.WORD, head=Word(Told.FAULT, body=b"{").encode()),
    ):
        assert without_secrets(frame) == frame


def test_the_report_of_a_fault_is_taken_in_without_the_token_however_deep(node: NodeSays) -> None:
    process: Any = node.hear([FRAMES[0]])
    (said,) = process.channel.said
    assert Word.decode(said).json["report"] == {"last_action": [1, {"key": "***"}], "***": 3, "step": 7}
    fault = rebuild_error(REPORT)
    assert isinstance(fault, EnvironmentFault)
    assert TOKEN not in f"{fault} {json.dumps(fault.report)}"


def test_what_a_node_reports_of_itself_has_no_token() -> None:
    class Honest:
        def look(self) -> bytes:
            return to_json({"host": "far", "versions": {"python": "3"}, "error": f"no {TOKEN}"})

    teller: Any = Honest()
    assert report_of(teller).error == "no ***"


@pytest.mark.parametrize("at", [1, 30, 59])
def test_a_token_that_is_cut_between_two_frames_is_in_no_log(at: int, node: NodeSays) -> None:
    text = f"begin {TOKEN} end\nmore"
    cut = len("begin ") + at
    ended = Frame(Kind.HAPPENED, head=to_json({"is": "exited", "pid": 7, "status": 9, "error": ""}))
    process = node.hear([Frame(Kind.LOG, body=text[:cut].encode()), Frame(Kind.LOG, body=text[cut:].encode()), ended])
    assert node.fleet.log_of(process).read_text() == "begin *** end\nmore"


@given(st.lists(st.integers(0, 2000), max_size=12))
def test_however_a_log_is_cut_it_is_the_redacted_whole(cuts: list[int]) -> None:
    text = f"Authorization: Bearer abcdefghijkl\n{TOKEN}\n-----BEGIN EC PRIVATE KEY-----\n{'MHcCAQEE' * 30}\n-----END EC PRIVATE KEY-----\n"
    text += f"RAY_AUTH_TOKEN={TOKEN} a\udcffb " + "x" * 200 + f"\n{TOKEN}"
    whole = text.encode(errors="surrogateescape")
    places = sorted({0, len(whole), *(min(cut, len(whole)) for cut in cuts)})
    log = LogText()
    out = b"".join(log.take(whole[begin:end]) for begin, end in itertools.pairwise(places)) + log.rest()
    assert out == redact(text).encode(errors="surrogateescape")


def test_a_key_of_whatever_size_is_hidden_and_what_is_held_back_is_bounded(tmp_path: Path) -> None:
    key = make_secrets(tmp_path)[2].read_bytes()
    log = LogText()
    assert log.take(key[:100]) == b""
    assert log.take(key[100:] + b"after\n").split() == [b"***", b"after"]
    endless = b"-----BEGIN PRIVATE KEY-----\n" + b"x" * (3 * TAIL_BYTES)
    assert log.take(endless) == b"***"
    assert log.take(b"y" * (5 * TAIL_BYTES)) == b"y" * (4 * TAIL_BYTES)


def test_so_many_bytes_a_second_and_a_burst_after_silence() -> None:
    allowance = Allowance(100, 1000)
    assert [allowance.grants(600, now) for now in (0.0, 0.0, 1.0, 2.0, 2.0, 100.0, 100.0)] == [True, False, False, True, False, True, False]


def test_what_is_too_much_is_left_out_and_said_where_it_was() -> None:
    allowance = Allowance(100, 1000)
    one, other = BoundedLog(allowance, "far", LogText()), BoundedLog(allowance, "far", LogText())
    line = b"x" * 599 + b"\n"
    assert one.take(line, 0.0) == line
    assert other.take(line, 0.0) == b""
    assert other.take(line, 0.0) == b""
    said = other.take(line, 10.0)
    assert said == b"\n[shoal: 1,200 bytes were left out here: the logs of node far may have 100 a second]\n" + line
    assert other.take(line, 10.0) == b""
    assert b"600 bytes were left out" in other.end(10.0)
    assert other.end(10.0) == b""


def test_a_node_that_says_without_end_fills_no_disk(node: NodeSays) -> None:
    frames = [Frame(Kind.LOG, body=b"x" * 65535 + b"\n")] * 100
    ended = Frame(Kind.HAPPENED, head=to_json({"is": "exited", "pid": 7, "status": 9, "error": ""}))
    log = node.fleet.log_of(node.hear([*frames, ended])).read_text()
    assert len(log) < 2_000_000
    assert log.splitlines()[-1].startswith("[shoal: ")
    assert "bytes were left out here" in log
