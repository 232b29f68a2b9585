"""What `make fuzz` runs: atheris on every decoder of tests/faults/decoders.py, one after the other, each in a process of its own.

    python benchmarks/fuzz.py                     all of them, 60 seconds each
    python benchmarks/fuzz.py --seconds 600 word  only these, longer

A crash (any error that is not the decoder's own), an input that takes longer than 10 s, and more than 2 GiB of memory end with 1 and leave the input
in benchmarks/results/fuzz/. The table is results/fuzz.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "fuzz.md"
TIMEOUT_SECONDS, MEMORY_MIB = 10, 2048
TRACED = ["shoal", "safetensors", "json"]  # whose coverage leads the way
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    if options.one:
        return fuzz_one(options.one, [*rest, *options.names])
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install -e '.[fuzz]'", file=sys.stderr)
        return 2
    from faults.decoders import examples

    known = list(examples())
    if unknown := set(options.names) - set(known):
        parser.error(f"no decoder {', '.join(unknown)}; there are {', '.join(known)}")
    rows = [fuzz(name, options.seconds) for name in options.names or known]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(report(rows)) + "\n")
    print(f"{RESULT.relative_to(ROOT)} is written")
    return int(any(row["found"] for row in rows))


def fuzz_one(name: str, rest: list[str]) -> int:
    """This process is the fuzzer (libFuzzer's arguments follow); it does not return."""
    import atheris

    with atheris.instrument_imports(include=TRACED):
        from faults.decoders import decoders
    decode = decoders(Path(tempfile.mkdtemp()) / "x")[name]
    atheris.Setup([sys.argv[0], *rest], decode)
    atheris.Fuzz()
    return 0


def fuzz(name: str, seconds: int) -> dict[str, object]:
    from faults.decoders import examples

    kept = RESULT.parent / "fuzz"
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(examples()[name]):
            (Path(corpus) / str(number)).write_bytes(content)
        command = [sys.executable, __file__, "--one", name, f"-max_total_time={seconds}", f"-timeout={TIMEOUT_SECONDS}"]
        command += [f"-rss_limit_mb={MEMORY_MIB}", f"-artifact_prefix={kept}/{name.replace(' ', '-')}-", "-print_final_stats=1", corpus]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": corpus + "-tmp"}
        Path(environment["TMPDIR"]).mkdir()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
        subprocess.run(["rm", "-rf", environment["TMPDIR"]], check=True)
    inputs = re.search(r"number_of_executed_units:\s*(\d+)", done.stderr)
    peak = re.search(r"peak_rss_mb:\s*(\d+)", done.stderr)
    slowest = re.search(r"slowest_unit_time_sec:\s*(\d+)", done.stderr)
    edges = re.findall(r"cov: (\d+)", done.stderr)
    found = [] if done.returncode == 0 else [path.name for path in kept.glob(f"{name.replace(' ', '-')}-*")] or ["no input was kept"]
    if found:
        print(done.stderr[-6000:], file=sys.stderr)
    row = {"name": name, "seconds": seconds, "inputs": int(inputs[1]) if inputs else 0, "edges": int(edges[-1]) if edges else 0,
           "slowest": int(slowest[1]) if slowest else 0, "peak": int(peak[1]) if peak else 0, "found": found}  # fmt: skip
    print(row, flush=True)
    return row


def report(rows: list[dict[str, object]]) -> list[str]:
    from importlib.metadata import version

    lines = ["# Fuzz: bytes from nowhere for everything that reads bytes", ""]
    lines.append(f"`make fuzz` (benchmarks/fuzz.py), {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, atheris {version('atheris')}.")
    lines += [
        f"Refused: any error but the decoder's own, more than {TIMEOUT_SECONDS} s for one input, more than {MEMORY_MIB} MiB in all.",
        "",
    ]
    lines += [
        "| decoder | seconds | inputs | edges covered | slowest input, s | peak memory, MiB | found |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [
        f"| {r['name']} | {r['seconds']} | {r['inputs']:,} | {r['edges']:,} | {'under 1' if not r['slowest'] else r['slowest']} | {r['peak']} "
        f"| {', '.join(map(str, r['found'])) if r['found'] else 'nothing'} |"  # type: ignore[arg-type]
        for r in rows
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
