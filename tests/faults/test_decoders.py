"""No bytes crash what reads them, hang it, or have it allocate what they merely claim."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faults.decoders import decoders, examples
from faults.living import SOURCES

NAMES = list(examples())
numbers = st.integers() | st.floats() | st.sampled_from([2**31, 2**63, -1, 10**18, 10**400])
values: Any = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5) | st.sampled_from(["discrete", "box", "int64", "float32", "../x", "ppo"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from([
            "bytes", "sha256", "files", "update", "command", "ok", "actors", "hidden_sizes", "encoder", "network", "kind", "shape", "nvec", "path",
            "host", "versions", "error", "dtype", "observation", "action", "mask_size", "action_mask", "low", "high", "start", "kwargs", "id", "state.json",
            "token", "pid", "place", "since", "renewed", "driver",
            "seconds", "message", "report", "traceback", "env", "row", "step", "seed", "paced", "last_action", "snippet",
        ]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@st.composite
def mutants(draw: Any, name: str) -> bytes:
    """Bytes from nowhere, JSON of the words that matter, or a whole one with a part exchanged."""
    kind = draw(st.sampled_from(["bytes", "json", "changed", "cut"]))
    if kind == "bytes":
        return bytes(draw(st.binary(max_size=300)))
    if kind == "json":
        return json.dumps(draw(values)).encode()
    content = bytearray(draw(st.sampled_from(examples()[name])))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "cut":
        return bytes(content[:place])
    content[place : place + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
    return bytes(content)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    made: dict[str, Any] = dict(decoders(tmp_path_factory.mktemp("decoders") / "x"))
    yield made
    made["control"].close()
    made["answer"].close()


@pytest.mark.parametrize("name", NAMES)
def test_whole_ones_are_read(name: str, targets: dict[str, Any]) -> None:
    for content in examples()[name]:
        targets[name](content)


@pytest.mark.parametrize("name", NAMES)
def test_no_bytes_crash_a_decoder(name: str, targets: dict[str, Any]) -> None:
    @settings(max_examples=150, deadline=60_000, suppress_health_check=list(HealthCheck))
    @given(mutants(name))
    def run(content: bytes) -> None:
        targets[name](content)

    run()


BOUNDED = """
import resource, sys
from pathlib import Path
from faults.decoders import decoders, examples
targets = decoders(Path(sys.argv[1]))
for name, contents in examples().items():
    for content in contents:
        targets[name](content)  # what they import and keep
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
claims = {
    "group state": [b"\\xff\\xff\\xff\\x7f\\0\\0\\0\\0{}", b"\\x40\\0\\0\\0\\0\\0\\0\\0" + b'{"cursor":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}}'],
    "safetensors": [b'{"a":{"dtype":"F64","shape":[1099511627776],"data_offsets":[0,8796093022208]}}'],
    "bundle": [b'{"hidden_sizes": [1000000, 1000000]}', b'{"hidden_sizes": [1000000000000000]}',
               b'{"observation": [{"path": [], "kind": "discrete", "dtype": "int64", "shape": [], "nvec": [1000000000000]}]}'],
    "manifest": [b'{"state.json": {"bytes": 1000000000000000, "sha256": "x"}}', b'{"../../../../../dev/zero": {"bytes": 0, "sha256": "x"}}'],
}
for name, contents in claims.items():
    for content in contents:
        targets[name](content)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
import os; os._exit(print(end="", flush=True) or 0)
"""


def test_sizes_that_are_only_claimed_are_not_allocated(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(SOURCES), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(tmp_path / "x")], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) < 64, f"{done.stdout} MiB"
