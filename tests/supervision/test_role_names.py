"""Names of processes: what the kernel keeps of them says who it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.supervision.injector import roles_below
from shoal.supervision.processes import NAME_BYTES, ROLES, role_name, role_of


@pytest.mark.parametrize(
    ("role", "index", "name"),
    [
        ("actor", 0, "shoal:actor-0"),
        ("actor", 1023, "shoal:acto-1023"),
        ("learner", 9, "shoal:learner-9"),
        ("learner", 10, "shoal:learne-10"),
        ("learner", 63, "shoal:learne-63"),
        ("inference", 0, "shoal:inference"),
    ],
)
def test_a_name_that_is_too_long_keeps_its_number(role: str, index: int, name: str) -> None:
    assert role_name(role, index) == name


@given(role=st.sampled_from(ROLES), index=st.integers(0, 1023))
def test_a_name_says_role_and_index(role: str, index: int) -> None:
    name = role_name(role, index)
    assert len(name.encode()) <= NAME_BYTES
    assert role_of(name) == (role, index)


@pytest.mark.parametrize(
    "name", ["shoal:zygote", "shoal:probe-0", "shoal:", "shoal:-1", "shoal:actor", "shoal:actor-x", "python3", "actor-0", ""]
)
def test_other_names_are_no_roles(name: str) -> None:
    assert role_of(name) is None


def test_roles_are_found_by_what_the_kernel_keeps() -> None:
    script = (
        "import os, sys, time\n"
        "from shoal.supervision.processes import name_process, role_name\n"
        "for role, index in (('learner', 1), ('learner', 10), ('learner', 11), ('actor', 1000), ('inference', 0)):\n"
        "    if os.fork() == 0:\n"
        "        name_process(role_name(role, index))\n"
        "        os.write(1, f'{role} {index} {os.getpid()}\\n'.encode())\n"
        "        time.sleep(60)\n"
        "        os._exit(0)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        said = [process.stdout.readline().split() for _ in range(5)]
        children = [int(pid) for _, _, pid in said]
        try:
            expected = {(role, int(index)): int(pid) for role, index, pid in said}
            assert roles_below(process.pid) == expected
        finally:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            process.kill()
