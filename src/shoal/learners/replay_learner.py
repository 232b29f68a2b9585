"""A learner that samples from a replay: rollouts go in, and each update makes as many optimizer steps as it is told.

consumes    orders: the slots of one update, which are free once `consume` returns
waits for   nothing; it is called
unblocks    whoever waits for the slots and for the next policy version
on failure  as learners/learner.py

One of several is dealt every N-th group: the rollouts of those go into its own replay, from which it draws its part of every batch. All are given
all orders, and count them.

Legend: M rows of a sample.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from shoal.algorithms.base import Means
from shoal.algorithms.off_policy import OffPolicyAlgorithm, SequenceRows, Transitions
from shoal.algorithms.ranks import said_by_all
from shoal.config import ReplayConfig, RunConfig
from shoal.experience.envelope import Identity
from shoal.experience.replay import Replay, Sample
from shoal.experience.replay_memory import OWN, Memory
from shoal.experience.ring import Ring
from shoal.experience.schema import numpy_dtype
from shoal.experience.sequences import SequenceSample
from shoal.learners.learner import Consumed, Learner, WeightPublisher
from shoal.networks.acting import Acting
from shoal.streams import Purpose, stream
from shoal.types import Array, Arrays, EnvironmentSpec, FieldSpec

_SAMPLED_BYTES = 2**22
_LARGEST = ("_max", "_p99")  # how names of ages end of which the largest of all learners is told


def field_bytes(field: FieldSpec) -> int:
    """Of one element."""
    return int(np.prod(field.shape, dtype=np.int64)) * numpy_dtype(field.dtype).itemsize


def part_of(replay: ReplayConfig, learners: int) -> ReplayConfig:
    """What one of several learners has of a replay."""
    if learners == 1:
        return replay
    most = replay.capacity_bytes
    return replay.model_copy(
        update={
            "capacity_steps": replay.capacity_steps // learners,
            "capacity_bytes": None if most is None else most // learners,
            "shards": 1,
        }
    )


@dataclass
class Inserted(Consumed):
    """What went into the replay, and what left it for that: env steps by group, and by policy lag when they went in."""

    num_env_steps: int = 0
    evicted: Counter[int] = field(default_factory=Counter)
    lag: Counter[int] = field(default_factory=Counter)


class ReplayLearner(Learner):
    """Attributes:
    replay: filled by `consume`, sampled by `update`; of several learners, this one's.
    """

    replayed: ClassVar[bool] = True

    def __init__(
        self,
        config: RunConfig,
        spec: EnvironmentSpec,
        policy: Acting,
        algorithm: OffPolicyAlgorithm[Any],
        ring: Ring,
        board: WeightPublisher,
        *,
        run_id: bytes,
        replay: ReplayConfig,
        epoch: int = 0,
        memory: Memory = OWN,
    ) -> None:
        """memory: where the replay's arrays are to lie."""
        super().__init__(config, spec, policy, algorithm, ring, board, run_id=run_id, max_policy_lag=0, epoch=epoch)
        learners, groups = config.learners, config.sampling.groups or 1
        self.replay = Replay(
            ring.schema, groups // learners, part_of(replay, learners),
            gamma=config.algorithm.gamma, dealt=learners, memory=memory, run=run_id.hex(),
        )  # fmt: skip
        self._settings, self._num_groups = replay, groups
        self._batch_size = algorithm.config.batch_size // learners  # its own part
        self._device = next(iter(policy.parameters())).device
        shown = sum(field_bytes(field) for field in ring.schema.fields if field.axis == "T+1")
        self._most_at_once = max(1, _SAMPLED_BYTES // (2 * shown * self._batch_size))  # batches of one draw, where priorities do not change
        self._last: Sample | SequenceSample | None = None  # whose memory the next draw takes: nobody needs it any more

    def consume(self, orders: Sequence[tuple[int, Identity]]) -> Inserted:
        """Check the rollouts and copy them into the replay. None is too old for it."""
        inserted = Inserted(None, [])
        self.replay.begin(self.version)
        for index, identity in orders:
            slot = self._ring.slots[index]
            mine = identity.group % self._ranks.size == self._ranks.rank
            if mine:
                slot.check(self._run_id, identity)
                slot.envelope["consumed_ns"] = time.monotonic_ns()
            num_rows = int(slot.envelope["num_rows"])
            lag = self.version - slot.arrays["policy_version"][:num_rows][slot.arrays["valid"][:num_rows]]
            inserted.lag.update(lag.tolist())
            if mine:
                inserted.evicted[identity.group] += self.replay.insert(slot, self.version)
            inserted.groups.append(identity.group)
            inserted.num_env_steps += int(slot.envelope["num_env_steps"])
        return inserted

    @np.errstate(over="ignore", invalid="ignore")
    def update(self, consumed: Consumed, optimizer_steps: int = 0) -> dict[str, float]:
        """One update: `optimizer_steps` from the replay as it is now (none before learning starts). It makes the next version."""
        assert isinstance(consumed, Inserted)
        held, all_sample = self._look_around(consumed)
        metrics = self._learn(optimizer_steps if all_sample else 0)
        self._refuse_divergence(metrics)
        self.version += 1
        self.env_steps += consumed.num_env_steps
        self.publish()
        counts = {f"lag/{lag}": float(count) for lag, count in consumed.lag.items()}
        counts |= {f"evicted/{group}": float(count) for group, count in consumed.evicted.items() if count}
        return {**metrics, **counts, **held, "num_env_steps": float(consumed.num_env_steps)}

    @property
    def held_sha256(self) -> str:
        held = hashlib.sha256(self.weights_sha256.encode())
        for vector in self._algorithm.vectors().values():
            held.update(vector.detach().cpu().numpy().tobytes())
        return held.hexdigest()

    def _look_around(self, inserted: Inserted) -> tuple[dict[str, float], bool]:
        """What the replays of all learners hold, and can hold, in env steps, and whether all of them can sample; `inserted.evicted` becomes what all
        evicted."""
        replay = self.replay
        held = {"replay/steps": float(replay.num_steps), "replay/capacity_steps": float(replay.capacity_steps)}
        if self._ranks.size == 1:
            return held, replay.can_sample
        evicted = [float(inserted.evicted[group]) for group in range(self._num_groups)]
        said = said_by_all(self._ranks, [*held.values(), float(replay.can_sample), *evicted])
        inserted.evicted = Counter(dict(enumerate(map(int, said[:, 3:].sum(0).tolist()))))
        return dict(zip(held, said[:, :2].sum(0).tolist(), strict=True)), bool(said[:, 2].all())

    def _learn(self, optimizer_steps: int) -> dict[str, float]:
        algorithm: OffPolicyAlgorithm[Any] = self._algorithm
        context = self._context()
        rng = stream(self._config.seed, Purpose.REPLAY, group=self._ranks.rank, index=self.version, epoch=self._epoch)
        beta = self._settings.beta + context.progress * (1.0 - self._settings.beta)
        taken, skipped = algorithm.steps
        means = Means()
        ages: list[tuple[Array, Array]] = []
        while optimizer_steps > 0:
            sample, parts = self._sample(optimizer_steps, rng, beta)
            ages.append((sample.age_updates_M, sample.age_steps_M))
            optimizer_steps -= len(parts)
            for rows in parts:
                before = algorithm.steps[1]
                metrics, priority_M = algorithm.learn(rows, context)
                if (
                    self._settings.prioritised and priority_M is not None and algorithm.steps[1] == before
                ):  # else no number is to be trusted
                    self.replay.update_priorities(sample.index_M, priority_M.detach().cpu().numpy())
                means.add(metrics)
        if not ages:
            return {"optimizer_steps": 0.0, "skipped_steps": 0.0}
        counted = {"optimizer_steps": algorithm.steps[0] - taken, "skipped_steps": algorithm.steps[1] - skipped}
        return {**self._of_all({**means.result(), **_ages(ages)}), **{name: float(count) for name, count in counted.items()}}

    def _of_all(self, metrics: dict[str, float]) -> dict[str, float]:
        """Means over all learners, who have as many rows each; of an age at its largest the largest."""
        if self._ranks.size == 1:
            return metrics
        said = said_by_all(self._ranks, list(metrics.values()))
        found = zip(metrics, said.mean(0).tolist(), said.amax(0).tolist(), strict=True)
        return {name: largest if name.endswith(_LARGEST) else mean for name, mean, largest in found}

    def _sample(
        self, optimizer_steps: int, rng: np.random.Generator, beta: float
    ) -> tuple[Sample | SequenceSample, list[Transitions] | list[SequenceRows]]:
        """What is drawn at once, and the batches of so many optimizer steps, or fewer, that it makes."""
        last = self._last
        if self._settings.sequence_length is not None:
            old = last if isinstance(last, SequenceSample) else None
            self._last = sequences = self.replay.sample_sequences(self._batch_size, rng, beta=beta, reuse=old)
            return sequences, [self._sequences(sequences, self._weigh(sequences, beta))]
        at_once = 1 if self._settings.prioritised else min(optimizer_steps, self._most_at_once)
        old_steps = last if isinstance(last, Sample) else None
        self._last = sample = self.replay.sample(at_once * self._batch_size, rng, beta=beta, reuse=old_steps)
        self._weigh(sample, beta)
        return sample, list(self._rows(sample, at_once))

    def _weigh(self, sample: Sample | SequenceSample, beta: float) -> float:
        """Of several learners: make importance weights relative to the largest of the whole batch. Returns the share of this learner's trained rows."""
        if self._ranks.size == 1 or not (isinstance(sample, SequenceSample) or self._settings.prioritised):
            return 1.0 / self._ranks.size
        rows = float(sample.valid_LM[sample.burn_in :].sum() if isinstance(sample, SequenceSample) else self._batch_size)
        least = self.replay.least_probability(sample.index_M)
        said = said_by_all(self._ranks, [least, rows])
        if self._settings.prioritised:
            sample.weight_M *= np.float32((least / float(said[:, 0].min())) ** -beta)
        return rows / max(1.0, float(said[:, 1].sum()))

    def _sequences(self, sample: SequenceSample, share: float = 1.0) -> SequenceRows:
        """The sample on the learner's device."""

        def moved(array: Array) -> torch.Tensor:
            return torch.from_numpy(array).to(self._device)

        return SequenceRows(
            burn_in=sample.burn_in,
            observation={name: moved(array) for name, array in sample.observation.items()},
            action_mask=None if sample.action_mask is None else moved(sample.action_mask),
            action=moved(sample.action),
            begins_L1M=moved(sample.begins_L1M),
            valid_LM=moved(sample.valid_LM),
            return_LM=moved(sample.return_LM),
            discount_LM=moved(sample.discount_LM),
            successor_LM=moved(sample.successor_LM),
            state={name: moved(array) for name, array in sample.state.items()},
            weight_M=moved(sample.weight_M),
            share=share,
        )

    def _rows(self, sample: Sample, parts: int = 1) -> Iterator[Transitions]:
        """The sample on the learner's device, in equal parts. Rows come in the order of their places in the replay, so each part takes every
        `parts`-th of them: a part is drawn from all of the replay, as the whole is."""

        def cut(array: Array) -> Sequence[torch.Tensor]:
            tensor = torch.from_numpy(array).to(self._device)
            if parts == 1:
                return (tensor,)
            return tensor.view(-1, parts, *tensor.shape[1:]).transpose(0, 1).contiguous().unbind(0)

        def cut_all(arrays: Arrays) -> list[dict[str, torch.Tensor]]:
            names = list(arrays)
            return [dict(zip(names, each, strict=True)) for each in zip(*(cut(arrays[name]) for name in names), strict=True)]

        return map(
            Transitions,
            cut_all(sample.observation),
            [None] * parts if sample.action_mask is None else cut(sample.action_mask),
            cut(sample.action),
            cut(sample.return_M),
            cut(sample.discount_M),
            cut_all(sample.next_observation),
            [None] * parts if sample.next_action_mask is None else cut(sample.next_action_mask),
            cut(sample.weight_M),
        )


def _ages(ages: Sequence[tuple[Array, Array]]) -> dict[str, float]:
    """How old what was sampled is, draw by draw: in updates since the policy that chose it, and in env steps since it went in."""
    found: dict[str, float] = {}
    for unit, each in (("updates", [updates_M for updates_M, _ in ages]), ("steps", [steps_M for _, steps_M in ages])):
        all_ages = np.concatenate(each)
        place = int(0.99 * (len(all_ages) - 1))
        p99 = np.partition(all_ages, place)[place]
        found |= {
            f"replay/age_{unit}_{name}": float(age) for name, age in (("mean", all_ages.mean()), ("p99", p99), ("max", all_ages.max()))
        }
    return found
