"""What `make bench-gpu` measures, on a machine with a GPU: Atari with the Nature CNN, and with IMPALA's residual one (`examples/residual_cnn.py`), with the
learner on the processor and on the GPU, actions chosen in the actors or by a server there, in float32 and bfloat16.

Every measurement is one training, of which the first fifth is left out. It is appended to `results/gpu.jsonl` as soon as it is there, so that a bench that
was cut off goes on with the next one. `results/gpu.md` is written from all of it.

    python benchmarks/gpu.py                              what is missing
    python benchmarks/gpu.py --rows 'residual/*'          some rows
    python benchmarks/gpu.py --again | --list | --table   measure anew | what there is, what is done | only the table
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rows import (
    ROOT,
    CommandError,
    Entry,
    Measurement,
    Store,
    chosen,
    code_line,
    codes,
    digest,
    line,
    measure_all,
    parser_of,
    where_and_when,
)

from shoal.benching.training import time_by_role, watched_training
from shoal.errors import ShoalError

Settings = dict[str, Any]

OWN = str(ROOT / "examples" / "residual_cnn.py")
NETWORKS: dict[str, Settings] = {
    "nature": {},
    "residual": {"policy.network": f"{OWN}:ResidualCNN"},
    "wide": {"policy.network": f"{OWN}:wide"},
}
GPU: Settings = {"device": "cuda", "policy.inference": "actor"}
SERVER: Settings = {"device": "cuda", "policy.inference": "server"}
BFLOAT16: Settings = {"learner.precision": "bfloat16"}
WAYS: dict[str, Settings] = {
    "processor": {"device": "cpu", "learner.threads": 8},
    "gpu": GPU,
    "gpu, server": SERVER,
    "gpu, server, bfloat16": SERVER | BFLOAT16,
}
SHAPE: Settings = {"sampling.groups": 28, "sampling.group_size": 8, "algorithm.minibatch_size": 1024}
ALGORITHMS: dict[str, Settings] = {
    "appo": {"algorithm": "appo", **SHAPE, "sampling.rollout_length": 32, "sampling.batch_rollouts": 8, "algorithm.epochs": 2},
    "ppo": {"algorithm": "ppo", **SHAPE, "sampling.rollout_length": 64},
}


@dataclass(frozen=True)
class Row:
    network: str
    algorithm: str
    way: str

    @property
    def name(self) -> str:
        return f"{self.network}/{self.algorithm}/{self.way}"

    def settings(self, seconds: float) -> Settings:
        return {"preset": "ALE", **NETWORKS[self.network], **ALGORITHMS[self.algorithm], **WAYS[self.way], "stop.seconds": seconds}


ROWS = (
    *(Row("nature", "appo", way) for way in WAYS),
    *(Row("residual", "appo", way) for way in WAYS if way != "processor"),
    *(Row("wide", "appo", way) for way in WAYS if way.startswith("gpu, server")),
    Row("nature", "ppo", "gpu, server"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__, "gpu")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each training (default: 15)")
    options = parser.parse_args(arguments)
    store = Store(options.results, "gpu", lambda entry: entry["row"], page)
    names = chosen((row.name for row in ROWS), options.rows)
    wanted = [
        Measurement(row.name, 0, row.name, digest(row.settings(options.seconds)), partial(measure, row, options), brief)
        for row in ROWS
        if row.name in names
    ]
    return measure_all(wanted, store, options)


def measure(row: Row, options: argparse.Namespace) -> Entry:
    try:
        run, watch = watched_training("ALE/Pong-v5", row.settings(options.seconds))
        speed = watch.env_steps_per_second()
    except ShoalError as error:
        raise CommandError(f"{row.name}: {error}") from error
    lag = run.result["lag"]["mean"]
    return {"row": row.name, "gpu": gpu(), "env_steps_per_second": speed, "time_by_role": time_by_role(watch), "lag": lag}


def gpu() -> str:
    """What the driver calls it."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "none"


def brief(entry: Entry) -> str:
    shares = "; ".join(f"{role}: {_shares(of)}" for role, of in entry["time_by_role"].items())
    return f"{entry['env_steps_per_second']:,.0f} env steps/s ({shares})"


def _shares(of: Mapping[str, float]) -> str:
    return ", ".join(f"{what} {share:.0f} %" for what, share in of.items() if share >= 0.5)


def page(store: Store) -> Iterator[str]:
    entries = list(store.entries.values())
    yield "# Atari with a GPU\n"
    yield "`make bench-gpu`: ALE/Pong-v5, learning included; 28 groups of 8 environments, one actor per core; APPO is async, PPO sync.\n"
    yield from where_and_when(entries)
    yield f"- GPU: {', '.join(dict.fromkeys(entry['gpu'] for entry in entries))}.\n"
    yield f"How each role spends its time is in percent of wall time. {code_line()}\n"
    yield line("network", "algorithm", "learner", "env steps/s", "learner", "server", "actors", "lag", "code")
    yield line(*("---",) * 9)
    for row in ROWS:
        if (entry := store.entries.get(row.name)) is None:
            continue
        shares = [_shares(entry["time_by_role"].get(role, {})) for role in ("learner", "inference-0", "actors")]
        speed, lag = f"{entry['env_steps_per_second']:,.0f}", f"{entry['lag']:.1f}"
        yield line(row.network, row.algorithm, row.way, speed, *shares, lag, codes([entry]))


if __name__ == "__main__":
    sys.exit(main())
