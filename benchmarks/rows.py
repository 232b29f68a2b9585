"""What the benches share: measurements that are made one after the other, kept as JSON lines as soon as they are there, and a table made of them.

A bench that was cut off goes on with the next measurement; what was measured with other settings is measured again. What was measured of other code stays
until `--again`: the code is a column of the table, and `--list` says it.

    python benchmarks/BENCH.py                          what is missing
    python benchmarks/BENCH.py --rows 'A/*' --again     some rows, anew
    python benchmarks/BENCH.py --list | --table         what there is, what is done | only the table
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from shoal.benching.measuring import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHOAL = str(Path(sys.executable).with_name("shoal"))
COMMAND_SECONDS = 3600.0

Entry = dict[str, Any]


class CommandError(Exception):
    """A command failed; the message holds its last words."""


def shoal(arguments: Sequence[str], timeout_seconds: float = COMMAND_SECONDS) -> dict[str, Any]:
    """Run a command of shoal in a process of its own and return its JSON object. Raises CommandError."""
    return answer_of([SHOAL, *arguments], timeout_seconds)


def answer_of(command: Sequence[str], timeout_seconds: float = COMMAND_SECONDS) -> dict[str, Any]:
    """Run a command in the checkout and return the JSON object on its standard output. Raises CommandError, also where it takes too long."""
    said = " ".join(command)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=timeout_seconds)
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"{said} was ended after {timeout_seconds:g} s") from error
    if done.returncode != 0:
        raise CommandError(f"{said} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        raise CommandError(f"{said} answered with no JSON object:\n{done.stdout[-2000:]}") from error
    return answer


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """A directory for a run, which is removed once it is measured."""
    path = Path(tempfile.mkdtemp(prefix="shoal-bench-", dir=directory.resolve()))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# ---- when, where, of what --------------------------------------------------------------------------------------------
def circumstances() -> Entry:
    """When and where a measurement is made; `load` is the machine's mean over five minutes, the bench's own part included."""
    return {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "load": round(os.getloadavg()[1], 2)}


def where_and_when(entries: Sequence[Entry]) -> Iterator[str]:
    """The lines on machines and dates that every table begins with."""
    for text in sorted({json.dumps(entry["machine"], sort_keys=True) for entry in entries}):
        m = json.loads(text)
        yield f"- Machine: {m['cpu']}, {m['cores']} cores; torch {m['torch']}, Python {m['python']}."
    yield f"- Date: {from_to(sorted(map(day, entries))) if entries else 'nothing measured yet'}.\n"


def day(entry: Entry) -> str:
    """Old rows of peers.py say it to the second."""
    return str(entry["date"] if "date" in entry else entry["measurement"][:10])


def loads(entries: Iterable[Entry]) -> str:
    """The least and the largest load under which some measurements were made."""
    return from_to([f"{load:.1f}" for load in sorted(entry["load"] for entry in entries)])


def from_to(texts: Sequence[str]) -> str:
    """`first to last`; one of them where they are alike."""
    return " to ".join(dict.fromkeys((texts[0], texts[-1])))


def digest(settings: Any) -> str:
    """A short name for settings (JSON-able), so that figures of other settings are not mistaken for these."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code_digest(source: Path = ROOT / "src") -> str:
    """A short name for the code that is measured: of every Python file's name and content."""
    digests = [(str(path.relative_to(source)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(source.rglob("*.py"))]
    return digest(digests)[:8]


def code_line() -> str:
    """What a table's column `code` says."""
    return f"Code is a digest of `src/` as it was measured; that of this table's day is {code_digest()}."


def codes(entries: Iterable[Entry]) -> str:
    """Of which code some measurements are; `unknown` where one does not say."""
    return ", ".join(dict.fromkeys(entry.get("code", "unknown") for entry in entries))


def line(*cells: Any) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


# ---- what was measured -----------------------------------------------------------------------------------------------
def read(path: Path) -> Iterator[Entry]:
    """The measurements of a file, in the order in which they were made. A line that was cut off is left out, and said."""
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry: Entry = json.loads(text)
        except ValueError:
            print(f"{path}: a line is cut off and is left out", file=sys.stderr)
        else:
            yield entry


def newest(entries: Iterable[Entry], key: Callable[[Entry], Hashable]) -> dict[Hashable, Entry]:
    """Of each key the entry that came last, in the order in which those were made."""
    found: dict[Hashable, Entry] = {}
    for entry in entries:
        found.pop(key(entry), None)
        found[key(entry)] = entry
    return found


class Store:
    """`STEM.jsonl`, one measurement a line, the newest of its key counting; and `STEM.md`, made of it by `page`."""

    def __init__(self, directory: Path, stem: str, key: Callable[[Entry], Hashable], page: Callable[[Store], Iterable[str]]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self.table_path = directory / f"{stem}.jsonl", directory / f"{stem}.md"
        self._key, self._page = key, page
        self.entries = newest(read(self.path), key)

    def append(self, entry: Entry) -> None:
        cut_off = self.path.exists() and not self.path.read_bytes().endswith(b"\n") and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_off else "") + json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries = newest([*self.entries.values(), entry], self._key)

    def write_table(self) -> None:
        self.table_path.write_text("\n".join(self._page(self)) + "\n", encoding="utf-8")


# ---- one bench -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Measurement:
    """One thing to measure, once.

    Attributes:
      row: its row, as `--rows` names it; several measurements of a row differ in `seed`.
      key: as the store's key of its entry.
      settings: digest of all that the figures depend on, the code apart.
      measure: returns the entry, `settings`, code and circumstances apart. Raises CommandError.
      brief: an entry in a few words.
    """

    row: str
    seed: int
    key: Hashable
    settings: str
    measure: Callable[[], Entry]
    brief: Callable[[Entry], str]

    @property
    def name(self) -> str:
        return f"{self.row} seed {self.seed}"

    def is_in(self, store: Store) -> bool:
        """Whether it was made under today's settings. An entry that does not say them has them in its key."""
        entry = store.entries.get(self.key)
        return entry is not None and entry.get("settings", self.settings) == self.settings

    def state(self, store: Store, today: str) -> str:
        """`to do`, or `done`, and of which code where that is not today's."""
        if not self.is_in(store):
            return "to do"
        code = codes([store.entries[self.key]])
        return "done" if code == today else f"done, of other code ({code}, today {today})"


def parser_of(description: str | None, stem: str) -> argparse.ArgumentParser:
    """The options that every bench has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="ROW", help="rows to measure; * and ? as in file names")
    parser.add_argument("--again", action="store_true", help="measure again what is there already")
    parser.add_argument("--list", action="store_true", help="say what is done and what is to do")
    parser.add_argument("--table", action="store_true", help="only write the table from what was measured")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"directory of {stem}.jsonl and {stem}.md")
    parser.add_argument(
        "--runs", type=Path, default=Path(tempfile.gettempdir()), help="directory for the runs, which are removed once measured"
    )
    return parser


def chosen(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those of `names` that a pattern matches. Exits with 2 where there is none."""
    names = list(names)
    found = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    if not found:
        print(f"no row is named {' or '.join(patterns)}; there are {', '.join(names)}", file=sys.stderr)
        sys.exit(2)
    return found


def measure_all(wanted: Sequence[Measurement], store: Store, options: argparse.Namespace) -> int:
    """Make what is wanted and missing, one after the other, and write the table after each. Returns the exit code: 1 if a command failed."""
    if options.list:
        today = code_digest()
        for one in wanted:
            print(f"{one.name}: {one.state(store, today)}")
        return 0
    failed = 0
    for one in () if options.table else wanted:
        if one.is_in(store) and not options.again:
            continue
        print(f"{one.name} ...", file=sys.stderr, flush=True)
        code = code_digest()  # as it is when the measurement begins
        try:
            entry = {**one.measure(), "settings": one.settings, "code": code, **circumstances()}
        except CommandError as error:
            failed += 1
            print(error, file=sys.stderr, flush=True)
            continue
        store.append(entry)
        print(f"{one.name}: {one.brief(entry)}", file=sys.stderr, flush=True)
        store.write_table()
    store.write_table()
    print(store.table_path.read_text(encoding="utf-8"))
    return 1 if failed else 0


def hold_all(wanted: Sequence[Measurement], store: Store, options: argparse.Namespace) -> int:
    """The same for rows that have to hold: 1 also where something was `wrong` with one of them."""
    code = measure_all(wanted, store, options)
    return max(code, int(any(one.is_in(store) and store.entries[one.key]["wrong"] for one in wanted)))
