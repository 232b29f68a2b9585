"""What every node of a cluster must have in common with the driver's machine: what each reports of itself, and what of that differs."""

from __future__ import annotations

import platform
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, TypeGuard

from shoal.engines.messages import from_json, to_json

PACKAGES = ("shoal", "torch", "numpy", "gymnasium")  # of every run; its own code needs others besides
PYTHON, BYTE_ORDER = "python", "byte order"


@dataclass(frozen=True)
class NodeReport:
    """One machine.

    Attributes:
      host: its name.
      versions: of Python and of packages by name, empty where one is missing, and the byte order; none where it gives no report.
      error: why the run's own code cannot be imported there, or why there is no report; else empty.
    """

    host: str
    versions: Mapping[str, str] = field(default_factory=dict)
    error: str = ""

    def to_json(self) -> bytes:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, message: bytes) -> NodeReport:
        """Raises ValueError for bytes that are no report."""
        facts = from_json(message)
        host, versions, error = facts.get("host"), facts.get("versions"), facts.get("error", "")
        if not isinstance(host, str) or not isinstance(error, str) or not _is_texts(versions):
            raise ValueError("a node's report has a host, versions by name and an error, all of them text")
        return cls(host, versions, error)


def report_here(packages: Iterable[str], error: str = "") -> NodeReport:
    """Of this machine: what every run needs, and `packages` besides."""
    return NodeReport(socket.gethostname(), versions(packages), error)


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Of what the numbers of a run depend on, here; empty where a package is missing."""
    found = {PYTHON: platform.python_version(), BYTE_ORDER: sys.byteorder}
    for name in dict.fromkeys([*PACKAGES, *packages]):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def different(theirs: NodeReport, ours: NodeReport) -> list[str]:
    """The names under which a node has other versions than this machine, in the order of `ours`. What only the node has does not matter."""
    return [name for name, version in ours.versions.items() if theirs.versions.get(name, "") != version]


def refusal(reports: Sequence[tuple[str, NodeReport]], ours: NodeReport) -> str:
    """Why nodes cannot be used, and what to do: one message for all of them; empty where nothing is wrong.

    reports: by the nodes' names.
    """
    said: list[str] = []
    to_install: dict[str, str] = {}
    cannot_import = False
    for name, report in reports:
        node = f"node {name}" if report.host in ("", name) else f"node {name} ({report.host})"
        if not report.versions:
            said.append(f"{node} gives no report: {report.error}")
            continue
        names = different(report, ours)
        if names:
            said.append(f"{node} differs: {', '.join(_both(each, report, ours) for each in names)}")
            to_install |= {each: ours.versions[each] for each in names if each not in (PYTHON, BYTE_ORDER)}
        if report.error:
            said.append(f"{node} cannot import what the run is made of: {report.error}")
            cannot_import = True
    advice = []
    if any(different(report, ours) for _, report in reports if report.versions):
        pins = " ".join(f"'{name}=={version}'" for name, version in to_install.items())
        advice.append("install the same there" + (f": pip install {pins}" if pins else ""))
    if cannot_import:
        advice.append("what an import path names must be there on every node, as an installed package or under the same path")
    if any(not report.versions for _, report in reports):
        advice.append("a node needs the same Python with the same shoal, and what it needs")
    return "ray: " + "; ".join([*said, *advice]) if said else ""


def _both(name: str, theirs: NodeReport, ours: NodeReport) -> str:
    return f"{name} {theirs.versions.get(name) or 'is missing'} (here {ours.versions[name] or 'missing'})"


def _is_texts(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(each, str) for pair in value.items() for each in pair)
