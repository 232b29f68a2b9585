"""Nodes whose actors say what no actor says, and what is another's to say, without Ray: the run goes on, and learns the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_ray_fleet import ClusterHere, NodeHere, events, expected, run_on

from faults.decoders import true_fault
from shoal.engines.messages import Kind as Told
from shoal.engines.messages import Word, to_json
from shoal.engines.ray_words import Frame, Kind, decode, encode

__all__ = ["expected", "run_on"]

FAULT = true_fault()
SAYS = {
    "put back, without JSON": Word(Told.RESTORED),
    "a fault in an environment that there is not": Word(Told.FAULT, body=to_json({**FAULT, "report": {**FAULT["report"], "env": 99}})),
    "a fault without a report": Word(Told.FAULT, body=to_json({"error": "EnvironmentFault", "message": "no", "traceback": ""})),
}


class Lying(NodeHere):
    """Once an actor there has made a rollout, it says these words too, each of the rollout that `of` tells. Nothing where that is none."""

    words: tuple[Word, ...] = ()
    said: list[Frame]

    def of(self, filled: Word) -> Word | None:
        return filled

    def hear(self) -> bytes:
        frames = list(decode(super().hear()))
        for frame in [frame for frame in frames if frame.kind is Kind.WORD and frame.body and not self.said]:
            if (of := self.of(Word.decode(frame.head))) is not None:
                heads = [Word(word.kind, of.slot, of.identity, word.value, word.body).encode() for word in self.words]
                self.said.extend(Frame(Kind.WORD, frame.index, frame.incarnation, head) for head in heads)
                frames = [*self.said, *frames]
        return encode(frames)


def lying(cluster: ClusterHere, words: tuple[Word, ...], base: type[Lying] = Lying) -> list[Frame]:
    """Have node `b` say these words once. Returns what it has said."""
    said: list[Frame] = []
    cluster.kinds["b"] = type("B", (base,), {"words": words, "said": said})
    return said


@pytest.mark.parametrize("word", SAYS.values(), ids=SAYS)
def test_a_node_whose_actor_says_what_no_actor_says_is_given_up(word: Word, run_on: Any, expected: str) -> None:
    cluster = ClusterHere(["a", "b"])
    said = lying(cluster, (word,))
    run = run_on(cluster)
    assert len(said) == 1
    (lost,) = events(run, "node_lost")
    assert (lost["node"], lost["reason"].startswith("it said what no node says (WORD: ")) == ("b", True)
    assert run.result["weights_sha256"] == expected


def test_what_an_actor_says_of_anothers_rollout_is_not_heard(run_on: Any, expected: str) -> None:
    cluster = ClusterHere(["a", "b"])

    class Meddling(Lying):
        """Of what is being made on `a`."""

        def of(self, filled: Word) -> Word | None:
            leased = [lease for actor in list(cluster.here["a"]._node._actors.values()) for lease in list(actor.leases.items())]
            return Word(Told.FILLED, *leased[0]) if leased else None

    fault = Word(Told.FAULT, body=to_json({**FAULT, "report": {"env": 1, "row": 2}}))
    restored = Word(Told.RESTORED, value=2, body=to_json({"seconds": 1.0}))
    said = lying(cluster, (fault, restored, Word(Told.FILLED)), Meddling)
    run = run_on(cluster)
    assert len(said) == 3
    for kind in ("environment_fault", "not_restored", "killed", "node_lost"):
        assert events(run, kind) == []
    assert (run.result["weights_sha256"], run.result["restarts"]) == (expected, 0)
    assert run.result["ledger"]["dropped"] == {}


def test_a_file_that_a_fault_names_by_bytes_is_told_as_text(run_on: Any, tmp_path: Path) -> None:
    from shoal.errors import EnvironmentFault

    cluster = ClusterHere(["a", "b"])
    lying(cluster, (Word(Told.FAULT, body=to_json({**FAULT, "message": "no file \udcff\n  where: here", "report": {"env": 1, "row": 2}})),))
    with pytest.raises(EnvironmentFault, match=r"no file \?") as raised:
        run_on(cluster)
    assert Path(str(raised.value.report["snippet"])).read_text().startswith('"""no file ?')
