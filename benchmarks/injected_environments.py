"""Rows of soak_faults.py: environments that break their contract, at the first step, where a look before does not see it, and late."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from injected import ROOT, Found, Row, answer, events, kwargs  # first: it finds the tests' helpers

from faults.living import TINY, living

ZOO = ROOT / "tests" / "environments" / "faulty.py"
LIMIT_SECONDS = 2.0
TIMEOUT = ["--env.step-timeout-seconds", f"{LIMIT_SECONDS:g}"]


@dataclass(frozen=True)
class Fault:
    """One kind. `check`: the finding of `shoal check`, `errs` whether it is an error. `kind`: of the report of `shoal train`, "" where it trains.
    `kills`: it takes its process along, so that all roles in one process cannot survive it. `fields`: of the report that are not empty."""

    words: str
    check: str
    kind: str
    fields: tuple[str, ...] = ()
    errs: bool = True
    kills: bool = False
    hides: bool = True

    @property
    def nameless(self) -> bool:
        """The first time, nobody knows which environment of the group it was."""
        return self.kind in ("hang", "died")


VALUE = ("field", "expected", "actual")
FAULTS = {
    "raises": Fault("raises", "raised", "raised", ("traceback",)),
    "sys_exit": Fault("calls sys.exit", "raised", "raised", ("traceback",)),
    "sleeps": Fault("hangs in a sleep", "hangs", "hang", ("traceback", "expected", "actual")),
    "loops": Fault("hangs in C, with the interpreter's lock", "hangs", "hang", ("traceback", "expected", "actual"), kills=True),
    "exits": Fault("exits (os._exit)", "process_died", "died", kills=True),
    "segfaults": Fault("segfaults", "process_died", "died", ("traceback",), kills=True),
    "nan": Fault("shows NaN", "observation_not_finite", "not_finite", VALUE),
    "inf": Fault("shows Inf", "observation_not_finite", "not_finite", VALUE),
    "shape": Fault("wrong shape", "observation_shape", "shape", VALUE),
    "dtype": Fault("wrong dtype", "observation_dtype", "dtype", VALUE),
    "structure": Fault("wrong structure", "observation_structure", "structure", VALUE),
    "reward_nan": Fault("reward NaN", "reward", "reward", VALUE),
    "reward_array": Fault("reward an array", "reward", "reward", VALUE),
    "reward_none": Fault("reward None", "reward", "reward", VALUE),
    "four": Fault("a 4-tuple from step", "interface", "api", VALUE),
    "flag": Fault("a flag that is no bool", "flags", "flag", VALUE),
    "choices": Fault("a choice out of range", "observation_range", "range", VALUE, hides=False),
    "refuses": Fault("rejects its own action space", "action_refused", "raised", ("traceback",), hides=False),
    "stops": Fault("stops itself (SIGSTOP)", "hangs", "hang", kills=True, hides=False),
    "range": Fault("a Box value out of range", "observation_range", "", errs=False),
    "reuses": Fault("reuses one observation buffer", "shared_buffer", ""),
    "endless": Fault("never ends an episode", "episode_never_ends", "", errs=False),
    "unseeded": Fault("the same seed, other results", "same_seed_differs", "", hides=False),
}  # fmt: skip
PLACES = {  # where a fault of the training shows, beside the look before it
    "ppo, 2 actors": ["--algorithm", "ppo", "--actors", "2"],
    "appo, 2 actors": ["--algorithm", "appo", "--actors", "2"],
    "ppo in threads": ["--algorithm", "ppo", "--actors", "2", "--env.form", "threads"],
    "appo in threads": ["--algorithm", "appo", "--actors", "1", "--env.form", "threads"],
    "ppo, 0 actors": ["--algorithm", "ppo", "--actors", "0"],
    "appo, 0 actors": ["--algorithm", "appo", "--actors", "0"],
}  # fmt: skip


def _wanted(name: str, fault: Fault) -> str:
    found = f"check: {fault.check}, code {3 if fault.errs else 0}"
    if not fault.kind:
        return f"{found}; train goes on"
    limit = f"its limit of {LIMIT_SECONDS:g} s + 1 s" if fault.kind == "hang" else "10 s"
    return f"{found}; train: code 3 within {limit} with the whole report, and the snippet shows it again"


def environment(name: str) -> Callable[[Found, Path], None]:
    fault = FAULTS[name]

    def work(found: Found, place: Path) -> None:
        check(name, fault, found, place)
        one(name, fault, "at once", ["--algorithm", "ppo", "--actors", "2"], False, found, place)
        for where, how in PLACES.items() if fault.hides else ():
            if not (fault.kills and where.endswith("0 actors")):
                one(name, fault, where, how, True, found, place)

    return work


def check(name: str, fault: Fault, found: Found, place: Path) -> None:
    with living("check", f"{ZOO}:make", *kwargs(fault=name), *TIMEOUT, "--json", cwd=place) as run:
        code, said, _ = answer(run)
    found.times += 1
    mine = [one for one in said.get("findings", ()) if one["name"] == fault.check]
    names = sorted(one["name"] for one in said.get("findings", ()))
    found.expect(bool(mine) and all(one["hint"] for one in mine), f"check finds {names}, not {fault.check}")
    found.expect(code == (3 if fault.errs else 0), f"check ends with {code}")


def one(name: str, fault: Fault, where: str, how: Sequence[str], hidden: bool, found: Found, place: Path) -> None:
    """One training with the fault from its first step on, or (hidden) only where a look before does not see it."""
    told = place / f"{name}-{where}-told".replace(" ", "-").replace(",", "")
    given = kwargs(fault=name, hidden=hidden, told=told)
    directory = told.with_suffix(".run")
    with living(
        "train", f"{ZOO}:make", *TINY, *how, *given, *TIMEOUT, "--stop.updates", "6", "--run-dir", str(directory), "--json", cwd=place
    ) as run:
        code, said, ended = answer(run)
        text = run.said
    found.times += 1
    if not fault.kind:
        found.expect(code == 0 or fault.kills, f"{where}: code {code}: {text[-200:]}")
        return
    report = said.get("error", {}).get("report") or {}
    found.expect(code == 3, f"{where}: code {code}: {text[-200:]}")
    if code != 3:
        return
    found.expect(report.get("kind") == fault.kind, f"{where}: kind {report.get('kind')}")
    if told.exists():
        found.seconds.append(ended - float(told.read_text()))
    for key in ("environment", "group", "step", "seed", "hint", *fault.fields):
        known = report.get(key) not in (None, "") or (key in ("step", "seed") and fault.nameless)
        found.expect(known, f"{where}: no {key}")
    for text_of in ("group", "seed", "reproduce: python"):
        found.expect(text_of in said["error"]["message"], f"{where}: the message has no {text_of!r}")
    if hidden:
        found.expect("action" in said["error"]["message"], f"{where}: the message has no action")
    if not report.get("snippet"):
        found.expect(False, f"{where}: no snippet")
        return
    try:
        again = subprocess.run(
            [sys.executable, report["snippet"]], cwd=place, capture_output=True, text=True, timeout=15, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        found.expect(fault.kind == "hang", f"{where}: the snippet does not end")
        return  # an environment that stops its process stops the snippet's too
    found.expect(
        again.returncode != 0 and "no fault this time" not in again.stdout, f"{where}: the snippet shows no fault: {again.stdout[-100:]}"
    )


LATE = "raises+nan+shape+reward_none+four+structure"
DEADLY = "+segfaults+exits+loops+sleeps+stops"


def late(how: Sequence[str], deadly: bool) -> Callable[[Found, Path], None]:
    """Faults one after the other, after the first ten seconds: each is mended, and costs one of the budget."""

    def work(found: Found, place: Path) -> None:
        faults = LATE + (DEADLY if deadly else "+sleeps")
        count = faults.count("+") + 1
        directory, notes = place / "run", place / "notes"
        notes.mkdir()
        with living(
            "train", f"{ZOO}:rare", *TINY, *how, *kwargs(faults=faults, directory=notes), "--env.step-timeout-seconds", "1",
            "--env.restart-budget", "20", "--stop.seconds", str(15 + 3 * count), "--run-dir", str(directory), "--json", cwd=place,
        ) as run:  # fmt: skip
            code, said, _ = answer(run)
            found.expect(code == 0, f"code {code}: {run.said[-300:]}")
        injected = sorted(path.name for path in notes.iterdir() if path.name != "begun")
        found.times = len(injected)
        found.expect(len(injected) == count, f"only {injected} came")
        told = [event["report"]["kind"] for event in events(directory, "environment_fault")]
        found.expect(len(told) == count - ("stops" in faults), f"told are {told}")
        ledger = said.get("ledger", {"produced": -1, "trained": 0, "dropped": {}, "in_flight": 0})
        found.expect(
            ledger["produced"] == ledger["trained"] + sum(ledger["dropped"].values()) + ledger["in_flight"], "the ledger does not balance"
        )
        back = [event for event in events(directory, "recovered") if event["role"] == "group" or event["role"] == "actor"]
        found.seconds = [event["seconds"] - event["restoring_seconds"] for event in back]

    return work


def budget(how: Sequence[str]) -> Callable[[Found, Path], None]:
    def work(found: Found, place: Path) -> None:
        notes = place / "notes"
        notes.mkdir()
        with living(
            "train", f"{ZOO}:rare", *TINY, *how, *kwargs(faults="raises+nan+four", directory=notes, every=1.0), "--env.restart-budget", "2",
            "--stop.seconds", "60", "--run-dir", str(place / "run"), "--json", cwd=place,
        ) as run:  # fmt: skip
            code, said, ended = answer(run)
        found.times = 1
        found.expect(code == 3, f"code {code}")
        found.expect(
            "this was fault 3, and env.restart_budget mends 2" in said.get("error", {}).get("message", ""), "the message does not say why"
        )
        found.seconds = [ended - float((notes / "3-four").read_text())]

    return work


ROWS = {
    **{
        f"environment/{name}": Row(
            fault.words, _wanted(name, fault), environment(name), (10.0, 10.0) if fault.kind != "hang" else (LIMIT_SECONDS + 1.0,) * 2
        )
        for name, fault in FAULTS.items()
    },
    **{
        f"late/{where}": Row(
            f"environment faults of {'eleven' if deadly else 'seven'} kinds, one after the other, late ({where})",
            "each is mended, counted and in the ledger", late(how, deadly), None,
        )
        for where, how, deadly in (
            ("ppo, 2 actors", PLACES["ppo, 2 actors"], True), ("appo, 2 actors", PLACES["appo, 2 actors"], True),
            ("appo in threads", PLACES["appo in threads"], True), ("ppo, 0 actors", PLACES["ppo, 0 actors"], False),
        )
    },
    **{
        f"budget/{where}": Row(f"a third environment fault, with a budget of two ({where})", "code 3, which says so", budget(how), (10.0, 10.0))
        for where, how in PLACES.items() if where in ("ppo, 2 actors", "appo, 0 actors")
    },
}  # fmt: skip
