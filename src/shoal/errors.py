"""Every error that shoal raises on purpose.

    ShoalError                      exit code 1
    ├── ConfigError                 2   a wrong or impossible setting; also bad usage
    ├── EnvironmentFault            3   the environment raised, hung, died or returned something wrong
    ├── DivergedError               4   learning produced non-finite numbers, update after update
    ├── RunError                    1   a run directory that cannot be read, or is in use
    │   ├── NoRunError              2   what was named is no run
    │   ├── StorageError            1   a store (run_dir is a URL) that cannot be reached or refuses, or a run in it that another driver has
    │   └── CheckpointError         1   a checkpoint that is missing, torn or of another format
    ├── LedgerError                 1   a rollout unaccounted for: a gap, a duplicate, two final attempts
    ├── SchemaError                 1   an array whose dtype, shape or name is not what the schema says
    ├── LearnersError               1   several learners whose weights are no longer the same
    ├── ShapeError                  1   tensors whose dimensions do not go together (ops)
    └── ProcessError                1   a role that died more often than its budget allows
        └── TooFewNodesError        1   a cluster that has not the nodes for a run to begin with; nothing of it was begun

Each message says what was expected, what came, where, and what to do.
"""

from __future__ import annotations


class ShoalError(Exception):
    """Base of all; `exit_code` is what the command line ends with."""

    exit_code = 1


class ConfigError(ShoalError):
    """A setting that is unknown, of the wrong type, out of range, or impossible with another."""

    exit_code = 2


class EnvironmentFault(ShoalError):
    """The environment broke its contract. `report` holds the facts by name (group, env, step, field, expected, actual ...)."""

    exit_code = 3

    def __init__(self, message: str, report: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.report = report or {}


class DivergedError(ShoalError):
    """No optimizer step of many updates in a row was finite."""

    exit_code = 4


class RunError(ShoalError):
    """A run directory that cannot be read, or is in use by a living run."""


class NoRunError(RunError):
    """What was named does not exist or is not a run: bad usage."""

    exit_code = 2


class StorageError(RunError):
    """A store of objects refuses or cannot be reached, or another driver has the run in it; shows no secret."""


class CheckpointError(RunError):
    """No whole checkpoint could be found, or its format is not one that this version reads."""


class LedgerError(ShoalError):
    """The conservation law of rollouts is broken; names the group and the sequence."""


class SchemaError(ShoalError):
    """An array does not fit the schema; names the field, what was expected and what came."""


class LearnersError(ShoalError):
    """Several learners of a run do not hold the same weights; names what each holds."""


class ShapeError(ShoalError):
    """Leading dimensions of tensors differ where they must agree."""


class ProcessError(ShoalError):
    """A role's process died again and again; carries the last traceback."""


class TooFewNodesError(ProcessError):
    """A cluster has fewer nodes than a run asked for, which may come: trying again may help. Nothing of the run was begun."""
