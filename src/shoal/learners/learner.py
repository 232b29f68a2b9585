"""The learner: turns rollouts into updates and publishes weights.

consumes    orders: the slots of one update, in the order in which they are trained
waits for   nothing; it is called
unblocks    whoever waits for the slots (they are free once `consume` returns) and for the next policy version
on failure  DivergedError after repeated updates without a finite gradient, or where parameters are not finite, which are then not
            published; otherwise it may die at any instant and be started from a checkpoint

One of several (algorithms/ranks.py) waits for the others in every update, and raises LostRank where one is gone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from shoal.algorithms.base import UpdateContext
from shoal.algorithms.ranks import ALONE, Ranks
from shoal.config import RunConfig, against_divergence
from shoal.errors import DivergedError, LearnersError
from shoal.experience.batch import Batch
from shoal.experience.envelope import Fate, Identity
from shoal.experience.ring import Ring
from shoal.learners.assemble import assemble
from shoal.learners.normaliser import ObservationNormaliser, RewardNormaliser
from shoal.learners.transfer import ways
from shoal.networks.acting import Acting
from shoal.networks.policy import named_tensors, weights_sha256
from shoal.streams import Purpose, stream
from shoal.types import Array, Arrays, EnvironmentSpec
from shoal.weights.board import WeightLayout

_DIVERGED_UPDATES = 10  # updates in a row without one finite optimizer step, those that made none at all left out
CHECK_EVERY = 10  # updates between two comparisons of what several learners hold


class WeightPublisher(Protocol):
    """The writing side of a weight board."""

    def begin(self, version: int) -> Array: ...
    def commit(self, version: int) -> None: ...


class Unpublished:
    """No board: of several learners only the first publishes."""

    def __init__(self, size: int) -> None:
        self._flat = np.empty(size, np.float32)

    def begin(self, version: int) -> Array:
        return self._flat

    def commit(self, version: int) -> None:
        """Nothing."""


@dataclass
class Consumed:
    """What `Learner.consume` took: the batch (None if nothing was left), and what became of each order's rollout at once."""

    batch: Batch | None
    groups: list[int]
    dropped: dict[Identity, Fate] = field(default_factory=dict)


class Learner:
    """Owns the policy being trained, its optimizer (inside the algorithm), and the running statistics.

    replayed: whether it learns from a replay.
    """

    replayed: ClassVar[bool] = False

    def __init__(
        self,
        config: RunConfig,
        spec: EnvironmentSpec,
        policy: Acting,
        algorithm: Any,
        ring: Ring,
        board: WeightPublisher,
        *,
        run_id: bytes,
        max_policy_lag: int,
        epoch: int = 0,
    ) -> None:
        self._config, self._policy, self._algorithm = config, policy, algorithm
        self._ring, self._board, self._run_id = ring, board, run_id
        self._max_lag, self._epoch = max_policy_lag, epoch
        self._layout = WeightLayout.of((n, tuple(t.shape)) for n, t in named_tensors(policy).items())
        self._staging, self._fetch = ways(next(iter(policy.parameters())).device, self._layout.size)
        groups, envs = config.sampling.groups or 1, config.sampling.group_size or 1
        self._observations = ObservationNormaliser(spec, policy.normalised) if config.policy.normalise_observations else None
        self._rewards = RewardNormaliser(groups, envs, config.algorithm.gamma) if config.policy.normalise_rewards else None
        self.version = 0
        self.env_steps = 0
        self._barren = 0
        self._ranks: Ranks = ALONE

    # ---- several learners ----------------------------------------------------------------------------------------
    def join(self, ranks: Ranks) -> None:
        """Learn as one of several from now on."""
        self._ranks = ranks
        self._algorithm.join(ranks)

    @property
    def rank(self) -> int:
        """Which of several it is."""
        return self._ranks.rank

    def leave(self) -> None:
        """The others miss this one at once."""
        self._ranks.leave()

    @property
    def held_sha256(self) -> str:
        """Of all that several learners hold alike."""
        return self.weights_sha256

    def agree(self) -> None:
        """After an update: wait for the other learners, and see every CHECK_EVERY updates that all hold the same weights.

        Raises:
          LearnersError: they do not; all raise it.
        """
        if self._ranks.size == 1:
            return
        compared = self.version % CHECK_EVERY == 0
        held = torch.zeros(self._ranks.size, dtype=torch.int64)
        held[self._ranks.rank] = int(self.held_sha256[:15], 16) if compared else self.version
        self._ranks.sum(held)
        found = held.tolist()
        if len(set(found)) > 1:
            who = ", ".join(f"learner-{rank} {number:015x}" for rank, number in enumerate(found))
            raise LearnersError(
                f"after update {self.version} the learners do not hold the same weights ({who}): the memory of one is damaged, or the algorithm "
                "depends on what differs between processes (a clock, global random numbers)"
            )

    # ---- one update ----------------------------------------------------------------------------------------------
    @np.errstate(over="ignore", invalid="ignore")  # numbers beyond float32 become infinite, and show in loss and gradient
    def consume(self, orders: Sequence[tuple[int, Identity]]) -> Consumed:
        """Check and copy the rollouts of the next update. Their slots are free afterwards.

        What is too old is not trained: a rollout as a whole, but of one whose environments acted each on its own only the rows that are.
        """
        slots, dropped = [], {}
        for index, identity in orders:
            slot = self._ring.slots[index]
            slot.check(self._run_id, identity)
            slot.envelope["consumed_ns"] = time.monotonic_ns()
            oldest = self.version - self._max_lag
            if int(slot.envelope["version_min"]) < oldest and not (slot.envelope["paced"] and slot.timely(oldest).any()):
                dropped[identity] = Fate.OVER_LAG
            else:
                slots.append(slot)
        groups = [int(s.envelope["group"]) for s in slots]
        return Consumed(assemble(slots, self.version, self._max_lag, self._staging) if slots else None, groups, dropped)

    @np.errstate(over="ignore", invalid="ignore")
    def update(self, consumed: Consumed, optimizer_steps: int = 0) -> dict[str, float]:
        """One update: it makes the next policy version, which is published before this returns.

        optimizer_steps: of one that learns from a replay; how many others make is their algorithm's.
        """
        batch = consumed.batch
        assert batch is not None
        num_env_steps = batch.num_env_steps
        lag = batch.policy_lag_TN[batch.valid_TN]
        if self._rewards is not None:
            self._rewards(batch, consumed.groups)
        metrics = self._algorithm.update(self._staging.finish(batch), self._context())
        self._refuse_divergence(metrics)
        if self._observations is not None:
            self._observations.merge(batch)
            self._policy.set_statistics(self._observations.moments)
        self.version += 1
        self.env_steps += num_env_steps
        self.publish()
        counts = torch.bincount(lag, minlength=1).tolist() if len(lag) else []
        return {**metrics, **{f"lag/{i}": float(n) for i, n in enumerate(counts) if n}, "num_env_steps": float(num_env_steps)}

    def _context(self) -> UpdateContext:
        horizon = self._config.algorithm.schedule_env_steps or self._config.stop.env_steps
        progress = min(1.0, self.env_steps / horizon) if horizon else 0.0
        rng = stream(self._config.seed, Purpose.MINIBATCH, index=self.version, epoch=self._epoch)
        return UpdateContext(update=self.version, progress=progress, rng=rng)

    @property
    def _advice(self) -> str:
        return against_divergence(self._config, replayed=self.replayed)

    def _refuse_divergence(self, metrics: dict[str, float]) -> None:
        steps, skipped = metrics.get("optimizer_steps", 0.0), metrics.get("skipped_steps", 0.0)  # finite ones, and the others
        if steps or skipped:  # an update without any says nothing of the numbers: a replay's learner makes such between two others
            self._barren = 0 if steps else self._barren + 1
        if self._barren >= _DIVERGED_UPDATES:
            raise DivergedError(
                f"diverged: loss or gradient was not finite in {self._barren} updates in a row (update {self.version}); {self._advice}"
            )

    # ---- weights -------------------------------------------------------------------------------------------------
    def publish(self) -> None:
        """Put the current weights on the board as version `self.version`.

        Raises:
          DivergedError: they are not finite; nobody gets to see them.
        """
        flat = self._board.begin(self.version)
        views = self._layout.views(flat)
        if self._fetch is not None:
            np.copyto(flat, self._fetch(named_tensors(self._policy)))
        else:
            with torch.no_grad():
                for name, tensor in named_tensors(self._policy).items():
                    torch.from_numpy(views[name]).copy_(tensor)
        if not math.isfinite(np.dot(flat, flat)) and not np.isfinite(flat).all():  # the first is quick, and infinite also for what is large
            bad = [name for name, view in views.items() if not np.isfinite(view).all()]
            raise DivergedError(f"diverged: {', '.join(bad)} of version {self.version} are not finite; {self._advice}")
        self._board.commit(self.version)

    @property
    def weights_sha256(self) -> str:
        return weights_sha256(self._policy)

    @property
    def policy_arrays(self) -> Arrays:
        """The policy's tensors by name, copied."""
        return {n: t.detach().cpu().numpy().copy() for n, t in named_tensors(self._policy).items()}

    # ---- checkpoints ---------------------------------------------------------------------------------------------
    def get_state(self) -> tuple[Arrays, dict[str, Any]]:
        """Everything that the next update depends on: named arrays, and a JSON-able dict."""
        arrays: Arrays = {f"policy/{n}": a for n, a in self.policy_arrays.items()}
        arrays |= {f"algorithm/{n}": t.detach().cpu().numpy() for n, t in self._algorithm.get_state().items()}
        for name, part in (("observations", self._observations), ("rewards", self._rewards)):
            if part is not None:
                arrays |= {f"{name}/{k}": np.asarray(v) for k, v in part.get_state().items()}
        return arrays, {"version": self.version, "env_steps": self.env_steps}

    def set_state(self, arrays: Arrays, facts: dict[str, Any]) -> None:
        """Go on from `get_state`; publishes nothing."""

        def part(prefix: str) -> Arrays:
            return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

        with torch.no_grad():
            mine = part("policy/")
            for name, tensor in named_tensors(self._policy).items():
                tensor.copy_(torch.from_numpy(np.array(mine[name])))
        self._algorithm.set_state({n: torch.from_numpy(np.array(a)) for n, a in part("algorithm/").items()})
        if self._observations is not None:
            self._observations.set_state(part("observations/"))
        if self._rewards is not None:
            self._rewards.set_state(part("rewards/"))
        self.version, self.env_steps = int(facts["version"]), int(facts["env_steps"])
