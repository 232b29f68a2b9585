"""`shoal plan`: throughput, lag and bottleneck of a training on N nodes, what breaks first as N grows, and what would move it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.config import RunConfig
from shoal.errors import ConfigError
from shoal.planning.inputs import Asked, Measured, check_same, measured_of, read_costs, several_measured, systems
from shoal.planning.system import System
from shoal.settings import available_cores, resolve

if TYPE_CHECKING:
    from shoal.planning.levers import Move
    from shoal.planning.pipeline import Prediction

TABLE = (1, 10, 100, 1000, 10_000)
_BUSY = 0.5  # of the cores
_CLOSE = 1.05  # the size at which something breaks is looked for to 5 %
ALONE = (
    "the costs are of the parts alone, without a trial run (benches of before made none; it can also be too short): a run takes more, so the plan is too high. "
    "Measure anew: shoal bench costs ENV --json > FILE"
)
EXCHANGES = (
    "the costs are not of {0} learners: each is taken to learn an equal part in an equal part of the time, and to add up as long as it took where that was measured once. "
    "Measure anew: shoal bench costs ENV --learners {0} --json > FILE"
)


def plan(
    target: str,
    settings: Mapping[str, Any],
    asked: Asked,
    *,
    costs_file: Path | None = None,
    seconds: float = 10.0,
    told: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Predict the training that `shoal train TARGET` with these settings would be on each of `asked.sizes` nodes.

    Args:
      settings: as of a training on one node: `sampling.groups` and `actors` are those of each node.
      costs_file: an answer of `shoal bench costs --json`; None: they are measured here, for `seconds`.
    Returns:
      settings (its engine is that of the largest size), costs, links, driver, fit, way, rows (one for each size), breaks, warnings: see
      docs/performance.md.
    Raises:
      ConfigError: SimPy is missing, or the costs are of something else; otherwise as `shoal bench costs`.
    """
    _need_simulator()
    config, _ = resolve(target, settings)
    warnings: list[str] = []
    if costs_file is None:
        from shoal.benching.costs import bench_costs

        warnings += too_busy(os.getloadavg()[0], available_cores())  # before it is measured, which is load too

        alone = {
            key: value for key, value in settings.items() if key.partition(".")[0] not in ("engine", "ray")
        }  # costs are those of one machine
        measured = measured_of(bench_costs(target, alone, seconds=seconds, told=told), "shoal bench costs")
    else:
        measured = read_costs(costs_file)
    check_same(config, measured, "shoal bench costs" if costs_file is None else str(costs_file))
    if measured.trial is None:
        warnings.append(ALONE)
    if config.learners > 1 and not several_measured(config, measured):
        warnings.append(EXCHANGES.format(config.learners))
    return {**predict(config, measured, asked, told), "warnings": warnings}


def too_busy(load: float, cores: int) -> list[str]:
    """A warning where other programs keep half of the cores busy, as the load average of the last minute says."""
    if load < _BUSY * cores:
        return []
    return [
        f"the costs were measured while other programs kept this machine busy (load {load:.1f} on {cores} cores): they are too high, and the plan too low. Measure them "
        "while nothing else runs, or give --costs"
    ]


def _need_simulator() -> None:
    try:
        import simpy  # noqa: F401
    except ImportError:
        raise ConfigError("shoal plan simulates with SimPy, which is not installed: pip install 'shoal[plan]'") from None


def predict(config: RunConfig, measured: Measured, asked: Asked, told: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """The answer of `plan`, from costs that are known."""
    from shoal.planning.fitting import fit
    from shoal.planning.levers import moves
    from shoal.planning.pipeline import simulate

    rows, found = [], {}
    fitted = fit(measured)
    planned = {nodes: fitted.of(system) for nodes, system in systems(config, measured, asked).items()}
    for nodes, system in planned.items():
        told(f"plan: {nodes:,} node{'s' if nodes > 1 else ''}")
        prediction = simulate(system)
        found[nodes] = prediction.env_steps_per_second
        rows.append(_row(system, prediction, moves(system, prediction.env_steps_per_second, simulate)))
    told("plan: what breaks first")

    def sized(nodes: int) -> System:
        return fitted.of(systems(config, measured, replace(asked, sizes=(nodes,)))[nodes])

    first = next(iter(planned.values()))
    return {
        "settings": _described(config, measured, first, _engine(planned[max(planned)])),
        "costs": {**asdict(first.costs), "measured_on": measured.machine, "date": measured.date},
        "links": asdict(first.links),
        "driver": asdict(first.driver),
        "fit": None if measured.trial is None else asdict(fitted),
        "way": None if (way := next(reversed(planned.values())).way) is None else asdict(way),
        "rows": rows,
        "breaks": _breaks(sized, found),
    }


def _engine(system: System) -> str:
    return "local" if system.way is None else "ray"


def _described(config: RunConfig, measured: Measured, system: System, engine: str) -> dict[str, Any]:
    return {
        "env": config.env.id,
        "form": measured.settings.form,
        "algorithm": config.algorithm.name,
        "engine": engine,
        "mode": system.plan.mode,
        "cores": system.cores,
        "one_machine": system.one_machine,
        "actors": system.actors,
        "groups": system.groups_of_node,
        "group_size": system.plan.group_size,
        "rollout_length": system.plan.rollout_length,
        "batch_rollouts": config.sampling.batch_rollouts if system.plan.mode == "async" else None,
        "max_policy_lag": system.plan.max_policy_lag,
        "learners": system.learners,
        "learners_on": system.learners_on,
        "learner_threads": config.learner.threads,
    }


def _row(system: System, prediction: Prediction, found: list[Move]) -> dict[str, Any]:
    from shoal.planning.levers import SPOKEN, bottleneck, in_words

    most = bottleneck(found)
    return {
        "nodes": system.nodes,
        "engine": _engine(system),
        "learners": system.learners,
        "env_steps_per_second": prediction.env_steps_per_second,
        "env_steps_per_second_and_node": prediction.env_steps_per_second / system.nodes,
        "updates_per_second": prediction.updates_per_second,
        "batch_env_steps": system.batch_steps,
        "lag": {"mean": prediction.lag_mean, "max": prediction.lag_max},
        "over_lag": prediction.over_lag,
        "utilisation": prediction.utilisation,
        "learner_bytes": prediction.learner_bytes,
        "bottleneck": {"name": most.lever.name if most else None, "words": in_words(found, prediction.utilisation)},
        "moves": [move.to_json() for move in found if move.gain >= SPOKEN],
    }


# ---- what breaks first -----------------------------------------------------------------------------------------------
def _breaks(sized: Callable[[int], System], rates: Mapping[int, float]) -> dict[str, Any] | None:
    """The size at which a node gives less than half of what each gave at the smallest one: what bounds the run there, and how far the size moves
    with that made twice as good. None where there is no such size among those asked for."""
    from shoal.planning.levers import bottleneck, in_words, moves
    from shoal.planning.pipeline import simulate

    size = breaking_size(lambda nodes: simulate(sized(nodes)).env_steps_per_second, rates)
    if size is None:
        return None
    system = sized(size)
    prediction = simulate(system)
    found = moves(system, prediction.env_steps_per_second, simulate)
    most = bottleneck(found)
    answer = {"nodes": size, "name": None, "words": in_words(found, prediction.utilisation), "moved_to": None, "advice": ""}
    if most is None:
        return answer
    pull = most.lever.pull

    def moved(nodes: int) -> float:
        return simulate(pull(sized(nodes)) or sized(nodes)).env_steps_per_second

    later = {nodes: moved(nodes) for nodes in sorted({min(rates), size, *(nodes for nodes in rates if nodes > size)})}
    moved_to = breaking_size(moved, later, least=rates[min(rates)] / min(rates) / 2)
    return {**answer, "name": most.lever.name, "moved_to": moved_to, "advice": most.lever.advice}


def breaking_size(rate_of: Callable[[int], float], rates: Mapping[int, float], least: float | None = None) -> int | None:
    """The least number of nodes, to 5 %, at which each gives less than `least` (default: half of what it gives at the smallest of the sizes).

    Args:
      rates: env steps per second of all nodes by their number, known already; looked at between those that it lies between.
    """
    sizes = sorted(rates)
    wanted = rates[sizes[0]] / sizes[0] / 2 if least is None else least
    for low, high in pairwise(sizes):
        if rates[high] / high >= wanted:
            continue
        while high - low > 1 and high > low * _CLOSE:
            middle = min(high - 1, max(low + 1, round((low * high) ** 0.5)))
            if rate_of(middle) / middle < wanted:
                high = middle
            else:
                low = middle
        return high
    return None
