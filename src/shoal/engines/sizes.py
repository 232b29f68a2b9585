"""What a run needs of this machine's memory, said before anything is allocated. No torch.

Counted is what grows with the configuration: rollouts (with the copy that the learner makes of a batch), the replay and a batch drawn from it, and
weights. Environments, activations and the processes themselves come on top.
"""

from __future__ import annotations

import math

from shoal.config import ReplayConfig, RunConfig
from shoal.engines.plan import Plan
from shoal.errors import ConfigError
from shoal.experience.limiter import Rate
from shoal.experience.replay import Replay
from shoal.experience.replay_layout import Layout, check_learning_starts
from shoal.experience.schema import Schema, numpy_dtype
from shoal.machine import available_bytes, in_words

_DRAWN_BYTES = 36  # of a drawn row: return, discount, weight, name and two ages
_SUMMED_BYTES = 14  # of each step of its return: place, reward, flags and whether it stops
KEPT_COPIES = 6  # in memory that outlives several learners: twice parameters and two moments
LEARNER_COPIES = 7  # of all weights: parameters, gradient, two moments, two halves of the board, what a checkpoint copies


def rollout_bytes(schema: Schema) -> int:
    """Of one rollout; rows of ended episodes are sparse, and memory that nobody writes is not there."""
    return sum(math.prod(schema.full_shape(f)) * numpy_dtype(f.dtype).itemsize for f in schema.fields if f.axis != "final")


def batch_bytes(schema: Schema, replay: ReplayConfig, batch_size: int) -> int:
    """Of one batch drawn from a replay, with its observations as the float32 that networks take: the least that an optimizer step needs."""
    size = {f.name: (math.prod(f.shape), numpy_dtype(f.dtype).itemsize) for f in schema.fields if f.axis == "T+1" or f.name == "action"}
    action = math.prod(size.pop("action"))
    shown = sum(num * (itemsize + 4) for num, itemsize in size.values())
    made = action + _DRAWN_BYTES + _SUMMED_BYTES * (replay.n_step or 1)
    if replay.sequence_length is None:
        return batch_size * (2 * shown + made)
    return batch_size * ((replay.sequence_length + 1) * shown + replay.sequence_length * made)


def check_weights(num_weights: int, what: str) -> None:
    """Raise ConfigError where one set of float32 weights, as a learner holds them, does not fit."""
    needed, free = num_weights * 4 * LEARNER_COPIES, available_bytes()
    if free is not None and needed > free:
        raise ConfigError(
            f"{what}: {num_weights:,} weights need {in_words(needed)} of memory with gradient and optimizer; {in_words(free)} are free here"
        )


def rate_of(config: RunConfig, replay: ReplayConfig, batch_size: int) -> Rate:
    """How much of a replay is sampled; `replay` with the algorithm's defaults filled in."""
    sampling, samples_per_insert = config.sampling, replay.samples_per_insert or 0.0
    groups = sampling.groups or 1
    batch = (sampling.batch_rollouts or groups) * (sampling.group_size or 1) * sampling.rollout_length
    return Rate(samples_per_insert, batch_size, replay.learning_starts, replay.tolerance * samples_per_insert * batch)


def check_replay(plan: Plan, schema: Schema, replay: ReplayConfig) -> None:
    """Raise ConfigError where replay.capacity_bytes leaves room for less than learning waits for. `Replay` checks again once it has seen images."""
    check_learning_starts(Layout.likely(schema, plan.num_groups, replay), replay)


def check_memory(plan: Plan, schema: Schema, num_weights: int, actors: int, replay: ReplayConfig | None = None, learners: int = 1) -> None:
    """Raise ConfigError where rollouts, replay, a batch of it and weights do not fit; says what is needed, what is there, and which keys lower it.

    replay: of a run that has one. Images whose shape looks like a stack of frames are counted as such; `Replay` checks again once it has seen whether
    they are.
    """
    free = available_bytes()
    rollouts = rollout_bytes(schema) * (plan.num_slots + learners * plan.batch_rollouts)
    weights = num_weights * 4 * (learners * LEARNER_COPIES + (KEPT_COPIES if learners > 1 else 0) + actors)
    replayed = 0 if replay is None else Replay.size_bytes(schema, plan.num_groups, replay)
    drawn = 0 if replay is None or plan.rate is None else plan.rate.batch_size // replay.trained_rows
    drawn_bytes = 0 if replay is None else batch_bytes(schema, replay, drawn)
    if free is None or rollouts + replayed + drawn_bytes + weights <= free:
        return
    batch = "" if plan.mode == "sync" else f", {plan.batch_rollouts:,} rollouts of an update (sampling.batch_rollouts)"
    if plan.rate is not None and plan.slots_per_group > 2:
        batch += f", {plan.slots_per_group:,} of a group at once (replay.tolerance)"
    kept = (
        ""
        if replay is None
        else f"the replay (replay.capacity_steps {replay.capacity_steps:,}; replay.capacity_bytes) {in_words(replayed)}, "
        f"a batch of it (algorithm.batch_size {drawn:,}) {in_words(drawn_bytes)}, "
    )
    raise ConfigError(
        f"sampling: {plan.num_groups:,} groups (sampling.groups) of {plan.group_size:,} environments (sampling.group_size), "
        f"{plan.rollout_length:,} steps of a rollout (sampling.rollout_length){batch} need {in_words(rollouts)} of memory, {kept}and "
        f"{num_weights:,} weights (policy.hidden_sizes) in {actors + learners} processes {in_words(weights)}; {in_words(free)} are free here"
    )
