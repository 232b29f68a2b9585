"""The tables of results in README.md, docs/guide.md and docs/scaling.md, made from what the benches wrote: no figure in them is entered by hand.

    python benchmarks/summary.py             writes them, each between its two markers
    python benchmarks/summary.py --print     shows them

Rows whose bench has not run are left out. Tests compare the pages with what this makes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import peers
import planned
import rows
import scaling
import soak_hosts
import speed
from rows import RESULTS, ROOT, Entry, day, from_to, line, loads, read

README, GUIDE, SCALING = ROOT / "README.md", ROOT / "docs" / "guide.md", ROOT / "docs" / "scaling.md"
NOTHING = "Not measured yet."


def entries(name: str) -> list[Entry]:
    """Rows of a bench in the order in which they were measured."""
    return list(read(RESULTS / f"{name}.jsonl"))


def newest(measured: Sequence[Entry], *keys: str) -> dict[tuple[Any, ...], Entry]:
    return {tuple(entry[key] for key in keys): entry for entry in measured}


def table() -> Iterator[str]:
    yield line("what", "result", "measured", "when and where")
    yield line(*["---"] * 4)
    yield from learning_lines()
    yield from peer_lines()
    if found := list(speed_lines()):
        yield ""
        yield line("speed", "figure", "wanted", "reached", "when and where")
        yield line(*["---"] * 5)
        yield from found


def learning_lines() -> Iterator[str]:
    """Of each environment and algorithm: evaluated return, steps and seconds, means over the seeds."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for (environment, algorithm, _), entry in newest(entries("learning"), "environment", "algorithm", "seed").items():
        found.setdefault((environment, algorithm), []).append(entry)
    for (environment, algorithm), seeds in found.items():
        mean = fmean(entry["evaluate"]["mean_return"] for entry in seeds)
        steps = fmean(entry["train"]["env_steps"] for entry in seeds)
        seconds = fmean(entry["wall_seconds"] for entry in seeds)
        many = f"{len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
        measured = f"{steps:,.0f} env steps, {seconds:,.0f} s ({many})"
        yield line(f"{environment}, {algorithm}", f"return {mean:.0f}", measured, circumstances(seeds))


def peer_lines() -> Iterator[str]:
    """Of each comparison with pairs enough for an answer: shoal's speed, and how many times the peer's it is."""
    for name, pairs in peers.pairs_of(rows.newest(entries("peers"), peers.key_of).values()).items():
        both = peers.compared(pairs)
        if len(both) >= peers.PAIRS:
            own, times = median(pair["shoal"] for pair in both), median(pair["ratio"] for pair in both)
            measured = f"{times:.1f} times ({len(both)} pairs)"
            yield line(name.replace(" / ", ", beside "), f"{own:,.0f} env steps/s", measured, circumstances(both))


def speed_lines() -> Iterator[str]:
    """Of each row of speed.py: its figure, its target, and whether it is reached."""
    for row, measured in speed.measured(newest(entries("speed"), "row", "seed").values()):
        figures = [entry["figures"] for entry in measured]
        yield line(row.name, row.figure(figures), row.target, row.answer(figures), circumstances(measured))


def circumstances(measured: Sequence[Entry]) -> str:
    """In short: dates, processors, and the load under which they were."""
    processors = dict.fromkeys(" with ".join(filter(None, (short(entry["machine"]["cpu"]), entry.get("gpu")))) for entry in measured)
    return f"{from_to(sorted(map(day, measured)))}, {' and '.join(processors)}, load {loads(measured)}"


def short(cpu: str) -> str:
    """A processor's name without marks and without the word that it is one."""
    return " ".join(re.sub(r"\(R\)|\(TM\)|\b(Processor|CPU)\b", " ", cpu).split())


def scaling_lines() -> Iterator[str]:
    """What was measured of clusters on one machine, and when and where."""
    found = rows.newest(entries("scaling"), lambda entry: (entry["row"], entry["seed"])).values()
    yield from _with_circumstances(list(found), scaling.lines)


def planned_lines() -> Iterator[str]:
    """Predictions beside those runs."""
    found = [entry for entry in newest(entries("planning"), "row", "seed").values() if entry["row"].startswith("scaling/")]
    yield from _with_circumstances(found, planned.cluster_lines)


def plan_lines() -> Iterator[str]:
    """1 to 10,000 nodes."""
    found = [entry for entry in newest(entries("planning"), "row", "seed").values() if entry["row"].startswith("table/")]
    yield from planned.table_lines(found) if found else [NOTHING]


def host_lines() -> Iterator[str]:
    """What is killed, cut, slowed and lost on several hosts, and what it costs."""
    found = rows.newest(entries("soak_hosts"), lambda entry: entry["row"]).values()
    yield from _with_circumstances([entry for entry in found if entry["row"] in soak_hosts.ROWS], soak_hosts.lines)


def _with_circumstances(found: Sequence[Entry], lines: Callable[[Iterable[Entry]], Iterator[str]]) -> Iterator[str]:
    if not found:
        yield NOTHING
        return
    yield f"{circumstances(found)}.\n"
    yield from lines(found)


PAGES: dict[Path, dict[str, Callable[[], Iterator[str]]]] = {
    README: {"results": table},
    GUIDE: {"hosts": host_lines},
    SCALING: {"scaling": scaling_lines, "predictions": planned_lines, "plan": plan_lines},
}


def written(text: str, page: Path = README) -> str:
    """`text` of a page with its tables in their places."""
    for name, lines in PAGES[page].items():
        begin, end = f"<!-- {name}: benchmarks/summary.py -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = before + begin + "\n".join(lines()) + "\n" + end + after
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="show the tables only")
    shown = parser.parse_args().print
    for page, tables in PAGES.items():
        if shown:
            print("\n\n".join("\n".join(lines()) for lines in tables.values()))
        else:
            page.write_text(written(page.read_text(encoding="utf-8"), page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
