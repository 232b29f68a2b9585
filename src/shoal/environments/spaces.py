"""Spaces in plain numbers, and the way of an observation into named arrays and of a stored action back to the environment.

Everything but `describe` works from an `EnvironmentSpec` alone, so a policy bundle needs no environment to read observations.
Legend: B environments of a group, A mask entries.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from shoal.errors import ConfigError
from shoal.types import Array, Arrays, EnvironmentSpec, LeafSpec

MOST = float(np.finfo(np.float32).max)  # everything is learnt in float32, in which a greater number is infinite
MASK = "action_mask"  # the key under which Gymnasium and PettingZoo give a mask, and the name of our field


MismatchKind = Literal["structure", "shape", "dtype", "range", "mask"]


class SpaceMismatch(Exception):
    """An observation that is not what the space says: which field, what was expected, what came, and what to do."""

    def __init__(self, kind: MismatchKind, field: str, expected: str, actual: str, hint: str = "") -> None:
        super().__init__(f"{field}: expected {expected}, got {actual}" + (f"; {hint}" if hint else ""))
        self.kind, self.field, self.expected, self.actual, self.hint = kind, field, expected, actual, hint


def all_fit(values: Array) -> bool:
    """Whether all numbers are finite, and stay so in float32."""
    if values.itemsize <= 4:
        return bool(np.isfinite(values).all())
    return bool(np.abs(values).max(initial=0.0) <= MOST)  # False for NaN


def which_fit(values: Array) -> Array:
    """[shape] bool: `all_fit` for each number."""
    fits: Array = np.abs(values) <= MOST
    return fits


# Description: gymnasium's spaces become leaves.


def describe(
    name: str,
    observation_space: Any,
    action_space: Any,
    *,
    mask_in_info: bool = False,
    snapshot_bytes: int = 0,
    exact_restore: bool = True,
) -> EnvironmentSpec:
    """The spec of an environment from its gymnasium spaces.

    Args:
      mask_in_info: whether `reset` gave an `action_mask` in `info`.
    Raises:
      ConfigError: a space that has no fixed-size array form (Text, Graph, Sequence, OneOf), or a Dict or Tuple action space.
    """
    leaves = _all_leaves(name, "observation", observation_space)
    actions = _all_leaves(name, "action", action_space)
    if len(actions) != 1 or actions[0].path:
        raise ConfigError(
            f"{name}: the action space is {action_space}, but shoal takes one Discrete, MultiDiscrete, MultiBinary or Box; "
            "wrap the environment so that one such space carries all parts"
        )
    action = actions[0]
    mask_size, source = _mask_size(action), "none"
    in_observation = [leaf for leaf in leaves if leaf.path == (MASK,) and mask_size and leaf.size == mask_size]
    if in_observation:
        leaves.remove(in_observation[0])
        source = "observation"
    elif mask_in_info and mask_size:
        source = "info"
    if not leaves:
        raise ConfigError(f"{name}: the observation space {observation_space} holds nothing to observe")
    names = [leaf.name("observation") for leaf in leaves]
    for field in names:
        if names.count(field) > 1:
            raise ConfigError(f"{name}: two parts of the observation would both be called {field!r}; rename a key")
    return EnvironmentSpec(
        name=name,
        observation=tuple(leaves),
        action=action,
        action_mask=source,  # type: ignore[arg-type]
        mask_size=mask_size if source != "none" else 0,
        snapshot_bytes=snapshot_bytes,
        exact_restore=exact_restore,
    )


def _all_leaves(name: str, which: str, space: Any) -> list[LeafSpec]:
    try:
        return list(_leaves(space, ()))
    except ConfigError as error:
        raise ConfigError(f"env.id {name}: in its {which} space, {error}") from None


def _leaves(space: Any, path: tuple[str | int, ...]) -> list[LeafSpec]:
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return [leaf for key in sorted(space.spaces, key=str) for leaf in _leaves(space.spaces[key], (*path, key))]
    if isinstance(space, spaces.Tuple):
        return [leaf for i, part in enumerate(space.spaces) for leaf in _leaves(part, (*path, i))]
    if isinstance(space, spaces.Box):
        return [LeafSpec(path, "box", space.dtype.name, tuple(space.shape), low=_bounds(space.low), high=_bounds(space.high))]
    if isinstance(space, spaces.Discrete):
        return [LeafSpec(path, "discrete", "int64", (), nvec=(int(space.n),), start=(int(space.start),))]
    if isinstance(space, spaces.MultiDiscrete):
        nvec, start = tuple(map(int, space.nvec.ravel())), tuple(map(int, np.ravel(space.start)))
        return [LeafSpec(path, "multi_discrete", "int64", tuple(space.shape), nvec=nvec, start=start)]
    if isinstance(space, spaces.MultiBinary):
        return [LeafSpec(path, "multi_binary", "int8", tuple(space.shape))]
    where = "/".join(map(str, path)) + ": " if path else ""
    raise ConfigError(
        f"{where}{space} is no array of a fixed size; shoal takes Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of those"
    )


def _bounds(values: Array) -> tuple[float, ...]:
    flat = np.asarray(values, np.float64).ravel()
    if flat.size and (flat == flat[0]).all():
        return (float(flat[0]),)
    return tuple(map(float, flat))


def _mask_size(action: LeafSpec) -> int:
    if action.kind in ("discrete", "multi_discrete"):
        return int(sum(action.nvec))
    return action.size if action.kind == "multi_binary" else 0


def allocate(spec: EnvironmentSpec, *lead: int) -> Arrays:
    """Zeroed arrays [*lead, *shape] for every observation field, and `action_mask` (True) where the environment has one."""
    out: Arrays = {leaf.name("observation"): np.zeros((*lead, *leaf.shape), leaf.dtype) for leaf in spec.observation}
    if spec.action_mask != "none":
        out[MASK] = np.ones((*lead, spec.mask_size), np.bool_)
    return out


def extend_crc(crc: int, spec: EnvironmentSpec, arrays: Arrays, b: int) -> int:
    """crc32 continued over environment b's observation: its leaves in the spec's order, C-order bytes (see types.CURSOR)."""
    for leaf in spec.observation:
        crc = zlib.crc32(np.ascontiguousarray(arrays[leaf.name("observation")][b : b + 1]).data, crc)
    return crc


# Observations: nested values go into rows of named arrays.

Writer = Callable[[Any], None]


def observation_writer(spec: EnvironmentSpec, rows: Arrays) -> Writer:
    """A function that copies one (nested) observation, and its mask where it carries one, into `rows`.

    Args:
      rows: by field name, a view of one environment's place: [*shape].
    Returns:
      write(observation), which raises SpaceMismatch where structure, dtype or shape differ, or a discrete value is out of range.
    """
    tree: dict[str | int, Any] = {}
    for leaf in spec.observation:
        field = leaf.name("observation")
        _plant(tree, leaf.path, _leaf_writer(leaf, field, rows[field]))
    if spec.action_mask == "observation":
        _plant(tree, (MASK,), mask_writer(spec, rows[MASK]))
    return _tree_writer(tree, "observation")


def _plant(tree: dict[str | int, Any], path: tuple[str | int, ...], writer: Writer) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1] if path else ""] = writer


def _tree_writer(tree: Any, field: str) -> Writer:
    if callable(tree):
        return tree  # type: ignore[no-any-return]
    if list(tree) == [""]:
        return tree[""]  # type: ignore[no-any-return]
    parts = [(key, _tree_writer(subtree, f"{field}/{key}")) for key, subtree in tree.items()]
    keys = set(tree)
    is_tuple = all(isinstance(key, int) for key in keys)

    def write(value: Any) -> None:
        if is_tuple and isinstance(value, (tuple, list)):
            if len(value) != len(parts):
                raise SpaceMismatch("structure", field, f"a tuple of {len(parts)}", f"a tuple of {len(value)}")
        elif not isinstance(value, Mapping) or value.keys() != keys:
            shape = f"a tuple of {len(parts)}" if is_tuple else f"a dict with keys {sorted(map(str, keys))}"
            raise SpaceMismatch("structure", field, shape, _structure(value))
        for key, write_part in parts:
            write_part(value[key])

    return write


def _structure(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with keys {sorted(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {value!r:.60}"


def _leaf_writer(leaf: LeafSpec, field: str, row: Array) -> Writer:
    if leaf.kind in ("discrete", "multi_discrete"):
        return _discrete_writer(leaf, field, row)
    return _array_writer(leaf, field, row)


def _array_writer(leaf: LeafSpec, field: str, row: Array) -> Writer:
    dtype, shape, array_class = row.dtype, leaf.shape, np.ndarray
    expected = f"{dtype} {list(shape)}"
    binary = leaf.kind == "multi_binary"

    def write(value: Any) -> None:
        if value.__class__ is array_class and value.dtype is dtype and value.shape == shape:
            row[...] = value
        else:
            if not isinstance(value, (np.ndarray, np.generic)):
                raise SpaceMismatch("structure", field, expected, _structure(value), f"return a numpy array of {dtype}")
            if value.shape != shape:
                raise SpaceMismatch("shape", field, expected, _structure(value), "observation and observation_space must agree")
            if value.dtype != dtype and not (binary and value.dtype.kind in "iub"):
                raise SpaceMismatch("dtype", field, expected, _structure(value), f"add .astype(np.{dtype}), or change the space's dtype")
            row[...] = value
        if binary and ((row != 0) & (row != 1)).any():
            raise SpaceMismatch("range", field, "only 0 and 1", f"{row.tolist()}")

    return write


def _discrete_writer(leaf: LeafSpec, field: str, row: Array) -> Writer:
    low = np.array(leaf.start, np.int64).reshape(leaf.shape)
    high = low + np.array(leaf.nvec, np.int64).reshape(leaf.shape)
    shape = leaf.shape
    expected = f"integers {list(shape)} with {low.tolist()} <= value < {high.tolist()}"

    def write(value: Any) -> None:
        array = np.asarray(value)
        if array.dtype.kind not in "iu" or array.shape != shape:
            raise SpaceMismatch("dtype" if array.dtype.kind not in "iu" else "shape", field, expected, _structure(value))
        if (array < low).any() or (array >= high).any():
            raise SpaceMismatch("range", field, expected, f"{array.tolist()}", "the value is outside of its space")
        row[...] = array

    return write


def mask_writer(spec: EnvironmentSpec, row: Array) -> Writer:
    """A function that copies a mask of allowed actions into `row` (bool [A]): a flat array, or a tuple with one per component."""
    nvec = spec.action.nvec or ()
    starts = np.cumsum((0, *nvec[:-1])) if nvec else None
    size = spec.mask_size

    def write(value: Any) -> None:
        array = np.concatenate([np.ravel(part) for part in value]) if isinstance(value, (tuple, list)) else np.ravel(value)
        if array.size != size or array.dtype.kind not in "biuf":
            raise SpaceMismatch("mask", MASK, f"{size} entries of 0 or 1", _structure(value))
        row[...] = array != 0
        if starts is not None and not np.logical_or.reduceat(row, starts).all():
            raise SpaceMismatch("mask", MASK, "at least one allowed action for each component", f"{row.astype(int).tolist()}")

    return write


def flatten_batch(spec: EnvironmentSpec, observation: Any, out: Arrays) -> None:
    """A vector environment's batched observation (nested arrays [B, *shape]) into `out`.

    Raises:
      SpaceMismatch: a leaf is missing, or its dtype or shape differs.
    """
    for leaf in spec.observation:
        field = leaf.name("observation")
        value = _at(observation, leaf.path, field)
        target = out[field]
        same_kind = leaf.kind != "box" and getattr(value, "dtype", np.dtype("O")).kind in "iub"
        if not isinstance(value, np.ndarray) or value.shape != target.shape or (value.dtype != target.dtype and not same_kind):
            raise SpaceMismatch("shape", field, f"{target.dtype} {list(target.shape)}", _structure(value))
        target[...] = value
    if spec.action_mask == "observation":
        out[MASK][...] = np.reshape(_at(observation, (MASK,), MASK), out[MASK].shape) != 0


def _at(value: Any, path: tuple[str | int, ...], field: str) -> Any:
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise SpaceMismatch("structure", field, f"a part {key!r}", _structure(value)) from None
    return value


# Actions: what the policy stores becomes what the environment takes.

BoxForm = Literal["as is", "scale", "clip"]
ActionMap = Callable[[Array], Array]


def action_map(leaf: LeafSpec) -> ActionMap:
    """The function behind `to_environment_action`, with everything that does not change computed once."""
    if leaf.kind == "multi_binary":
        return lambda stored: stored.astype(np.int8)
    if leaf.kind != "box":
        start = np.array(leaf.start, np.int64).reshape(leaf.shape)
        return (lambda stored: stored + start) if start.any() else (lambda stored: stored.astype(np.int64))
    low, high = (np.broadcast_to(np.array(bound), leaf.size if leaf.size else 1).reshape(leaf.shape) for bound in (leaf.low, leaf.high))
    dtype = np.dtype(leaf.dtype)
    whole = dtype.kind in "iu"
    bounded = np.isfinite(low) & np.isfinite(high)
    base, span = np.where(bounded, low, 0.0), np.where(bounded, high, 0.0) - np.where(bounded, low, 0.0)

    def convert(stored: Array) -> Array:
        raw = stored.astype(np.float64)
        scaled = base + (np.clip(raw, -1.0, 1.0) + 1.0) * 0.5 * span
        value = np.clip(np.where(bounded, scaled, raw), low, high)
        return (np.rint(value) if whole else value).astype(dtype)

    return convert


_cached_action_map = lru_cache(maxsize=64)(action_map)


def to_environment_action(leaf: LeafSpec, stored: Array) -> Array:
    """What the environment is given for a stored action, one ([*shape]) or many ([B, *shape]).

    Discrete kinds: zero-based + `start`, int64. Box, per component: bounded on both sides, r -> low + (clip(r, -1, 1) + 1) / 2 *
    (high - low); bounded on one side, clipped; unbounded, as it is; in the dtype of the space (`leaf.dtype`).
    """
    return _cached_action_map(leaf)(np.asarray(stored))


def random_action(leaf: LeafSpec, rng: np.random.Generator, mask: Array | None = None) -> Array:
    """One stored action at random, allowed by `mask` (bool [A]): uniform over choices and bounds, normal where unbounded."""
    if leaf.kind == "box":
        raw = rng.uniform(-1.0, 1.0, leaf.shape) if leaf.bounded else rng.standard_normal(leaf.shape)
        return np.asarray(raw, np.float32)
    if leaf.kind == "multi_binary":
        bits = rng.integers(0, 2, leaf.shape, np.int8)
        return bits if mask is None else np.asarray(bits & mask.reshape(leaf.shape), np.int8)
    allowed = np.ones(sum(leaf.nvec), np.bool_) if mask is None else mask
    parts = np.split(allowed, np.cumsum(leaf.nvec)[:-1])
    return np.array([rng.choice(np.flatnonzero(part)) for part in parts], np.int64).reshape(leaf.shape)
