"""`shoal check` in a process of its own: an environment that hangs, crashes or ends its process becomes a finding, too. No torch."""

from __future__ import annotations

import tempfile
import traceback
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal import errors
from shoal.config import RunConfig
from shoal.engines.question import OTHER_SECONDS, Answerer, Question
from shoal.errors import ConfigError, EnvironmentFault, ShoalError
from shoal.supervision.zygote import Zygote, wait_until_ready

if TYPE_CHECKING:
    from shoal.environments.findings import CheckReport
    from shoal.supervision.zygote_main import ChildContext

_PRELOAD = ["gymnasium", "shoal.environments"]


def check(config: RunConfig, pickled: bytes | None) -> CheckReport:
    """The report on `config.env`, or on the factory among the pickled objects. Takes at most env.step_timeout_seconds more than the
    environment's calls take.

    Raises:
      ConfigError: the environment cannot be found, or an extra is not installed. ProcessError: no process could be started.
    """
    from shoal.environments.checks import add_fault
    from shoal.environments.findings import CheckReport

    payload = {"config": config.model_dump(mode="json", by_alias=True)}
    with tempfile.TemporaryDirectory(prefix="shoal-check-") as directory:
        logs = Path(directory)
        with closing(Zygote.start(payload, pickled, _PRELOAD, log_path=logs / "zygote.log")) as zygote:
            wait_until_ready(zygote, OTHER_SECONDS)
            question = Question(zygote, config.env.id, config.env.step_timeout_seconds, logs)
            try:
                facts = question.ask("shoal.engines.checking:check_main", "check")
            except EnvironmentFault as fault:
                report = CheckReport.from_json(question.partial) if question.partial else CheckReport(config.env.id)
                add_fault(report, fault, question.played.call)
                return report
    if "error" in facts:
        kind = getattr(errors, facts["error"], ShoalError)
        raise kind(facts["message"])
    return CheckReport.from_json(facts)


def check_main(context: ChildContext) -> int:
    """The process that plays the environment."""
    from shoal.environments.checks import check_environment

    answerer = Answerer(context.channel)
    config = RunConfig.model_validate(context.payload["config"])
    factory = (context.unpickle() or {}).get("env")
    num_envs = (config.sampling.groups or 1) * (config.sampling.group_size or 1)
    answer: dict[str, Any]
    try:
        report = check_environment(
            config.env, factory, num_envs=num_envs, tell=answerer.tell, found=lambda report: answerer.answer(report.to_json(), last=False)
        )
        answer = report.to_json()
    except ConfigError as error:
        answer = {"error": "ConfigError", "message": str(error)}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": f"{error}\n{traceback.format_exc()}"}
    answerer.answer(answer)
    return 0
