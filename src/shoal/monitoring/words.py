"""Events and figures in words: what a person reads in the terminal, and in `shoal show`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_Facts = Mapping[str, Any]


def counted(count: int, what: str) -> str:
    """`1 restart`, `2 restarts`."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def held_words(replay: _Facts) -> str:
    """How full a replay is, `9,000 of 100,000`, of the facts of `Coordinator.replay_facts`."""
    capacity = f" of {replay['capacity_steps']:,.0f}" if "capacity_steps" in replay else ""
    return f"{replay.get('steps', 0):,.0f}{capacity}"


def samples_per_insert(replay: _Facts) -> float:
    """How often what went in was sampled, on average."""
    return float(replay["sampled"] / replay["inserted"]) if replay.get("inserted") else 0.0


def age_words(replay: _Facts, unit: str, apart: str = ", ") -> str:
    """How old what was sampled last is, in `updates` or `steps`: `mean 12.2, p99 30, max 40`; empty where nothing was sampled yet."""
    places = 1 if unit == "updates" else 0
    ages = {name: replay.get(f"age_{unit}_{name}") for name in ("mean", "p99", "max")}
    return apart.join(f"{name} {age:,.{places if name == 'mean' else 0}f}" for name, age in ages.items() if age is not None)


def event_words(kind: str, facts: _Facts) -> str:
    """One event as a sentence; the facts by name where no sentence is known for its kind."""
    say = _SENTENCES.get(kind)
    try:
        return say(facts) if say is not None else _by_name(kind, facts)
    except KeyError:  # written by another version
        return _by_name(kind, facts)


def _by_name(kind: str, facts: _Facts) -> str:
    words = ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("report", "time", "kind") and value != "")
    return f"{kind.replace('_', ' ')}: {words}" if words else kind.replace("_", " ")


def _role(facts: _Facts) -> str:
    return (
        f"actor {facts['index']}"
        if facts["role"] == "actor"
        else "the helper process"
        if facts["role"] == "zygote"
        else f"learner {facts['index']}"
        if facts["role"] == "learner" and facts["index"]
        else f"the {facts['role']}"
    )


def _died(facts: _Facts) -> str:
    if facts.get("reason"):
        return f"{_role(facts)} is gone ({facts['reason']}); another one starts"
    return f"{_role(facts)} died, {facts['how']}; another one starts"


def _rolled_back(facts: _Facts) -> str:
    return f"back to the checkpoint of update {facts['update']:,}" + _made_again(facts, ": {} will be made again")


def _resumed(facts: _Facts) -> str:
    return f"the run goes on from update {facts['update']:,}" + _made_again(facts, "; {} after it will be made again")


def _made_again(facts: _Facts, words: str) -> str:
    undone = int(facts["updates_undone"])
    return words.format(counted(undone, "update")) if undone else ""


def _not_restored(facts: _Facts) -> str:
    lost = facts["environments"]
    number = len(lost) if isinstance(lost, (list, tuple)) else int(lost)
    return f"group {facts['group']}: {counted(number, 'environment')} could not be put back to where it stood, and began a new episode"


def _recovered(facts: _Facts) -> str:
    who = f"group {facts['index']}" if facts["role"] == "group" else _role(facts)
    restoring = facts["restoring_seconds"]
    again = f", {restoring:.2f} s of it stepping episodes again" if restoring >= 0.01 else ""
    return f"{who} is back after {facts['seconds']:.2f} s{again} ({facts['after']})"


def _fault(facts: _Facts) -> str:
    report = facts.get("report") or {}
    where = ", ".join(
        f"{words} {report[name]}"
        for name, words in (("group", "group"), ("env", "environment"), ("step", "step"))
        if report.get(name) is not None
    )
    spent = f" {report['count']} (restarts allowed: {report['budget']})" if "count" in report else ""
    return f"environment fault{spent}: {str(facts['message']).splitlines()[0]}" + (f" ({where})" if where else "")


def _scaled(facts: _Facts) -> str:
    nodes = ", ".join(f"{count} on {node}" for node, count in (facts.get("nodes") or {}).items())
    before = f" instead of {facts['before']}" if facts.get("before") not in (None, facts["actors"]) else ""
    where, why = f" ({nodes})" if nodes else "", f": {facts['reason']}" if facts.get("reason") else ""
    if "there" in facts:
        missing = "the others begin as nodes are taken in that have room for them"
        return f"{counted(int(facts['actors']), 'actor')} wanted{before}, and now {facts['there']}{where}; {missing}{why}"
    return f"now {counted(int(facts['actors']), 'actor')}{before}{where}{why}"


def _node_draining(facts: _Facts) -> str:
    when = "soon" if facts["seconds"] is None else f"in {facts['seconds']:.0f} s"
    return f"node {facts['node']} is to go {when} ({facts['reason']}: {facts['notice']}); what lives there moves to others first"


_SENTENCES: dict[str, Callable[[_Facts], str]] = {
    "died": _died,
    "killed": lambda facts: f"{_role(facts)} {facts['reason']}: it is killed and made anew",
    "actor_gone": lambda facts: f"actor {facts['index']} died too often ({facts['how']}); its groups move to the others",
    "checkpoint_failed": lambda facts: (
        f"warning: no checkpoint could be saved ({facts['message']}); "
        f"{'those before it are whole' if facts.get('before', True) else 'there is none before it'}, and the run goes on"
    ),
    "rolled_back": _rolled_back,
    "resumed": _resumed,
    "recovered": _recovered,
    "woken": lambda facts: f"{_role(facts)} was stopped; it is continued",
    "not_finite": lambda facts: (
        f"warning: loss or gradient was not finite; {counted(int(facts['steps']), 'optimizer step')} of update {facts['update'] + 1:,} skipped"
    ),
    "diverged": lambda facts: f"{facts['message']}. Going back to the last good checkpoint, once, and on with other random numbers",
    "not_restored": _not_restored,
    "environment_fault": _fault,
    "given_up": lambda facts: (
        f"group {facts['group']}: {counted(len(facts['places']), 'episode')} ended as invalid, since the same step broke twice"
    ),
    "failed": lambda facts: f"the run ended with {facts['error']}: {str(facts['message']).splitlines()[0]}",
    "warning": lambda facts: f"warning: {facts['message']}",
    "scaled": _scaled,
    "nodes_awaited": lambda facts: (
        f"waiting for nodes: {facts['there']} of {facts['wanted']} with {counted(int(facts['cpus']), 'CPU')} are there; it is given up after {facts['seconds']:g} s"
    ),
    "node_joined": lambda facts: f"node {facts['node']} is taken in",
    "node_lost": lambda facts: f"node {facts['node']} is lost ({facts['reason']}); what lived there is made again elsewhere",
    "node_draining": _node_draining,
    "node_left": lambda facts: f"node {facts['node']} is left: {facts['reason']}",
    "pause": lambda facts: "paused: no more rollouts are ordered until `shoal control RUN continue`",
    "continue": lambda facts: "going on",
    "checkpoint": lambda facts: f"checkpoint of update {facts['update']:,}",
    "uploaded": lambda facts: f"the checkpoint of update {facts['update']:,} is in the store",
    "upload_skipped": lambda facts: (
        f"the store is slower than the run: {counted(int(facts['skipped']), 'checkpoint')} before that of update {facts['update']:,} went without a copy there"
    ),
    "upload_failed": lambda facts: (
        f"warning: the checkpoint of update {facts['update']:,} could not be copied to the store ({facts['message']}); the run goes on, and the next one is tried"
    ),
}
