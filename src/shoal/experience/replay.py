"""The experience replay: steps of finished rollouts, kept for a long time and sampled again and again.

(Not the replay of a run, which is engines/replay.py: that re-executes updates from the log.)

It lives where the learner does. `insert` copies a rollout's rows (experience/placing.py says where to); `sample` draws steps by a sum tree
and makes their n-step returns there and then, from the rows that follow them. What is drawn is a function of the rollouts in their order
of insertion and of the generator, and of nothing else: not of shards, nor of a save and a load between.

With `config.sequence_length` it is sequences that are drawn (experience/sequences.py), and `sample` is not there.

Legend: M sampled steps, n steps of a return at most, B environments of a group, C columns (one for each environment of each group).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import ReplayConfig
from shoal.errors import CheckpointError, ConfigError
from shoal.experience.nstep import n_step
from shoal.experience.placing import BEGINS, STOP, TERMINATED, VALID, place
from shoal.experience.priorities import Priorities
from shoal.experience.replay_files import ReplayFiles
from shoal.experience.replay_layout import Layout, check_learning_starts
from shoal.experience.replay_memory import OWN, KeptMemory, Memory
from shoal.experience.replay_rows import Rows
from shoal.experience.replay_store import Store
from shoal.experience.ring import Slot
from shoal.experience.schema import Schema
from shoal.experience.sequences import SequenceSample, Starts, Window, window
from shoal.files import whole_state
from shoal.machine import available_bytes, in_words
from shoal.types import Array, Arrays


@dataclass
class Sample:
    """Sampled steps, in arrays of the caller's own.

    Attributes:
      observation: by field name, [M, ...] as the environment gave it. action_mask: bool [M, A], or None without masks.
      action: [M, ...] as stored in rollouts.
      return_M: float32, discounted rewards of the step and those after it, up to n, none beyond its episode's end.
      discount_M: float32, what the value of `next_observation` counts: gamma to the number of rewards summed; 0 where the episode terminated.
      next_observation: by field name, [M, ...]: what followed the last reward summed; of a truncated episode the true last observation.
      next_action_mask: bool [M, A] or None. All is allowed at an episode's true last observation, which comes without a mask.
      weight_M: float32, importance weights, 1 for the step that is sampled least; all 1 where sampling is uniform.
      index_M: int64, names of the steps for `update_priorities`.
      age_updates_M: int64, the learner's version at the last insertion less that of the policy that chose.
      age_steps_M: int64, env steps that were inserted after the step's own rollout.
    """

    observation: Arrays
    action_mask: Array | None
    action: Array
    return_M: Array
    discount_M: Array
    next_observation: Arrays
    next_action_mask: Array | None
    weight_M: Array
    index_M: Array
    age_updates_M: Array
    age_steps_M: Array


class Replay:
    """Steps of `num_groups` groups, the oldest of each environment making room for its newest.

    `config.prioritised` and `config.n_step` are what the run resolved; where they are None, sampling is uniform and of one step.
    Attributes:
      num_steps: steps that it holds within reach. inserted_steps, evicted_steps: over all time; the difference is num_steps.
    """

    def __init__(
        self,
        schema: Schema,
        num_groups: int,
        config: ReplayConfig,
        *,
        gamma: float,
        dealt: int = 1,
        memory: Memory = OWN,
        run: str | None = None,
    ) -> None:
        """One of `dealt` replays, to which the groups of a run are dealt in turn.

        Args:
          num_groups: its own. config: of this one, `capacity_*` too. memory: where its arrays are to lie; nobody else's.
          run: the id of whose it is, which its files are to say.
        Raises:
          ConfigError: the configuration leaves room for nothing.
        """
        self._schema, self._num_groups, self._config, self._gamma = schema, num_groups, config, gamma
        self._dealt, self._memory, self._run = dealt, memory, run
        self._n_step = config.n_step or 1
        self._likely_steps = Layout.likely(schema, num_groups, config).capacity_steps
        num_columns = num_groups * schema.num_envs
        self._newest_C = np.zeros(num_columns, np.int64)  # number of the row that holds the newest observation
        self._next_sequence_G = np.full(num_groups, -1, np.int64)
        self._version = 0
        self.inserted_steps = self.evicted_steps = 0
        self._files = ReplayFiles()
        self._ready = False  # memory is taken once the first rollout shows whether images are stacks

    @staticmethod
    def size_bytes(schema: Schema, num_groups: int, config: ReplayConfig) -> int:
        """Memory that it takes when full. Images whose shape looks like a stack of frames are counted as such."""
        return Layout.likely(schema, num_groups, config).size_bytes

    @property
    def num_steps(self) -> int:
        return self.inserted_steps - self.evicted_steps

    @property
    def capacity_steps(self) -> int:
        """Steps within reach when it is full; until the first rollout as `size_bytes` counts them."""
        return self._store.layout.capacity_steps if self._ready else self._likely_steps

    @property
    def can_sample(self) -> bool:
        """Whether there is anything to draw: a step, or a whole sequence."""
        return self._ready and self._priorities.tree.total > 0.0

    def _allocate(self, layout: Layout) -> None:
        """Raises ConfigError where it does not fit, or holds too little: both were counted before by the shapes of images alone."""
        if (free := available_bytes()) is not None and self._dealt * layout.size_bytes > free:
            raise ConfigError(self._too_large(layout, free))
        check_learning_starts(layout, self._config, self._dealt)
        self._take(layout)

    def _take(self, layout: Layout) -> None:
        config, num_envs, memory = self._config, self._schema.num_envs, self._memory
        alpha = config.alpha if config.prioritised else 0.0
        self._store = Store(layout, self._num_groups, num_envs, config.shards, memory)
        self._starts: Starts | None = None
        if config.sequence_length is not None:
            self._starts = Starts(layout, self._num_groups, num_envs, config, alpha, memory)
            self._priorities, self._written_C = self._starts.priorities, self._starts.written_C
        else:
            self._priorities, self._written_C = Priorities(len(self._newest_C), layout.num_rows, alpha, memory), self._newest_C
        self._ready = True

    def _too_large(self, layout: Layout, free: int) -> str:
        likely = Layout.likely(self._schema, self._num_groups, self._config)
        whole = sorted(likely.stacks.keys() - layout.stacks.keys())
        why = (
            f", since the first rollout does not show {', '.join(whole)} to be stacks of frames, which would take {in_words(self._dealt * likely.size_bytes)} "
            "(where they are and nothing moved yet, raise sampling.rollout_length)"
        )
        return (
            f"replay.capacity_steps {self._dealt * self._config.capacity_steps:,} takes {in_words(self._dealt * layout.size_bytes)} of memory"
            f"{why if whole else ''}; {in_words(free)} are free here: lower it, or say how much it may take with replay.capacity_bytes"
        )

    # ---- insertion -----------------------------------------------------------------------------------------------
    def insert(self, slot: Slot, version: int) -> int:
        """Copy a finished rollout; its slot is free afterwards. `version` is the learner's now. Returns the env steps that made room.

        Rollouts of a group come in the order of their sequences. Where one is missing, or where an environment stands elsewhere than
        it stood, no return is summed across the gap, and the step before it bootstraps from its own successor.

        Raises ConfigError at the first one where the memory is not there.
        """
        if not self._ready:
            self._allocate(Layout.of(slot, self._num_groups, self._config))
        store, group, num_envs = self._store, int(slot.envelope["group"]) // self._dealt, self._schema.num_envs
        newest_B = self._newest_C[group * num_envs : (group + 1) * num_envs]
        goes_on_B = np.zeros(num_envs, np.bool_)
        if int(slot.envelope["sequence"]) == self._next_sequence_G[group]:
            goes_on_B = store.goes_on(slot, group, newest_B)
        begins_B = (store.rows.take("flags", store.places(group, newest_B)) & BEGINS) > 0
        placed = place(slot, goes_on_B, newest_B, begins_B, store.layout.stacks)

        gone, evicted = store.make_room(group, newest_B, placed.end_B)
        store.join(slot, group, newest_B, goes_on_B)
        self.inserted_steps += int(slot.envelope["num_env_steps"])
        store.write(slot, group, placed, self.inserted_steps)
        newest_B[:] = placed.end_B
        self._next_sequence_G[group] = int(slot.envelope["sequence"]) + 1
        self._version = version

        step_T1B = (placed.flags_T1B & VALID) > 0
        kept_T1B = step_T1B & (placed.row_T1B >= placed.end_B - store.layout.reach)
        if self._starts is None:
            self._priorities.clear(gone)
            self._priorities.enter(store.places(group, placed.row_T1B)[kept_T1B])
        else:
            self._starts.add(slot, group, placed.row_T1B[0], goes_on_B)
            self._enter_sequences(self._starts, group, newest_B)
        evicted += int(np.count_nonzero(step_T1B)) - int(np.count_nonzero(kept_T1B))
        self.evicted_steps += evicted
        return evicted

    def _enter_sequences(self, starts: Starts, group: int, newest_B: Array) -> None:
        """Those that have become whole and have a step to train can be drawn from now on."""
        start_M, row_M = starts.waiting(group, newest_B, self._store.layout.reach)
        if len(start_M):
            env_M = start_M // starts.rows.num_rows - group * self._schema.num_envs
            place_L1M = self._store.after(self._store.place(group, env_M, row_M), np.arange(starts.length + 1)[:, None])
            valid_LM = self._window(place_L1M).valid_LM
            self._priorities.enter(start_M[valid_LM[starts.burn_in :].any(axis=0)])

    def _window(self, place_L1M: Array) -> Window:
        rows = self._store.rows
        flags_L1M, gap_LM, reward_LM = rows.take("flags", place_L1M), rows.take("gap", place_L1M[:-1]), rows.take("reward", place_L1M[:-1])
        return window(flags_L1M, gap_LM, reward_LM, self._n_step, self._gamma)

    # ---- sampling ------------------------------------------------------------------------------------------------
    def sample(self, num: int, rng: np.random.Generator, *, beta: float, reuse: Sample | None = None) -> Sample:
        """Draw `num` steps, one from each `num`-th part of the sum of priorities (stratified, with repetition).

        Args:
          beta: exponent of the importance weights.
          reuse: a sample that nobody needs any more: its observations are written again instead of taking new memory, which for images
            costs as much as all the rest.
        Raises:
          ValueError: there is no step yet, or it is sequences that this replay is for.
        """
        place_M = self._draw(num, rng, sequences=False)
        store, every_M = self._store, np.arange(num)
        following_nM = store.after(place_M, np.arange(self._n_step)[:, None])
        flags_nM = store.rows.take("flags", following_nM)
        found = n_step(store.rows.take("reward", following_nM), (flags_nM & STOP) > 0, self._gamma)
        last_M = following_nM[found.length_M - 1, every_M]
        goes_on_M = (flags_nM[found.length_M - 1, every_M] & TERMINATED) == 0
        next_M = store.after(last_M, store.rows.take("gap", last_M).astype(np.int64) + 1)
        return Sample(
            observation=store.observation(place_M, reuse.observation if reuse else None),
            action_mask=store.action_mask(place_M),
            action=store.rows.take("action", place_M),
            return_M=found.return_M,
            discount_M=(found.discount_M * goes_on_M).astype(np.float32),
            next_observation=store.observation(next_M, reuse.next_observation if reuse else None),
            next_action_mask=store.action_mask(next_M),
            weight_M=self._priorities.weight(place_M, beta),
            index_M=self._priorities.name(place_M, self._written_C),
            age_updates_M=self._version - store.rows.take("policy_version", place_M),
            age_steps_M=self.inserted_steps - store.rows.take("inserted", place_M),
        )

    def sample_sequences(self, num: int, rng: np.random.Generator, *, beta: float, reuse: SequenceSample | None = None) -> SequenceSample:
        """Draw `num` sequences as `sample` draws steps. Raises ValueError where none is whole yet, or where it is steps that are drawn."""
        start_M = self._draw(num, rng, sequences=True)
        store, starts = self._store, self._starts
        assert starts is not None
        num_rows = store.layout.num_rows
        first_M = start_M // starts.rows.num_rows * num_rows + starts.rows.take("row", start_M) % num_rows
        place_L1M = store.after(first_M, np.arange(starts.length + 1)[:, None])
        place_LM = place_L1M[:-1]
        flags_L1M, found = store.rows.take("flags", place_L1M), self._window(place_L1M)
        return SequenceSample(
            burn_in=starts.burn_in,
            observation=store.observation(place_L1M, reuse.observation if reuse else None),
            action_mask=store.action_mask(place_L1M),
            action=store.rows.take("action", place_LM),
            begins_L1M=(flags_L1M & BEGINS) > 0,
            valid_LM=found.valid_LM,
            return_LM=found.return_LM,
            discount_LM=found.discount_LM,
            successor_LM=found.successor_LM,
            state=starts.state(start_M),
            weight_M=self._priorities.weight(start_M, beta),
            index_M=self._priorities.name(start_M, self._written_C),
            age_updates_M=self._version - store.rows.take("policy_version", first_M),
            age_steps_M=self.inserted_steps - store.rows.take("inserted", first_M),
        )

    def _draw(self, num: int, rng: np.random.Generator, *, sequences: bool) -> Array:
        if sequences != (self._config.sequence_length is not None):
            raise ValueError(
                "this replay is for " + ("steps: set replay.sequence_length" if sequences else "sequences: call sample_sequences")
            )
        if not self.can_sample:
            raise ValueError(f"nothing can be sampled yet: {self.num_steps} env steps are in the replay")
        return self._priorities.draw(num, rng)

    def least_probability(self, index_M: Array) -> float:
        """With which that of these is drawn which is drawn least. They were sampled, and their priorities are as they were then."""
        tree = self._priorities.tree
        return float(tree.leaves[index_M % tree.num_leaves].min() / tree.total)

    def update_priorities(self, index_M: Array, priority_M: Array) -> None:
        """Give what was sampled new priorities (before the exponent alpha); those evicted meanwhile are ignored.

        Raises:
          SchemaError: a priority is negative or not finite.
        """
        self._priorities.update(index_M, priority_M, self._written_C)

    # ---- checkpoints ---------------------------------------------------------------------------------------------
    def save(self, directory: Path, previous: Path | None) -> None:
        """Write its files into a directory of a checkpoint in the making. Raises OSError where the disk refuses.

        Rows are in files of fixed ranges of positions; one that did not change since it was saved to `previous` (or loaded from there)
        is linked instead of written. The rest is small and always written.
        """
        arrays, facts = self._get_state()
        whose = {} if self._run is None else {"run": self._run}
        priorities = self._priorities.get_state() if self._ready else {}
        self._files.save(directory, previous, facts | whose, arrays | priorities, self._parts())

    @property
    def next_sequences(self) -> list[int]:
        """By group, the sequence of the rollout that follows what went in last; -1 where none went in yet."""
        return [int(sequence) for sequence in self._next_sequence_G]

    def _parts(self) -> dict[str, Rows]:
        if not self._ready:
            return {}
        return {"rows": self._store.rows} | ({"starts": self._starts.rows} if self._starts else {})

    def _get_state(self) -> tuple[Arrays, dict[str, Any]]:
        """Everything but rows and priorities."""
        facts: dict[str, Any] = {"inserted": self.inserted_steps, "evicted": self.evicted_steps, "version": self._version, "layout": None}
        if not self._ready:
            return {}, facts
        layout = self._store.layout
        facts["layout"] = {"num_rows": layout.num_rows, "axes": {name: stack.axis for name, stack in layout.stacks.items()}}
        starts = self._starts.get_state() if self._starts else {}
        return {"newest_C": self._newest_C, "next_sequence_G": self._next_sequence_G, **starts}, facts

    def _set_state(self, arrays: Arrays) -> None:
        self._newest_C[:], self._next_sequence_G[:] = arrays["newest_C"], arrays["next_sequence_G"]
        if self._starts is not None:
            self._starts.set_state(arrays)

    def load(self, directory: Path) -> None:
        """Go on from `save`, bit for bit; the number of shards may be another. Every byte is checked before it is used.

        Raises:
          CheckpointError: it is of another run, a file is missing or damaged, or was saved under other settings of the replay.
        """
        facts, arrays = self._files.read_state(directory, self._run)
        with whole_state(directory):
            layout = self._set_facts(facts)
            if layout is None:
                return
            saved_rows = int(facts["layout"]["num_rows"])
        if saved_rows != layout.num_rows:
            raise CheckpointError(
                f"{directory} holds a replay with {saved_rows} rows for each environment, this configuration makes one with {layout.num_rows}: "
                "resume with the replay.capacity_* that the checkpoint was made with"
            )
        self._allocate(layout)
        with whole_state(directory):
            self._set_state(arrays)
            self._priorities.set_state(arrays)
            self._files.load(directory, self._parts())

    def _set_facts(self, facts: dict[str, Any]) -> Layout | None:
        """Returns the layout that it had, None where nothing was in it yet."""
        self.inserted_steps, self.evicted_steps = int(facts["inserted"]), int(facts["evicted"])
        self._version = int(facts["version"])
        if facts["layout"] is None:
            return None
        axes = {str(name): int(axis) for name, axis in facts["layout"]["axes"].items()}
        return Layout.restored(self._schema, self._num_groups, self._config, axes)

    # ---- a memory that outlives this process -----------------------------------------------------------------------
    def begin(self, version: int) -> None:
        """Before the first change of the update that is made of this version."""
        self._memory.begin(version)

    def kept_state(self) -> tuple[Arrays, dict[str, Any]]:
        """What another replay over the same memory needs to go on from here: named arrays, and JSON-able facts."""
        arrays, facts = self._get_state()
        used = {f"used/{name}": rows.used | rows.touched for name, rows in self._parts().items()}
        most = {"most": np.array(self._priorities.most)} if self._ready else {}
        return {**arrays, **used, **most}, facts

    def go_on(self, arrays: Arrays, facts: dict[str, Any], version: int) -> None:
        """Go on, bit for bit, where the replay that had this memory, a KeptMemory, kept its state once `version` was made.

        Raises:
          KeyError, ValueError, ...: what is there does not fit (see `files.whole_state`).
        """
        memory, layout = self._memory, self._set_facts(facts)
        assert isinstance(memory, KeptMemory)
        if layout is None:
            memory.clear()
            memory.begin(version)
            return
        self._take(layout)
        memory.back_to(version)
        self._set_state(arrays)
        self._priorities.go_on(float(arrays["most"]))
        for name, rows in self._parts().items():
            rows.used[:] = rows.touched[:] = arrays[f"used/{name}"]  # where they lie in files is not known: all are written again

    def check_valid(self) -> None:
        """Raise AssertionError where an invariant is broken."""
        assert 0 <= self.evicted_steps <= self.inserted_steps
        if not self._ready:
            return
        layout, rows = self._store.layout, self._store.rows
        self._priorities.tree.check_valid()
        place = np.arange(len(self._newest_C) * layout.num_rows)
        column, position = np.divmod(place, layout.num_rows)
        behind = (self._newest_C[column] - position) % layout.num_rows
        steps = ((rows.take("flags", place) & VALID) > 0) & (behind >= 1) & (behind <= layout.reach)
        assert np.count_nonzero(steps) == self.num_steps <= len(self._newest_C) * layout.reach
        if self._starts is None:
            assert ((self._priorities.tree.leaves > 0) == steps).all()
            return
        drawn = np.flatnonzero(self._priorities.tree.leaves)
        since = self._newest_C[drawn // layout.num_starts] - self._starts.rows.take("row", drawn)
        assert ((since >= self._starts.length) & (since <= layout.reach)).all()
