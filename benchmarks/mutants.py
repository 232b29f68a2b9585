"""What became of the mutants of the last `mutmut run`: a table per file, and every survivor as a diff (Markdown on standard output).

    make mutants        runs mutmut, then this; ends with code 1 where fewer than 90 % of the mutants died

A mutant dies when a test fails, or when it makes a test run for ever. `benchmarks/results/mutants.md` says why the survivors may live.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections import Counter
from pathlib import Path

KILLED = {1, 3, 37}
TIMED_OUT = {36, 24, -24, 152, 255}
NOT_RUN = None
WANTED = 0.9


def fate(code: int | None) -> str:
    """What an exit code of mutmut says of a mutant; no test at all, and a crash of the interpreter, are told as survivals."""
    if code is NOT_RUN:
        return "not run"
    return "killed" if code in KILLED else "timed out" if code in TIMED_OUT else "survived"


def read(root: Path) -> dict[str, dict[str, str]]:
    """By file, by mutant: its fate."""
    found = {}
    for path in sorted(root.rglob("*.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"]
        if codes:
            found[str(path.relative_to(root)).removesuffix(".meta")] = {name: fate(code) for name, code in codes.items()}
    return found


def table(found: dict[str, dict[str, str]]) -> tuple[list[str], float]:
    """Markdown rows, and the share of the mutants that died."""
    lines = ["| file | mutants | killed | timed out | survived | not run | died |", "| --- | --: | --: | --: | --: | --: | --: |"]
    total: Counter[str] = Counter()
    for file, mutants in [*found.items(), ("all", {})]:
        count = Counter(mutants.values()) if mutants else total
        total += count if mutants else Counter()
        run = count.total() - count["not run"]
        died = count["killed"] + count["timed out"]
        share = f"{died / run:.1%}" if run else "-"
        numbers = [count.total(), count["killed"], count["timed out"], count["survived"], count["not run"], share]
        lines.append(f"| {file} | " + " | ".join(map(str, numbers)) + " |")
    run = total.total() - total["not run"]
    return lines, (total["killed"] + total["timed out"]) / run if run else 0.0


def difference(name: str) -> str:
    """The mutant as the lines that it changes."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    with contextlib.redirect_stdout(io.StringIO()):
        text = str(get_diff_for_mutant(name))
    return "\n".join(line for line in text.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("mutants"), help="directory that mutmut worked in")
    root = parser.parse_args().root
    if root.parent != Path():
        import os

        os.chdir(root.parent)  # mutmut looks for its files from here
        root = Path(root.name)
    found = read(root)
    lines, share = table(found)
    print("\n".join(lines))
    for file, mutants in found.items():
        survivors = [name for name, what in mutants.items() if what == "survived"]
        if survivors:
            print(f"\n## {file}\n")
        for name in survivors:
            print(f"`{name}`\n```diff\n{difference(name)}\n```")
    print(f"\n{share:.1%} of the mutants died.", file=sys.stderr)
    return 0 if share >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
