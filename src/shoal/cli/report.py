"""What commands say to a person. Every function takes what `--json` would print and writes text on standard output."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.cli.output import print_table, word
from shoal.monitoring.live import clock
from shoal.monitoring.words import age_words, counted, event_words, held_words, samples_per_insert

_REASONS = {
    "return": "the mean return of the last 100 episodes reached --stop.return",
    "env_steps": "the environment steps of --stop.env-steps are made",
    "updates": "the updates of --stop.updates are made",
    "seconds": "the time of --stop.seconds is over",
    "interrupted": "interrupted; a checkpoint is kept",
    "failed": "an error ended it, see below",
}
_MARKS = {"error": ("red", "✗"), "warning": ("yellow", "!"), "note": ("cyan", "·")}


def print_training(result: Mapping[str, Any]) -> None:
    """How a training ended."""
    reason = str(result.get("reason"))
    path = _short(str(result.get("run", "")))
    rows = [
        ("ended", _REASONS.get(reason, reason)),
        ("return", f"{word(result.get('mean_return'))} (mean of the last 100 training episodes)"),
    ]
    evaluation = result.get("evaluation")
    if isinstance(evaluation, Mapping):
        low, high = evaluation["ci95"]
        found = f"{word(evaluation['mean_return'])} (95 %: {word(low)} to {word(high)}) over {evaluation['episodes']} episodes of the final policy"
        rows.append(("evaluated", found))
    rows.append(("steps", _steps(result)))
    rows += _accounts(result.get("ledger"), result.get("lag"))
    if result.get("replay"):
        rows += _replay(result["replay"])
    if result.get("network"):
        rows.append(("network", _network(result["network"])))
    if result.get("restarts"):
        rows.append(("restarts", word(result["restarts"])))
    rows += [("weights", f"version {word(result.get('policy_version'))}, sha256 {result.get('weights_sha256')}"), ("run", path)]
    rows.append(("next", f"shoal resume {path}" if reason == "interrupted" else f"shoal evaluate {path}"))
    _print_rows(rows)


def _steps(result: Mapping[str, Any]) -> str:
    steps, updates, speed = (word(result.get(name)) for name in ("env_steps", "updates", "env_steps_per_second"))
    seconds = result.get("seconds")
    tail = f", {speed} steps/s" if result.get("env_steps_per_second") else ""
    return f"{steps} in {updates} updates and {clock(seconds) if seconds is not None else '-'}{tail}"


def _accounts(ledger: Any, lag: Any) -> Iterator[tuple[str, str]]:
    if isinstance(ledger, Mapping):
        yield "ledger", f"{_balance(ledger)} (env steps)"
    if isinstance(lag, Mapping):
        yield "lag", f"mean {word(lag.get('mean'))}, p99 {word(lag.get('p99'))}, max {word(lag.get('max'))} updates"


def _replay(facts: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """How full the replay is, how much was sampled for what went in, and how old that was."""
    each = f"{facts['inserted']:,.0f} in, {facts['sampled']:,.0f} sampled ({samples_per_insert(facts):.2f} for each)"
    yield "replay", f"{held_words(facts)} env steps held; {each}"
    updates, steps = age_words(facts, "updates"), age_words(facts, "steps")
    if updates:
        yield "age", f"{updates} updates; {steps} env steps (of what the last update sampled)"


def _balance(ledger: Mapping[str, Any]) -> str:
    """The law of conservation with its numbers."""
    dropped = [f" + {word(count)} {reason.replace('_', ' ')}" for reason, count in (ledger.get("dropped") or {}).items()]
    consumed = f"{word(ledger.get('trained'))} trained"
    if ledger.get("replayed"):
        consumed = f"{word(ledger['replayed'])} replayed" + (f" + {consumed}" if ledger.get("trained") else "")
    terms = f"{consumed}{''.join(dropped)} + {word(ledger.get('in_flight'))} in flight"
    evicted = f"; {word(ledger['evicted'])} of those replayed were evicted since" if ledger.get("evicted") else ""
    return f"{word(ledger.get('produced'))} produced = {terms}{evicted}"


def print_show(shown: Mapping[str, Any]) -> None:
    """A run: how it stands, its ledger, faults, checkpoint, what it is configured to, and its schema."""
    status = _REASONS.get(str(shown["status"]), str(shown["status"]))
    if shown.get("process"):
        where = f" on {shown['host']}" if shown.get("host") else ""
        status += f" (process {shown['process']}{where})"
    elif shown["status"] == "stopped":
        status += ": it ended without a result; `shoal resume` goes on from its checkpoint"
    results = shown.get("results") or {}
    rows = [("run", _short(shown["run"])), ("status", status)]
    if results:
        rows += [("return", f"{word(results.get('mean_return'))} (mean of the last 100 training episodes)"), ("steps", _steps(results))]
    ledger = shown.get("ledger") or {}
    rows += _accounts(ledger.get("steps", ledger) or None, shown.get("lag"))
    if shown.get("replay"):
        rows += _replay(shown["replay"])
    checkpoint = shown.get("checkpoint")
    if checkpoint:
        rows.append(("checkpoint", f"update {word(checkpoint['update'])}, {_bytes(checkpoint['bytes'])}, {_short(checkpoint['path'])}"))
    else:
        rows.append(("checkpoint", "none yet"))
    rows += [("warning", warning) for warning in shown.get("warnings", ())]
    _print_rows(rows)
    _print_groups(ledger.get("groups"))
    _print_network(shown.get("network") or {})
    _print_faults(shown.get("faults") or {})
    _print_recovery(shown.get("recovery") or {})
    print("\nconfiguration (what differs from the defaults; config.yaml has all of it)")
    _print_rows(list(_changed(shown["configuration"])), indent=2)
    if shown.get("schema"):
        print("\nschema of a rollout")
        fields = [{**field, "shape": "x".join(map(str, field["shape"])) or "-"} for field in shown["schema"]]
        print_table(fields, ["name", "dtype", "shape", "axis"], indent=2)


def _print_groups(groups: Any) -> None:
    if isinstance(groups, Mapping) and groups:
        print("\nledger by environment group (env steps)")
        fate, *more = ["replayed", "evicted"] if any(row.get("replayed") for row in groups.values()) else ["trained"]
        columns = ["produced", fate, *more, "in_flight", "dropped", f"{fate}_share"]
        rows = [{"group": int(group), **{name: row.get(name) for name in columns}} for group, row in groups.items()]
        print_table(rows, ["group", *columns], indent=2)
        paced = {group: row["by_environment"] for group, row in groups.items() if row.get("by_environment")}
        if paced:
            print("\nof these by environment, each of which acted as soon as it was ready")
            shares = [_spread(int(group), by) for group, by in paced.items()]
            print_table(shares, list(shares[0]), indent=2)


def _spread(group: int, by_environment: Mapping[str, list[int]]) -> dict[str, Any]:
    """Who of a group contributed least and most, and whose steps were too old to be trained."""
    trained, late = by_environment["trained"], by_environment["late"]
    least, most = (trained.index(bound) for bound in (min(trained), max(trained)))
    return {
        "group": group,
        "least trained": f"{trained[least]:,} (environment {least})",
        "most trained": f"{trained[most]:,} (environment {most})",
        "too late": ", ".join(f"{steps:,} of environment {b}" for b, steps in enumerate(late) if steps) or "0",
    }


def _network(figures: Mapping[str, Any]) -> str:
    """What an env step takes of the way between driver and nodes."""
    each = f"{figures['bytes_per_env_step']:,.1f} bytes and {figures['messages_per_env_step']:.2g} messages for each env step"
    return f"{each}; {_bytes(figures['bytes_heard'])} from {counted(len(figures['nodes']), 'node')}, {_bytes(figures['bytes_said'])} there"


def _print_network(network: Mapping[str, Any]) -> None:
    if not network:
        return
    print("\nnetwork (between the driver and each node, since this part of the run began)")
    rows = [
        {
            "node": name,
            "env steps": f"{node['env_steps']:,}",
            "from it": _bytes(node["bytes_heard"]),
            "to it": _bytes(node["bytes_said"]),
            "messages": f"{node['messages']:,}",
            "bytes/env step": f"{node['bytes_per_env_step']:,.1f}",
            "messages/env step": f"{node['messages_per_env_step']:.2g}",
        }
        for name, node in {**network["nodes"], "all": network}.items()
    ]
    print_table(rows, list(rows[0]), indent=2)


def _print_faults(faults: Mapping[str, Any]) -> None:
    if not faults.get("counts"):
        return
    kinds = [f"{count} {kind}".replace("_", " ") for kind, count in faults["counts"].items()]
    print(f"\nfaults and other events: {', '.join(kinds)}")
    for event in faults.get("newest", ()):
        facts = {name: value for name, value in event.items() if name not in ("time", "kind")}
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"])) if "time" in event else ""
        print(f"  {when}  {event_words(event['kind'], facts)}")


def _print_recovery(recovery: Mapping[str, Any]) -> None:
    if recovery:
        print("\nrecovery (seconds from a fault to the first rollout or update after it; stepping episodes again is counted apart)")
        rows = [{"of": role, **{name: f"{value:.3g}" for name, value in row.items()}} for role, row in recovery.items()]
        print_table(rows, list(rows[0]), indent=2)


def print_chaos(result: Mapping[str, Any]) -> None:
    """What faults cost a training."""
    speed, seconds = result["env_steps_per_second"], result["seconds"]
    kept = "-" if result["kept"] is None else f"{100 * result['kept']:.1f} %"
    equal = {
        None: "not compared (async mode, or --no-compare)",
        True: "those of the same training without faults, bit for bit",
        False: "OTHER than without faults",
    }
    lost = ", ".join(f"{100 * share:.2f} % {reason.replace('_', ' ')}" for reason, share in result["lost"].items())
    rows = [
        ("run", _short(result["run"])),
        (
            "trained",
            f"{counted(int(result['updates']), 'update')}, {seconds['faulty']:.0f} s with faults and {seconds['quiet']:.0f} s without",
        ),
        ("throughput", f"{kept} kept: {word(speed['faulty'])} steps/s with faults, {word(speed['quiet'])} without"),
        ("ledger", f"{_balance(result['ledger'])} (env steps){'' if result['balances'] else ': DOES NOT BALANCE'}"),
        ("lost", lost or "nothing"),
        ("weights", equal[result["weights_equal"]]),
    ]
    _print_rows(rows)
    print("\nfaults (seconds from each to the first rollout or update after it)")
    columns = ["injected", "recovered", "p50", "p99", "max"]
    table = [{"fault": kind, **{name: _figure(row[name]) for name in columns}} for kind, row in result["faults"].items()]
    for row in table:
        if row["fault"] == "slow":  # it goes on, only slower
            row["recovered"] = "not missed"
    print_table(table, ["fault", *columns], indent=2)
    if never := [kind for kind, row in result["faults"].items() if not row["injected"]]:
        print(
            f"\nwarning: never injected: {', '.join(never)}; nothing is known of what would come of it. Give more --seconds, or a shorter time between two"
        )


def _figure(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def print_stalls(answer: Mapping[str, Any]) -> None:
    """Who waits for whom in a living run, and where each process stands."""
    from shoal.engines.stalls import in_words

    print(in_words(dict(answer["stalls"])))


def _changed(configuration: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys whose value is not the model's default, by dotted name."""
    from shoal.config import BUILT_IN
    from shoal.keys import all_keys

    algorithm = str(configuration.get("algorithm", {}).get("name", "ppo"))
    defaults = {key.name: key.default for key in all_keys(algorithm if algorithm in BUILT_IN else "ppo")}
    yield "algorithm", algorithm
    for name, value in _flat(configuration, ""):
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)
        if name != "algorithm.name" and value not in (None, {}, "") and text != defaults.get(name):
            yield name, text


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def print_check(report: Mapping[str, Any]) -> None:
    """Findings, worst first, then what the environment is and costs."""
    findings = sorted(report.get("findings", ()), key=lambda finding: list(_MARKS).index(finding["severity"]))
    numbers = {kind: sum(finding["severity"] == kind for finding in findings) for kind in _MARKS}
    said = ", ".join(counted(number, kind) for kind, number in numbers.items() if number) or "nothing found"
    print(f"{_short(str(report.get('environment', 'environment')))}: {said}")
    for finding in findings:
        colour, mark = _MARKS[finding["severity"]]
        message, hint = str(finding["message"]), str(finding.get("hint") or "")
        first, *rest = message.splitlines()
        _print_coloured(f"\n{mark} {finding['severity']} {finding['name']}", colour, f": {first}")
        for text in rest if not hint else [text for text in rest if hint not in text]:
            print(f"  {text}")
        if hint:
            print(f"    what to do: {hint}")
    rows = [*_spec_rows(report.get("spec")), *_cost_rows(report.get("measurements") or {})]
    if rows:
        print()
        _print_rows(rows)


def _spec_rows(spec: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(spec, Mapping):
        return
    for leaf in spec["observation"]:
        yield "/".join(["observation", *map(str, leaf["path"])]), _leaf(leaf)
    yield "action", _leaf(spec["action"]) + ("" if spec["action_mask"] == "none" else f", mask in the {spec['action_mask']}")
    if not spec["exact_restore"]:
        yield "restoring", "not possible: after a kill or a resume a run goes on, but not with the same bits"
    elif spec["snapshot_bytes"]:
        yield "restoring", f"by its own snapshots, at most {_bytes(spec['snapshot_bytes'])} each"
    else:
        yield "restoring", "by its episode's seed and actions"


def _leaf(leaf: Mapping[str, Any]) -> str:
    shape = f"[{', '.join(map(str, leaf['shape']))}]"
    if leaf["kind"] == "discrete":
        return f"discrete, {leaf['nvec'][0]} choices"
    if leaf["kind"] == "multi_discrete":
        return f"multi-discrete, {', '.join(map(str, leaf['nvec']))} choices"
    if leaf["kind"] == "multi_binary":
        return f"multi-binary {shape}"
    low, high = (sorted({_bound(number, sign) for number in leaf[name]}) for name, sign in (("low", "-inf"), ("high", "inf")))
    bounds = f"{low[0]} to {high[0]}" if len(low) == len(high) == 1 else "several bounds"
    return f"box {leaf['dtype']} {shape}, {bounds}"


def _bound(number: float | None, infinite: str) -> str:
    return infinite if number is None or math.isinf(number) else f"{number:g}"


def _cost_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "step_mean_us" in found:
        yield (
            "step",
            f"{_micro(found['step_mean_us'])} on average, p99 {_micro(found['step_p99_us'])}, {_micro(found['step_cpu_us'])} of it computing",
        )
        yield "reset", _micro(found["reset_mean_us"])
    if found.get("memory_bytes"):
        yield "memory", f"{_bytes(found['memory_bytes'])} for each environment"
    if "steps_played" in found:
        yield "played", f"{word(int(found['steps_played']))} random steps, {word(int(found['episodes_ended']))} episodes ended"


def print_replay(result: Mapping[str, Any]) -> None:
    """Whether a replay ended with the run's own weights."""
    verdict = "the same weights, bit for bit" if result["equal"] else f"OTHER weights: the run has {result['expected_sha256']}"
    _print_rows(
        [
            ("run", _short(result["run"])),
            ("replayed", counted(int(result["updates"]), "update")),
            ("result", verdict),
            ("sha256", result["weights_sha256"]),
        ]
    )


def print_control(answer: Mapping[str, Any], command: str) -> None:
    """What a living run answered."""
    if command == "state":
        _print_state(answer["state"])
        return
    said: dict[str, Callable[[], str]] = {
        "save": lambda: f"saved: checkpoint of update {word(answer['update'])}",
        "pause": lambda: "paused; `shoal control RUN continue` lets it go on",
        "continue": lambda: "going on",
        "stop": lambda: "it ends after this update, with a checkpoint",
        "scale": lambda: (
            event_words("scaled", answer) + (f", and it follows the load ({answer['autoscale']})" if answer.get("autoscale") else "")
        ),
    }
    print(said[command]())


def _print_state(state: Mapping[str, Any]) -> None:
    from shoal.monitoring.live import line, panel
    from shoal.monitoring.snapshot import Snapshot

    snapshot = Snapshot.from_json(state)
    if not sys.stdout.isatty():
        print(line(snapshot))
        return
    from rich.console import Console

    Console(highlight=False).print(panel(snapshot, []))


# ------------------------------------------------------------------------------------------------------------------- words


def _print_rows(rows: Sequence[tuple[str, str]], indent: int = 0) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{' ' * indent}{name.ljust(width)}  {text}")


def _print_coloured(text: str, colour: str, rest: str) -> None:
    codes = {"red": 31, "yellow": 33, "cyan": 36}
    print(f"\x1b[1;{codes[colour]}m{text}\x1b[0m{rest}" if sys.stdout.isatty() else text + rest)


def _short(path: str) -> str:
    """A path as one would type it here."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _micro(microseconds: float) -> str:
    return f"{microseconds / 1000:.3g} ms" if microseconds >= 1000 else f"{microseconds:.3g} µs"
