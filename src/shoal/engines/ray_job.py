"""A driver that was submitted to a cluster (`ray job submit -- shoal train ...`): what is not as it is elsewhere.

Ray unpacks the directory that was submitted along (`--working-dir`) for each job, starts the driver in it, and removes it when it wants the room. A stopped job
gets SIGTERM, with all processes below it (learners do not heed it, see engines/mains.py), and SIGKILL after RAY_JOB_STOP_WAIT_TIME_S.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from shoal.config import RunConfig
from shoal.errors import ConfigError

UNPACKED = ("runtime_resources", "working_dir_files")  # where in Ray's own directory a job's files are


def is_unpacked(path: str | Path) -> bool:
    """Whether Ray unpacked what lies there, for one job."""
    parts = Path(path).parts
    return any(parts[at : at + len(UNPACKED)] == UNPACKED for at in range(len(parts)))


def check_run_directory(directory: Path) -> None:
    """Raise ConfigError for a run's directory that would not outlast the job."""
    if is_unpacked(directory):
        raise ConfigError(
            f"run_dir: {directory} lies in what Ray unpacked for this job, and removes again; give --run-dir a directory that stays, on the head node's "
            "disk or a shared one"
        )


def passing_files(config: RunConfig) -> Iterable[str]:
    """Warnings of import paths that only this job has: a job that resumes the run would not find them."""
    named = (("env.id", config.env.id), ("policy.network", config.policy.network), ("algorithm", config.algorithm.name))
    for key, path in named:
        if path and is_unpacked(path):
            yield (
                f"{key} is a file that Ray unpacked for this job, {path}: another job, which resumes the run, has it elsewhere; name it as a module of "
                f"what is submitted, such as {Path(path).stem.partition('.')[0]}:{path.rpartition(':')[2]}"
            )
