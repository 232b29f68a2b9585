"""A training whose roles run in processes: of this machine, or of a cluster's."""

from __future__ import annotations

import contextlib
from typing import Any

from shoal.engines.fleet import Fleet
from shoal.engines.local import LocalEngine
from shoal.environments.make import check_registered
from shoal.training.facts import run_id
from shoal.training.given import pickled
from shoal.training.outcome import is_evaluated, result_of
from shoal.training.preparing import Training, prepare


def train_in_processes(training: Training) -> dict[str, Any]:
    """Returns the result; no process is left."""
    config, directory, wishes = training.config, training.directory, training.wishes
    with contextlib.closing(LocalEngine(config, _fleet(training), directory, training.traces)) as engine:
        engine.open()
        if "env" not in training.objects:
            check_registered(config.env)  # while the helper process imports torch
        session, _ = prepare(training, engine.look(), engine.allocate)
        wishes.armed = True
        result = result_of(session, engine.run(session, wishes, wishes.take_asked), directory)
        wishes.armed = False
        path = session.checkpoint_path
        if path is not None and is_evaluated(config, result):
            result["evaluation"] = engine.evaluate(path)
        return result


def _fleet(training: Training) -> Fleet:
    """The processes of a run: on this machine, or on a cluster."""
    config, directory = training.config, training.directory
    name, objects = run_id(directory), pickled(training.objects)
    if config.engine == "local":
        return Fleet(config, objects, directory, name, training.traces)
    from shoal.engines.ray_fleet import RayFleet

    return RayFleet(config, objects, directory, name, training.traces, training.recorder.event)
