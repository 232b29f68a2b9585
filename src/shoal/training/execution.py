"""What is around every training, wherever its roles run: its lock, its recorder, the user's signals, and what an end leaves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shoal.config import RunConfig
from shoal.engines.elsewhere import Elsewhere
from shoal.environments.make import check_registered
from shoal.errors import ConfigError, RunError, ShoalError, StorageError, TooFewNodesError
from shoal.files import CheckpointDirectory, write_text_atomically
from shoal.locks import lock_run
from shoal.monitoring.live import View, open_view
from shoal.monitoring.profile import TRACES, begin_profile, finish_profile
from shoal.monitoring.recorder import Callback, Recorder
from shoal.settings import named_secrets
from shoal.training.facts import known_facts
from shoal.training.outcome import interrupted
from shoal.training.preparing import Training
from shoal.training.processes import train_in_processes
from shoal.training.wishes import listening


def execute(
    config: RunConfig,
    objects: dict[str, Any],
    directory: Path,
    callbacks: Sequence[Callback],
    progress: View | None,
    profile: bool = False,
    discard: Callable[[], None] | None = None,
    elsewhere: Elsewhere | None = None,
) -> dict[str, Any]:
    """Train what is resolved, in a directory that is a run's; `objects` stand for what the configuration only names (env, network, algorithm).

    `discard` is called where a new run was refused before anything ran. `elsewhere` is where else it is kept. Returns the run's result.
    """
    elsewhere = elsewhere or Elsewhere()
    view = progress if progress is not None else open_view()
    with contextlib.ExitStack() as stack:
        if progress is None:
            stack.callback(view.close)
        stack.enter_context(lock_run(directory))
        known_facts(directory)  # damaged, it is refused before anything is changed
        checkpoints = CheckpointDirectory(directory / "checkpoints")
        loaded = checkpoints.newest_to_go_on(replay=config.checkpoint.replay) if checkpoints.paths() else None
        recorder = stack.enter_context(contextlib.closing(Recorder(config, directory, view, callbacks)))
        elsewhere.tell(recorder.event)
        if discard is None and loaded is None:
            recorder.event("warning", update=0, message="this run has no checkpoint: it begins again from the start")
        _warn_of_secrets(config, recorder)
        wishes = stack.enter_context(listening())
        traces = ""
        if profile:
            traces = _begin_profile(directory, recorder)
            stack.callback(_finish_profile, directory, traces, recorder)
        result = _train(Training(config, objects, directory, loaded, recorder, wishes, traces, elsewhere), discard)
        _keep(result, directory, recorder)
        recorder.finish(result)
        _finish_elsewhere(elsewhere, recorder)
    return result


def _warn_of_secrets(config: RunConfig, recorder: Recorder) -> None:
    """Of what stands in the run's files as it is. The texts are not shown."""
    for key in named_secrets(config.model_dump(mode="json", by_alias=True)):
        recorder.event(
            "warning",
            update=0,
            message=f"{key}: by its name a secret, and the run's files have it as it is (config.yaml, checkpoints, faults): let the environment read it from a "
            "variable or a file",
        )


def _train(training: Training, discard: Callable[[], None] | None) -> dict[str, Any]:
    """Returns the result. An error, or an end at once, is told, and nothing is left of a new run that never began."""
    recorder = training.recorder
    try:
        return _in_its_place(training)
    except ShoalError as error:
        if isinstance(error, (ConfigError, TooFewNodesError)) and discard is not None and not recorder.began:
            discard()
        recorder.failed(error)
        training.elsewhere.failed(recorder.event)
        raise
    except KeyboardInterrupt as interrupt:
        if discard is not None and not recorder.began:
            discard()
        interrupt.args = (interrupted(recorder, resumed=discard is None),)
        raise


def _in_its_place(training: Training) -> dict[str, Any]:
    if training.config.actors != 0:
        return train_in_processes(training)
    if "env" not in training.objects:
        check_registered(training.config.env)  # before torch is imported
    from shoal.training.here import train_here

    return train_here(training)


def _keep(result: dict[str, Any], directory: Path, recorder: Recorder) -> None:
    """The run is made all the same where this fails, and its checkpoint is whole."""
    try:
        write_text_atomically(directory / "result.json", json.dumps(result, indent=1))
    except RunError as error:
        recorder.event("warning", message=str(error))


def _finish_elsewhere(elsewhere: Elsewhere, recorder: Recorder) -> None:
    """Nothing of the run is lost where this fails: it is whole on this disk."""
    recorder.flush()
    try:
        elsewhere.finish(recorder.event)
    except StorageError as error:
        recorder.failed(error)
        raise
    except KeyboardInterrupt as interrupt:
        interrupt.args = (
            f"interrupted while the end of the run was copied to {elsewhere.url}: it is whole on this disk, and `shoal resume {elsewhere.url}` on this machine copies it",
        )
        raise


def _begin_profile(directory: Path, recorder: Recorder) -> str:
    """The directory for traces; "" where the disk refuses."""
    try:
        return str(begin_profile(directory).absolute())
    except OSError as error:
        recorder.event("warning", message=f"there will be no profile.json: {error.strerror or error} ({directory / TRACES})")
        return ""


def _finish_profile(directory: Path, traces: str, recorder: Recorder) -> None:
    """The run is made, whatever becomes of its profile."""
    try:
        if traces:
            finish_profile(directory)
    except (OSError, RunError, ValueError) as error:
        recorder.event("warning", message=f"profile.json could not be written ({error}); the traces are in {traces}")
