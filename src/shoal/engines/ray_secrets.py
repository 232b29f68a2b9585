"""The secrets of the clusters that this process starts for its runs, and what its environment says of them meanwhile.

Ray keeps what it read of the environment as it was imported, until the process ends. So all clusters that a process starts, one after the other, have the same
token and the same authority, under the same path; between two of them nothing of it lies on a disk. Where Ray was imported before, none can be started, and
after one was started, no other can be joined.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from shoal.engines.ray_security import local_environment, make_secrets
from shoal.errors import ConfigError

PREFIX = "shoal-ray-"
YOUNG_SECONDS = 60.0  # a directory is made and then locked: one that is younger is nobody's to sweep
_kept: dict[Path, bytes] = {}  # what all clusters of this process have in common: the files' contents


class OwnSecrets:
    """Token and certificates of a cluster that is started now, in a private directory and in this process's environment, until `cleanup`.

    Raises:
      ConfigError: Ray was imported before and has none of them; or they cannot be made, or written.
    """

    def __init__(self) -> None:
        if not _kept and _ray_is_imported():
            raise ConfigError(
                "ray.address: none is named, and the cluster that a run starts for itself needs a token and TLS, which Ray takes from the environment as it is imported: it "
                "is imported in this process already. Train before you import Ray or join a cluster, in another process, or name a cluster"
            )
        sweep()
        self._before: dict[str, str | None] = {}
        self._directory, self._lock = _locked_directory()
        try:
            environment = self._filled()
        except OSError as error:
            self.cleanup()
            raise _unwritten(self._directory, error) from error
        except BaseException:
            self.cleanup()
            raise
        self._before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)

    def cleanup(self) -> None:
        """The environment is what it was before, and nothing lies in the directory any more. May be called twice."""
        for name, value in self._before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        self._before = {}
        if self._lock >= 0:
            shutil.rmtree(self._directory, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def _filled(self) -> dict[str, str]:
        for path, content in _kept.items():
            path.touch(mode=0o600)
            path.write_bytes(content)
        _kept.update({path: path.read_bytes() for path in make_secrets(self._directory)})
        return local_environment(self._directory)  # which does not leave the authority's key there


def _locked_directory() -> tuple[Path, int]:
    """A new one, and the descriptor that holds its lock."""
    try:
        if _kept:
            directory = next(iter(_kept)).parent
            directory.mkdir(mode=0o700)
        else:
            directory = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unwritten(Path(tempfile.gettempdir()), error) from error
    fcntl.flock(lock, fcntl.LOCK_SH)
    return directory, lock


def check_unused() -> None:
    """Raise ConfigError where somebody else uses Ray in this process."""
    if getattr(sys.modules.get("ray"), "is_initialized", bool)():
        raise ConfigError("engine: Ray is at work in this process already; end that first (`ray.shutdown()`), or train in another process")


def check_joining() -> None:
    """Raise ConfigError where Ray has the secrets of a cluster that this process started, and can join no other."""
    if _kept and _ray_is_imported():
        raise ConfigError(
            "ray.address: this process has trained on a cluster that it started for itself, and Ray keeps the token of that one until the process ends; join "
            "another one in another process"
        )


def sweep() -> None:
    """Remove what drivers of this user left here that were killed: the directories whose lock nobody holds."""
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        with contextlib.suppress(OSError):  # of another user, or another one sweeps it
            found = directory.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < YOUNG_SECONDS:
                continue
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(descriptor)


def _ray_is_imported() -> bool:
    """With what keeps the environment's words."""
    return hasattr(sys.modules.get("ray"), "_raylet")


def _unwritten(place: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"ray.address: the secrets of a cluster of this run's own cannot be written to {place}: {error.strerror or error}; TMPDIR names another place"
    )
