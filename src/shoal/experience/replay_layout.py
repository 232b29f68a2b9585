"""How much a replay holds, and of what: fields of its rows, and how many rows fit into what the configuration allows."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.config import ReplayConfig
from shoal.errors import ConfigError
from shoal.experience.replay_rows import RowFields, row_bytes
from shoal.experience.ring import Slot
from shoal.experience.schema import Schema
from shoal.experience.stacks import Stack, is_stacked, likely_stack, possible_stacks

_LEAF_BYTES = 8.6  # of the sum tree, for each row (or start of a sequence)


@dataclass(frozen=True)
class Layout:
    """Attributes:
    num_rows: of a column; the last holds an observation alone, and each column keeps one for every older frame of a stack.
    reach: newest rows of a column that can be sampled.
    stacks: observations of which a row holds one frame.
    observations: names of all, without the mask. step_fields: what else is copied from a rollout.
    """

    fields: RowFields
    num_columns: int
    num_rows: int
    reach: int
    stacks: dict[str, Stack]
    observations: tuple[str, ...]
    step_fields: tuple[str, ...]
    masked: bool
    state_fields: tuple[str, ...] = ()
    start_fields: RowFields = field(default_factory=dict)
    num_starts: int = 0

    @classmethod
    def likely(cls, schema: Schema, num_groups: int, config: ReplayConfig) -> Layout:
        """As far as can be said before there is a rollout. Raises ConfigError where nothing fits."""
        return cls._with(schema, num_groups, config, {n: s for n, dtype, shape in _images(schema) if (s := likely_stack(dtype, shape))})

    @classmethod
    def of(cls, slot: Slot, num_groups: int, config: ReplayConfig) -> Layout:
        """From the first rollout, whose images show whether they are stacks."""
        num_rows, a = int(slot.envelope["num_rows"]), slot.arrays
        goes_on_TB = a["valid"][:num_rows] & ~(a["terminated"][:num_rows] | a["truncated"][:num_rows])
        found = {
            name: stack
            for name, dtype, shape in _images(slot.schema)
            for stack in reversed(possible_stacks(dtype, shape))
            if is_stacked(a[name][: num_rows + 1], goes_on_TB, stack)
        }
        return cls._with(slot.schema, num_groups, config, found)

    @classmethod
    def restored(cls, schema: Schema, num_groups: int, config: ReplayConfig, axes: dict[str, int]) -> Layout:
        """As it was saved: the axes of those that were found to be stacks."""
        shapes = {name: shape for name, _, shape in _images(schema)}
        return cls._with(schema, num_groups, config, {name: Stack(axis, shapes[name][axis]) for name, axis in axes.items()})

    @classmethod
    def _with(cls, schema: Schema, num_groups: int, config: ReplayConfig, stacks: dict[str, Stack]) -> Layout:
        named = {f.name: f for f in schema.fields}
        shown = [f for f in schema.fields if f.axis == "T+1"]
        fields: dict[str, tuple[str, tuple[int, ...]]] = {
            f.name: (f.dtype, stacks[f.name].frame_shape(f.shape) if f.name in stacks else f.shape) for f in shown
        }
        fields |= {
            "action": (named["action"].dtype, named["action"].shape),
            "reward": ("float32", ()),
            "policy_version": ("int64", ()),
            "inserted": ("int64", ()),  # env steps in the replay's life when the row's rollout was in
            "flags": ("uint8", ()),
            "gap": ("uint8", ()),
        }
        columns, pad = num_groups * schema.num_envs, max((s.size for s in stacks.values()), default=1) - 1
        states = {f.name: (f.dtype, f.shape) for f in schema.fields if f.axis == "B" and _is_state(f.name)}
        starts: dict[str, tuple[str, tuple[int, ...]]] = {**states, "row": ("int64", ()), "seen": ("uint8", ())}
        per_row, once = row_bytes(fields) + _LEAF_BYTES, 0.0
        if config.sequence_length is not None:
            once = row_bytes(starts) + _LEAF_BYTES
            per_row = row_bytes(fields) + once / schema.num_rows
        num_rows = config.capacity_steps // columns + 1 + pad
        if config.capacity_bytes is not None:
            num_rows = min(num_rows, int((config.capacity_bytes / columns - once) / per_row))
        least = _least_steps(schema.num_rows, config)
        if num_rows - 1 - pad < least:
            raise ConfigError(
                f"replay.capacity_steps {config.capacity_steps:,} and replay.capacity_bytes {config.capacity_bytes} are too few for "
                f"{columns:,} environments ({num_groups:,} groups of {schema.num_envs:,}), which need {least:,} step{'' if least == 1 else 's'} each: "
                f"{columns * least:,} steps in {columns * ((least + 1 + pad) * per_row + once):,.0f} bytes at least"
            )
        return cls(
            fields=fields,
            num_columns=columns,
            num_rows=num_rows,
            reach=num_rows - 1 - pad,
            stacks=stacks,
            observations=tuple(f.name for f in shown if f.name != "action_mask"),
            step_fields=("action", "reward", "policy_version"),
            masked="action_mask" in fields,
            state_fields=tuple(states),
            start_fields=starts,
            num_starts=num_rows // schema.num_rows + 1 if config.sequence_length is not None else 0,
        )

    @property
    def capacity_steps(self) -> int:
        """Env steps that can be sampled when it is full."""
        return self.num_columns * self.reach

    @property
    def size_bytes(self) -> int:
        """Rows, starts of sequences, and the sum tree."""
        if self.num_starts:
            starts = self.num_starts * (row_bytes(self.start_fields) + _LEAF_BYTES)
            return int(self.num_columns * (self.num_rows * row_bytes(self.fields) + starts))
        return int(self.num_columns * self.num_rows * (row_bytes(self.fields) + _LEAF_BYTES))


def check_learning_starts(layout: Layout, config: ReplayConfig, dealt: int = 1) -> None:
    """Raise ConfigError where `dealt` replays of this layout hold so few steps, for the bytes that they may take, that learning would never start.

    config: of one of them, but for `learning_starts`.
    """
    wanted = min(config.learning_starts, dealt * (config.capacity_steps // layout.num_columns * layout.num_columns))
    holds = dealt * layout.capacity_steps
    if config.capacity_bytes is not None and holds < wanted:
        raise ConfigError(
            f"replay.learning_starts: the replay holds {holds:,} env steps in {dealt * config.capacity_bytes:,} bytes (replay.capacity_bytes) and "
            f"would never hold the {config.learning_starts:,} after which learning starts; lower it, or raise the other"
        )


def _least_steps(rollout_length: int, config: ReplayConfig) -> int:
    """What an environment's column must hold. Raises ConfigError where sequences and rollouts do not go together."""
    if config.sequence_length is None:
        return 1
    if config.burn_in + rollout_length > config.sequence_length:
        raise ConfigError(
            f"replay.sequence_length {config.sequence_length} is less than replay.burn_in {config.burn_in} and sampling.rollout_length "
            f"{rollout_length} together: a sequence begins with every rollout, so steps would be left that no sequence trains"
        )
    return config.sequence_length + rollout_length


def _is_state(name: str) -> bool:
    return name.startswith("policy_state/") and not name.endswith("/end")


def _images(schema: Schema) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(f.name, f.dtype, f.shape) for f in schema.fields if f.axis == "T+1" and f.name != "action_mask"]
