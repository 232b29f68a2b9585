"""What follows where a process died, or the learner's numbers diverged: what becomes of its work, who is made anew, and where the run goes on.

an actor              its rollouts are made again
the inference server  it is asked again
a learner             the run goes back to its last checkpoint; several make the update again that was under way
the zygote            everybody is gone with it: as of a learner
"""

from __future__ import annotations

import time
from collections.abc import Callable

from shoal.engines.blame import Blame
from shoal.engines.ending import Ending
from shoal.engines.process import DEATHS_IN_A_ROW, Death, Process, back_off_seconds
from shoal.engines.running import Running
from shoal.engines.saves import Saves
from shoal.engines.starting import Starts
from shoal.errors import DivergedError, EnvironmentFault, ProcessError
from shoal.supervision.zygote import Lost


class Deaths:
    """hear: takes in what a process said."""

    def __init__(self, running: Running, starts: Starts, saves: Saves, end: Ending, blame: Blame, hear: Callable[[Process], None]) -> None:
        self._running, self._session, self._coordinator = running, running.session, running.coordinator
        self._fleet, self._recoveries = running.fleet, running.recoveries
        self._starts, self._saves, self._end, self._blame, self._hear = starts, saves, end, blame, hear

    def bury(self, happened: list[Death | Lost]) -> None:
        """All that died together is heard for the last time and put away before anything follows from it."""
        for event in happened:
            if isinstance(event, Death):
                self._hear(event.process)
                event.process.ended()
        if lost := next((event for event in happened if isinstance(event, Lost)), None):
            self._lost_zygote(lost)  # and with it all that died
            return
        dead = [event for event in happened if isinstance(event, Death)]
        learner_lost = False
        for death in sorted(
            dead, key=lambda death: death.process.name != "actor"
        ):  # their rollouts are settled before anybody is made anew
            if not death.process.up and not (learner_lost and death.process.name == "learner"):  # else it was started anew with all others
                learner_lost = learner_lost or death.process.name == "learner"
                self._died(death)
        if not self._end.begun and any(death.process.name == "actor" for death in dead):
            self._starts.place()

    def _died(self, death: Death) -> None:
        process = death.process
        if process.name != "learner" and self._end.begun:
            return  # what it was making is in flight still, and ends as such
        if process.retired:
            for group in self._coordinator.groups_of(process.index):  # its node is lost: they move
                self._recoveries.lost("group", group, death.how, time.monotonic())
        if process.retired or process.dismissed:
            self._coordinator.lost(process.index)
            return
        if process.name == "learner" and self._running.divergence is not None:
            return  # it said why; all are made anew at once
        process.deaths += 1
        deaths = sum(each.deaths for each in self._fleet.learners) if process.name == "learner" else process.deaths
        process.not_before = time.monotonic() + back_off_seconds(deaths)
        self._session.restarts += 1
        self._session.observer.event("died", role=process.name, index=process.index, how=death.how, reason=death.why)
        self._recoveries.lost(process.name, process.index, death.why or death.how, time.monotonic())
        if process.name == "actor":
            self._actor_died(process, death)
        elif deaths >= DEATHS_IN_A_ROW:
            who, tail = "the learner" if process.name == "learner" else "the inference server", self._fleet.log_tail(process)
            raise ProcessError(f"{who} died {DEATHS_IN_A_ROW} times without an update in between, the last {death.how}.\n{tail}")
        elif process.name == "learner":
            self._replace_learners()
        else:
            self._starts.server()

    def _actor_died(self, actor: Process, death: Death) -> None:
        lost = self._coordinator.lost(actor.index, self._blame.of_death(actor, death))
        if actor.gone_for_good:
            self._session.observer.event("actor_gone", index=actor.index, how=death.how)
        if all(a.gone_for_good for a in self._fleet.actors):
            raise EnvironmentFault(
                f"environment {self._session.config.env.id}: every actor died {DEATHS_IN_A_ROW} times without finishing a rollout, "
                f"the last {death.how} (making {lost[:1] or 'nothing'}).\n{self._fleet.log_tail(actor)}",
                {"how": death.how},
            )

    def _replace_learners(self) -> None:
        """One is lost. Where others go with it, and the run does not end, all begin again at the last update that was told, and nothing else is
        lost: the slots of the update that was under way hold its rollouts still."""
        if self._running.kept is None or self._end.begun:
            self._return_to_checkpoint()
            return
        others = self._fleet.end_learners("another learner is lost")
        self._saves.abandon()
        if not any(isinstance(event, Lost) for event in others):
            self._starts.learners()
        self.bury(others)

    def _return_to_checkpoint(self) -> None:
        """The learner is lost, or its numbers: everything goes back to the last checkpoint, all roles are made anew."""
        lost = self._fleet.stop_all("the run goes back to its last checkpoint")
        if lost is not None:
            self._lost_zygote(lost)
            return
        self._begin_again()

    def mend(self, error: DivergedError) -> None:
        """Once: back to the last good checkpoint, from which other random numbers lead another way."""
        self._session.epoch += 1
        self._session.observer.event("diverged", message=str(error))
        self._return_to_checkpoint()
        self._running.divergence = None

    def _lost_zygote(self, lost: Lost) -> None:
        reason: str | None = lost.reason
        while reason is not None:
            self._session.observer.event("died", role="zygote", index=0, how=reason, reason="")
            self._session.restarts += 1
            self._recoveries.lost("learner", 0, f"the helper process is gone: {reason.splitlines()[0]}", time.monotonic())
            self._running.zygote_deaths += 1
            if self._running.zygote_deaths >= DEATHS_IN_A_ROW:
                raise ProcessError(f"the helper process died {DEATHS_IN_A_ROW} times; the last: {reason}")
            time.sleep(back_off_seconds(self._running.zygote_deaths))  # there is nobody to hear
            try:
                self._fleet.reopen()
                reason = None
            except ProcessError as error:  # this one died while it was starting
                reason = str(error)
        self._begin_again()

    def _begin_again(self) -> None:
        self._saves.abandon()
        self._recoveries.forget("actor", "group", "inference")
        self._session.return_to_checkpoint()
        self._running.reason, self._running.at_checkpoint, self._running.kept = None, True, None
        self._end.begun = False
        self._starts.everybody()
