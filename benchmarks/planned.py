"""The rows of scaling.py as `shoal plan` predicts them, and its table for 1 to 10,000 nodes: for planning.py.

The costs are measured right before and right after the training, and their means are given to the plan, with what was measured of the links of the cluster
that the training ran on, and nothing of the training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from statistics import median
from typing import Any

import scaling
from clusters import measured_link
from peers import IMPALA_PYTHON
from rows import Entry, line, scratch, shoal

Figures = dict[str, Any]
TARGET = 0.10  # of the error, either way
LINK = ("latency_us", "gbit", "message_us")
ROWS = scaling.ROWS
TABLE = ("CartPole-v1", "--algorithm", "impala", *IMPALA_PYTHON.split())
TABLES = {"table/1 learner": 1, "table/8 learners": 8}  # learners by row


def mean(before: Any, after: Any) -> Any:
    """Of two answers of one bench: every number that differs becomes the mean of both; where only one of them has a part, that counts."""
    if before is None or after is None:
        return after if before is None else before
    if isinstance(before, Mapping):
        return {key: mean(value, after[key]) for key, value in before.items()}
    number = isinstance(before, (int, float)) and not isinstance(before, bool)
    return (before + after) / 2 if number and before != after else before


def beside_cluster(row: scaling.Row, seed: int, options: argparse.Namespace) -> Figures:
    """A training on a cluster on this machine, and what is predicted for it."""
    costs = ["bench", "costs", *row.what(), "--actors", str(row.actors), "--seconds", f"{options.costs_seconds:g}", "--json"]
    before = shoal(costs)
    with row.cluster(row.nodes) as place:
        link = measured_link(place)
        rate, told = scaling.trained(row, row.nodes, place, seed, options)
    planned = predicted(row, mean(before, shoal(costs)), link, options)
    return {
        "measured": rate,
        "predicted": planned["env_steps_per_second"],
        "error": planned["env_steps_per_second"] / rate - 1.0,
        "lag": told["lag"]["mean"],
        "lag_predicted": planned["lag"]["mean"],
        "bottleneck": planned["bottleneck"]["name"],
        "cores": planned["utilisation"]["cores"],
        **{name: link[name] for name in LINK},
    }


def predicted(row: scaling.Row, costs: Mapping[str, Any], link: Mapping[str, float], options: argparse.Namespace) -> Figures:
    """The row of `shoal plan` for it."""
    where = ["--engine", "ray", "--nodes", str(row.nodes), "--actors-per-node", str(row.actors), "--one-machine"]
    way = ["--link-latency", f"{link['latency_us']:g}", "--link-bandwidth", f"{link['gbit']:g}", "--message-us", f"{link['message_us']:g}"]
    with scratch(options.runs) as directory:
        file = directory / "costs.json"
        file.write_text(json.dumps(costs), encoding="utf-8")
        answer = shoal(["plan", *row.what(), *where, *way, "--costs", str(file), "--json"])
    found: Figures = answer["rows"][0]
    return found


@cache
def table_costs(seconds: float) -> Figures:
    """Measured once for all tables of a bench, so that they differ by what they are given alone."""
    found: Figures = shoal(["bench", "costs", *TABLE, "--seconds", f"{seconds:g}", "--json"])
    return found


def table(learners: int, options: argparse.Namespace) -> Figures:
    """`shoal plan --table`, from costs that are measured for it."""
    costs = table_costs(options.costs_seconds)
    with scratch(options.runs) as directory:
        file = directory / "costs.json"
        file.write_text(json.dumps(costs), encoding="utf-8")
        answer = shoal(["plan", *TABLE, "--table", "--learners", str(learners), "--costs", str(file), "--json"])
    parts = {**costs["costs"], **costs["crossing"], "mixed": costs["mixed"], "crowding": costs["crowding"]}
    return {
        "rows": answer["rows"],
        "breaks": answer["breaks"],
        "parts": parts,
        "settings": answer["settings"],
        "links": answer["links"],
        "way": answer["way"],
    }


# ---- the tables ------------------------------------------------------------------------------------------------------
def cluster_lines(entries: Iterable[Entry]) -> Iterator[str]:
    """Predictions beside the runs of scaling.py."""
    yield line(
        "row", "nodes", "measurements", "env steps/s", "predicted", "error", "lag, measured", "predicted", "latency, us", "Gbit/s", "us a message",
        "cores in use, predicted", "bottleneck", "reached",
    )  # fmt: skip
    yield line(*["---"] * 14)
    known = list(entries)
    for row in ROWS:
        figures = [entry["figures"] for entry in known if entry["row"] == f"scaling/{row.name}"]
        if not figures:
            continue
        of = {
            name: median(one[name] for one in figures)
            for name in ("measured", "predicted", "error", "lag", "lag_predicted", "cores", *LINK)
        }
        errors = [one["error"] for one in figures]
        around = f" ({min(errors):+.1%} to {max(errors):+.1%})" if len(errors) > 1 else ""
        yield line(
            row.name, row.nodes, len(figures), f"{of['measured']:,.0f}", f"{of['predicted']:,.0f}", f"{of['error']:+.1%}{around}", f"{of['lag']:.2f}",
            f"{of['lag_predicted']:.2f}", f"{of['latency_us']:.0f}", f"{of['gbit']:.1f}", f"{of['message_us']:.0f}", f"{of['cores']:.0%}",
            figures[-1]["bottleneck"] or "-", "yes" if abs(of["error"]) <= TARGET else "no",
        )  # fmt: skip


def table_lines(entries: Sequence[Entry]) -> Iterator[str]:
    """What `shoal plan --table` says, with one learner and with several, and what breaks first."""
    known = [entry for name in TABLES for entry in entries if entry["row"] == name]
    if not known:
        return
    parts, settings, links = (known[-1]["figures"][name] for name in ("parts", "settings", "links"))
    cost = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    yield (
        f"`shoal plan {' '.join(TABLE)} --table`: nodes of {settings['cores']} cores with {settings['groups']} groups of {settings['group_size']}, links of "
        f"{8e-9 * links['node_bandwidth']:g} Gbit/s and {1e6 * links['latency']:g} us. Costs ({known[-1]['machine']['cpu']}, {known[-1]['date']}), in us of a core for each env step: {cost}.\n"
    )
    yield line(
        "nodes",
        "learners",
        "env steps/s",
        "of a node",
        "lag",
        "learner in use",
        "driver",
        "the learners' cores",
        "bottleneck",
        "twice as good",
    )
    yield line(*["---"] * 10)
    for entry in known:
        for row in entry["figures"]["rows"]:
            used, best = row["utilisation"], next((move for move in row["moves"] if move["name"] == row["bottleneck"]["name"]), None)
            yield line(
                f"{row['nodes']:,}", row["learners"], f"{row['env_steps_per_second']:,.0f}", f"{row['env_steps_per_second_and_node']:,.0f}", f"{row['lag']['mean']:.1f}",
                *(f"{used[name]:.0%}" for name in ("learner", "driver", "learner_cores")), row["bottleneck"]["name"] or "-", f"{best['gain']:+.0%}" if best else "-",
            )  # fmt: skip
    yield ""
    for entry in known:
        yield f"- {entry['row'].removeprefix('table/')}: {broken(entry['figures']['breaks'])}"


def broken(breaks: Mapping[str, Any] | None) -> str:
    """What breaks first, at what size, and what would move it."""
    if breaks is None:
        return "nothing breaks: at every size a node gives more than half of what it gives alone."
    said = f"first breaks, at {breaks['nodes']:,} nodes, where each gives less than half of what it gives alone: {breaks['words']}."
    if breaks["name"] is None:
        return said
    to = "beyond the table" if breaks["moved_to"] is None else f"to {breaks['moved_to']:,} nodes"
    return f"{said} Made twice as good, that moves {to}: {breaks['advice']}."
