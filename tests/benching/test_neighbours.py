"""Processes that keep the other cores busy: they work and rest when they are told to, and none is left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from shoal.benching.neighbours import Neighbours, crowding
from shoal.benching.parts import Cycle
from shoal.engines.looking import look
from shoal.engines.roles import Blueprint, UserObjects
from shoal.errors import ProcessError
from shoal.settings import resolve
from shoal.types import EnvironmentSpec

SMALL = {"preset": "none", "sampling.groups": 1, "sampling.group_size": 2, "sampling.rollout_length": 16}


@pytest.fixture(scope="module")
def blueprint() -> Blueprint:
    config, _ = resolve("CartPole-v1", {**SMALL, "algorithm.minibatch_size": 32})
    facts = look(config, UserObjects())
    config.mode, config.env.form, config.policy.inference = facts["mode"], facts["form"], facts["inference"]
    return Blueprint(config, EnvironmentSpec.from_json(facts["spec"]), UserObjects(), bytes(16))


def facts_of(pid: int) -> tuple[str, float]:
    """Its state, and the processor time that it has had."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(") ")[2].split()
    return fields[0], int(fields[11]) / os.sysconf("SC_CLK_TCK")


def wait_for_more(pid: int, than: float) -> None:
    for _ in range(12_000):
        if facts_of(pid)[1] > than:
            return
        time.sleep(0.01)
    raise AssertionError("it does not work")


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text(encoding="ascii").split()}


def test_neighbours_rest_until_they_are_told_to_work_and_end_with_whoever_made_them(blueprint: Blueprint) -> None:
    before = children()
    with Neighbours(blueprint, 1) as neighbours:
        (pid,) = children() - before
        state, spent = facts_of(pid)
        assert state == "T"
        assert facts_of(pid) == (state, spent)
        neighbours.work()
        wait_for_more(pid, spent)
        neighbours.rest()
        assert facts_of(pid)[0] == "T"
    assert children() <= before  # what tests before this one left may go meanwhile


def test_a_core_alone_has_no_crowd_and_two_have_one_number(blueprint: Blueprint) -> None:
    before, cycle = children(), Cycle(blueprint)
    try:
        assert crowding(cycle, blueprint, 1, 0.0) == 1.0
        assert crowding(cycle, blueprint, 2, 0.0) > 0.0
    finally:
        cycle.close()
    assert children() <= before  # what tests before this one left may go meanwhile


def test_a_neighbour_that_cannot_begin_is_an_error_and_leaves_nothing(blueprint: Blueprint) -> None:
    before = children()
    config = blueprint.config.model_copy(deep=True)
    config.env.id = "NoSuchEnvironment-v0"
    with pytest.raises(ProcessError, match="second process"):
        Neighbours(Blueprint(config, blueprint.spec, UserObjects(), bytes(16)), 1)
    assert children() <= before  # what tests before this one left may go meanwhile
