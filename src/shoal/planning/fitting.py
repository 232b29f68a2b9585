"""The model is made to fit a trial (benching/trial.py): a short run that was made of the same training, where the costs were measured.

The parts alone say how the costs are divided and how they grow with sizes; the trial says how much a run takes in all. So a few factors are sought with which the
model, of the machine of the trial, keeps its actors and its learner as long at an env step as the trial did; what is left of an update in sync mode, in which neither
works, is a pause of each update. Then the model is moved to the machines that are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoal.config import RunConfig
from shoal.planning.inputs import Asked, Measured, Trial, systems
from shoal.planning.pipeline import Prediction, simulate
from shoal.planning.system import System

_ROUNDS = 20
_CLOSE = 0.002  # of a factor, beyond which a further round changes nothing


@dataclass(frozen=True)
class Fit:
    """What a run takes, beside its parts alone.

    Attributes:
      acting, learning, blocking: how many times as much work, learning, and the waits of environments take.
      update: seconds of the driver for each update; None: as without a trial. pause: seconds of each update in which nobody works, in sync mode.
    """

    acting: float = 1.0
    learning: float = 1.0
    blocking: float = 1.0
    update: float | None = None
    pause: float = 0.0

    def of(self, system: System) -> System:
        """The system with it."""
        costs = system.costs
        fitted = replace(
            costs,
            acting=self.acting * costs.acting,
            consume=self.learning * costs.consume,
            learning=self.learning * costs.learning,
            blocking=None if costs.blocking is None else self.blocking * costs.blocking,
        )
        driver = system.driver if self.update is None else replace(system.driver, update=self.update)
        return replace(system, costs=fitted, driver=driver, publish=self.learning * system.publish, pause=self.pause)


def fit(measured: Measured) -> Fit:
    """The factors with which the model makes the trial; none where there was no trial."""
    trial = measured.trial
    if trial is None:
        return Fit()
    system = trial_system(measured, trial)
    found = Fit(update=None if trial.update_us is None else 1e-6 * trial.update_us)
    if system.costs.blocking is not None and trial.acting_us:
        found = replace(found, acting=1e-6 * trial.acting_us / system.costs.acting)
    for _ in range(_ROUNDS):
        made = simulate(found.of(system))
        actors, learner = _times(trial.acting, trial, made, "actors"), _times(trial.learning, trial, made, "learner")
        grown = {"acting": found.acting * actors} if system.costs.blocking is None else {"blocking": found.blocking * actors}
        found = replace(found, learning=found.learning * learner, **grown)
        if max(abs(actors - 1.0), abs(learner - 1.0)) < _CLOSE:
            break
    return _with_pause(found, system, trial) if system.plan.mode == "sync" else found


def _times(share: float, trial: Trial, made: Prediction, role: str) -> float:
    """How many times as long as in the model a role was at an env step in the trial; 1 where one of them does not tell."""
    seen, modelled = share / trial.env_steps_per_second, made.utilisation[role] / made.env_steps_per_second
    return seen / modelled if seen and modelled else 1.0


def _with_pause(found: Fit, system: System, trial: Trial) -> Fit:
    """An update's time in which neither actors nor learner are at work: the driver's, as far as it is known, and else a pause.

    Where there is none, both were at work at once: whoever wakes another one and loses its core to it is at its own work meanwhile. So both take less.
    """
    seconds = system.batch_steps / trial.env_steps_per_second
    working = 1.0 / simulate(replace(found, update=0.0).of(system)).updates_per_second
    if working > seconds:
        less = seconds / working
        waits = found.blocking if system.costs.blocking is None else less * found.blocking
        return replace(found, acting=less * found.acting, learning=less * found.learning, blocking=waits, update=0.0)
    update = min(seconds - working, system.driver.update if found.update is None else found.update)
    return replace(found, update=update, pause=seconds - working - update)


def trial_system(measured: Measured, trial: Trial) -> System:
    """What the trial ran on, of the costs of the parts alone."""
    of = measured.settings
    config = RunConfig(mode=of.mode, max_policy_lag=trial.max_policy_lag, actors=trial.actors)
    sampling = config.sampling
    sampling.groups, sampling.group_size, sampling.rollout_length = of.groups, of.group_size, of.rollout_length
    sampling.batch_rollouts = max(1, of.batch_env_steps // (of.rollout_length * of.group_size))
    config.learner.threads = of.learner_threads
    return systems(config, measured, Asked(cores=measured.cores))[1]
