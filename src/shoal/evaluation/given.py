"""What a caller gives to `predict`, brought into the arrays of a policy, or refused with a SchemaError that names it, what was expected and what came.

Legend: N observations of a batch, A entries of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from shoal.environments.spaces import MASK, MOST, all_fit, which_fit
from shoal.errors import SchemaError
from shoal.types import Array, Arrays, EnvironmentSpec, LeafSpec


def read_observation(spec: EnvironmentSpec, observation: Any, action_mask: Any) -> tuple[Arrays, bool]:
    """Field arrays [N, *shape], with `action_mask` bool [N, A] where there is one, and whether it was a single observation. Raises SchemaError."""
    leaves = {leaf.name("observation"): leaf for leaf in spec.observation}
    values = {name: _pick(observation, leaf) for name, leaf in leaves.items()}
    single = not any(values[name].ndim == len(leaf.shape) + 1 for name, leaf in leaves.items())
    arrays = {name: _rows(values[name], leaf, single) for name, leaf in leaves.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise SchemaError(f"the parts of a batch differ in length: {lengths}")
    if spec.action_mask == "observation" and action_mask is None:
        action_mask = _pick(observation, LeafSpec((MASK,), "multi_binary", "int8", (spec.mask_size,)))
    if action_mask is not None:
        arrays[MASK] = _mask(spec, action_mask, next(iter(lengths.values())), single)
    return arrays, single


def read_state(state: Any, memory: Arrays, noise_shape: tuple[int, ...] | None) -> Arrays:
    """A state by name, float32: all of `memory`, which is one of a beginning, and `noise` where it is there. Empty for None. Raises SchemaError.

    noise_shape: of exploration noise that is kept for an episode; None for a policy that keeps none.
    """
    shapes = {name: array.shape for name, array in memory.items()}
    known = shapes if noise_shape is None else {**shapes, "noise": noise_shape}
    words = ", ".join(f"{name} {list(shape)}" for name, shape in known.items())
    expected = f"{words} (what the last call returned), or None" if known else "None, since this policy remembers nothing"
    if state is None or (isinstance(state, Mapping) and not state and not memory):
        return {}
    if not isinstance(state, Mapping):
        raise SchemaError(f"state: expected {expected}; got {_said(state)}")
    read = {name: _state(name, state, shape, expected) for name, shape in known.items() if name in state or name in shapes}
    if odd := [str(name) for name in state if name not in known]:
        raise SchemaError(f"state: expected {expected}; got {', '.join(odd)} too")
    return read


def read_generator(rng: Any, own: np.random.Generator) -> np.random.Generator:
    """What is drawn from: the generator given, one of a seed, or `own` for None. Raises SchemaError."""
    if rng is None:
        return own
    if isinstance(rng, np.random.Generator):
        return rng
    if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool) and rng >= 0:
        return np.random.default_rng(int(rng))
    raise SchemaError(f"rng: expected a numpy.random.Generator, a seed (a whole number from 0 on) or None, got {_said(rng)}")


def _array(value: Any, name: str, expected: str) -> Array:
    try:
        return np.asarray(value)
    except Exception as error:  # whatever an object's own conversion raises
        why = (str(error).splitlines() or [""])[0]
        raise SchemaError(f"{name}: expected {expected}; got {_said(value)}, which is no array ({type(error).__name__}: {why})") from error


def _said(value: Any) -> str:
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with keys {sorted(map(str, value))}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"


def _pick(observation: Any, leaf: LeafSpec) -> Array:
    """A leaf of a nested observation."""
    value, name = observation, leaf.name("observation")
    for key in leaf.path:
        try:
            value = value[key]
        except Exception:
            raise SchemaError(f"{name}: expected a part {key!r} in the observation, got {_said(value)}") from None
    return _array(value, name, f"{leaf.dtype} {list(leaf.shape)}")


def _rows(value: Array, leaf: LeafSpec, single: bool) -> Array:
    """[N, *shape] in the leaf's dtype, of one observation or of a batch."""
    name, shape = leaf.name("observation"), value.shape if single else value.shape[1:]
    if shape != leaf.shape or value.ndim != len(leaf.shape) + (not single):
        expected = f"shape {list(leaf.shape)}, or [N, ...] of it in every part for a batch"
        raise SchemaError(f"{name}: expected {expected}; got {list(value.shape)}")
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is told below
        stored = np.ascontiguousarray(value, leaf.dtype) if value.dtype.kind in "biuf" else value
    if value.dtype.kind not in "biuf" or (stored.dtype.kind != "f" and (stored != value).any()):
        raise SchemaError(f"{name}: expected {leaf.dtype}; got {value.dtype} with values that do not fit into it")
    rows = stored.reshape(1 if single else len(value), *leaf.shape)
    _check_range(rows, leaf, single)
    return rows


def _check_range(stored: Array, leaf: LeafSpec, single: bool) -> None:
    """Raise SchemaError for what no environment may return (see `shoal check`). Bounds of a Box are not looked at: training takes what is beyond them."""
    if leaf.kind == "box":
        if stored.dtype.kind != "f" or all_fit(stored):
            return
        fits, expected = which_fit(stored), f"finite numbers, at most {MOST:.3g} in size"
    elif leaf.kind == "multi_binary":
        fits, expected = (stored == 0) | (stored == 1), "only 0 and 1"
    else:
        low = np.array(leaf.start or (0,) * len(leaf.nvec), np.int64).reshape(leaf.shape)
        high = low + np.array(leaf.nvec, np.int64).reshape(leaf.shape)
        fits, expected = (stored >= low) & (stored < high), f"integers with {low.tolist()} <= value < {high.tolist()}"
    if not fits.all():
        place = tuple(map(int, np.argwhere(~fits)[0]))
        shown = list(place[1:] if single else place)
        raise SchemaError(f"{leaf.name('observation')}: expected {expected}; got {stored[place]}" + (f" at {shown}" if shown else ""))


def _mask(spec: EnvironmentSpec, given: Any, num: int, single: bool) -> Array:
    """bool [N, A]: a flat mask, or a tuple of one for each component."""
    size = spec.mask_size
    if not size:
        raise SchemaError(f"{MASK}: expected None, since the environment that this policy was trained on has no mask; got {_said(given)}")
    expected = f"{size} entries of 0 or 1" + ("" if single else f" for each of {num} observations")
    parts = [_array(part, MASK, expected) for part in (given if isinstance(given, tuple) else (given,))]
    try:
        mask = np.concatenate([part.reshape(-1) if single else part for part in parts], -1)
    except (ValueError, TypeError) as error:
        raise SchemaError(f"{MASK}: expected {expected}; got parts {[list(part.shape) for part in parts]}") from error
    if mask.size != num * size or (not single and len(mask) != num) or mask.dtype.kind not in "biuf":
        raise SchemaError(f"{MASK}: expected {expected}; got {_said(mask)}")
    if not np.isfinite(mask).all():
        raise SchemaError(f"{MASK}: expected {expected}; got {_said(mask)} with NaN or Inf")
    allowed: Array = mask.reshape(num, size) != 0
    if spec.action.nvec:
        some = np.logical_or.reduceat(allowed, np.cumsum((0, *spec.action.nvec[:-1])), axis=1)
        if not some.all():
            row = "" if single else f" in row {int(np.argwhere(~some)[0][0])}"
            raise SchemaError(f"{MASK}: expected at least one allowed action for each component of the action; got none{row}")
    return allowed


def _state(name: str, state: Mapping[Any, Any], shape: tuple[int, ...], expected: str) -> Array:
    if name not in state:
        raise SchemaError(f"state: expected {expected}; of {name} got none")
    value = _array(state[name], f"state: {name}", f"float32 {list(shape)}")
    if value.shape != shape:
        raise SchemaError(f"state: expected {expected}; of {name} got {list(value.shape)}")
    if value.dtype.kind not in "biuf":
        raise SchemaError(f"state: expected {expected}; of {name} got {_said(value)}")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(value, np.float32)
    if not np.isfinite(stored).all():
        raise SchemaError(f"state: expected {expected}; of {name} got {_said(value)} with NaN or Inf")
    return stored
