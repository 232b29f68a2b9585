"""What nodes say of themselves, compared with the driver's machine: who is refused, and with which words."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engines.node_report import BYTE_ORDER, PYTHON, NodeReport, different, refusal, report_here, versions

HERE = NodeReport("head", {PYTHON: "3.11.4", BYTE_ORDER: "little", "shoal": "0.1.0", "torch": "2.13.0", "ale-py": "0.12.1"})


def like_here(host: str = "far", error: str = "", **other: str) -> NodeReport:
    return NodeReport(host, {**HERE.versions, **{name.replace("_", "-"): version for name, version in other.items()}}, error)


def test_nodes_that_are_alike_are_taken() -> None:
    assert refusal([("a", like_here()), ("b", like_here("b"))], HERE) == ""


def test_what_only_a_node_has_does_not_matter() -> None:
    assert different(like_here(scipy="1.16"), HERE) == []


def test_a_difference_is_told_with_node_package_both_versions_and_what_to_do() -> None:
    assert refusal([("a", like_here(torch="2.10.0", ale_py=""))], HERE) == (
        "ray: node a (far) differs: torch 2.10.0 (here 2.13.0), ale-py is missing (here 0.12.1); "
        "install the same there: pip install 'torch==2.13.0' 'ale-py==0.12.1'"
    )


def test_what_no_package_brings_is_not_said_to_be_installed_by_pip() -> None:
    report = NodeReport("far", {**HERE.versions, PYTHON: "3.12.1", BYTE_ORDER: "big"})
    said = refusal([("a", report)], HERE)
    assert said == "ray: node a (far) differs: python 3.12.1 (here 3.11.4), byte order big (here little); install the same there"


def test_all_nodes_are_in_one_message_and_those_that_are_alike_are_not() -> None:
    error = "env.id mine:Env: cannot import mine: No module named 'mine'"
    reports = [
        ("a", like_here(torch="2.1")),
        ("b", like_here("b")),
        ("c", like_here(error=error)),
        ("d", NodeReport("", error="it is gone")),
    ]
    said = refusal(reports, HERE)
    assert said.startswith(
        f"ray: node a (far) differs: torch 2.1 (here 2.13.0); node c (far) cannot import what the run is made of: {error}; "
        "node d gives no report: it is gone; install the same there: pip install 'torch==2.13.0'; what an import path names must be there"
    )
    assert "node b" not in said


names = st.sampled_from([PYTHON, BYTE_ORDER, "shoal", "torch", "numpy", "box2d"])
reports = st.builds(
    NodeReport, st.just("far"), st.dictionaries(names, st.sampled_from(["", "1", "2"]), min_size=1), st.sampled_from(["", "no"])
)


@given(st.lists(reports, max_size=4), reports)
def test_exactly_those_are_named_that_are_not_alike(theirs: list[NodeReport], ours: NodeReport) -> None:
    said = refusal([(f"n{index}", report) for index, report in enumerate(theirs)], ours)
    wrong = [
        f"n{index}"
        for index, report in enumerate(theirs)
        if report.error or any(report.versions.get(name, "") != ours.versions[name] for name in ours.versions)
    ]
    assert sorted(set(re.findall(r"node (n\d)", said))) == wrong
    assert bool(said) == bool(wrong)


def test_a_report_is_read_as_it_was_written() -> None:
    report = report_here(["hypothesis", "no-such-package"], "why")
    assert NodeReport.from_json(report.to_json()) == report
    assert report.versions[PYTHON] == platform.python_version()
    assert report.versions[BYTE_ORDER] == sys.byteorder
    assert report.versions["hypothesis"] == metadata.version("hypothesis")
    assert report.versions["no-such-package"] == ""
    assert set(versions()) == {PYTHON, BYTE_ORDER, "shoal", "torch", "numpy", "gymnasium"}


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"host": 1, "versions": {}}', b'{"host": "a", "versions": {"a": 1}}',
                                     b'{"host": "a", "versions": {}, "error": null}'])  # fmt: skip
def test_what_is_no_report_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"JSON|report|Expecting"):
        NodeReport.from_json(content)
