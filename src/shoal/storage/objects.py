"""A store: objects under one URL, through fsspec.

fsspec is imported here alone, once a URL is opened. Whatever a file system raises becomes a StorageError of one line, from which secrets are taken out; the error
itself is not passed on, since its text and its context may hold them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from shoal.errors import ConfigError, ShoalError, StorageError
from shoal.urls import check_url, hide

SMALL_BYTES = 2**24  # what is read into memory as a whole is shorter
PART = ".part"  # at the end of the name of what is being written
ATTEMPTS = 3
FIRST_WAIT_SECONDS = 1.0

Result = TypeVar("Result")


class MissingError(StorageError):
    """There is no such object."""


class Store:
    """Objects by name (`checkpoints/update-000000001/learner.json`) below a URL. One thread uses it at a time.

    Raises:
      ConfigError: no such protocol, or its package is not installed. StorageError: from each method, where the store refuses or cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.url = check_url(url)
        self._fs, self._root = _open(self.url)
        self._aside = bool(
            getattr(self._fs, "local_file", False)
        )  # half of an object can be seen on a file system; other stores put it there at once

    def read(self, name: str) -> bytes | None:
        """A small object; None where there is none."""
        size = self.size(name)
        if size is None:
            return None
        if size > SMALL_BYTES:
            raise StorageError(f"{self.url}/{name} has {size:,} bytes, which is too many for what it should be")
        with self._errors("read", name), contextlib.suppress(FileNotFoundError):
            return bytes(self._fs.cat_file(self._path(name)))
        return None

    def write(self, name: str, content: bytes) -> None:
        """Put a small object there, or in the place of the old one, in one step."""
        with self._replacing(name) as path:
            self._with_parents(path, lambda: self._fs.pipe_file(path, content))

    def create(self, name: str, content: bytes) -> bool:
        """Put a small object there unless there is one. Returns whether it was put; at the same moment as another's, where the store can tell (S3, GCS)."""
        path = self._path(name)
        with self._errors("write", name):
            try:
                self._with_parents(path, lambda: self._fs.pipe_file(path, content, mode="create"))
            except FileExistsError:
                return False
        return True

    def put(self, name: str, file: Path, moved: Callable[[], None] = lambda: None) -> None:
        """Copy a file there. `moved` is called now and then while bytes move."""
        path = self._path(name)
        with self._errors("write", name):
            self._with_parents(path, lambda: self._fs.put_file(str(file), path, callback=_progress(moved)))

    def replace(self, name: str, file: Path, moved: Callable[[], None] = lambda: None) -> None:
        """`put` in the place of what is there, in one step."""
        with self._replacing(name) as path:
            self._with_parents(path, lambda: self._fs.put_file(str(file), path, callback=_progress(moved)))

    @contextlib.contextmanager
    def _replacing(self, name: str) -> Iterator[str]:
        """The path to write to, which gets its name at the end."""
        path = self._path(name)
        with self._errors("write", name):
            yield path + PART if self._aside else path
            if self._aside:
                self._fs.mv(path + PART, path)

    def copy(self, name: str, to: str) -> bool:
        """Copy an object within the store. False where it cannot."""
        try:
            with self._errors("copy", name):
                self._with_parents(self._path(to), lambda: self._fs.cp_file(self._path(name), self._path(to)))
        except StorageError:
            return False
        return True

    def get(self, name: str, file: Path) -> None:
        """Copy an object into a file. Raises MissingError; half of the file may be there after an error."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._errors("read", name):
            self._fs.get_file(self._path(name), str(file))

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where there is none."""
        with self._errors("read", name), contextlib.suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            found = self._fs.info(self._path(name))
            return None if found["type"] == "directory" else int(found["size"])
        return None

    def files(self, under: str) -> dict[str, int]:
        """Bytes of all objects below a name, by their own."""
        found: dict[str, int] = {}
        todo = [under]
        while todo:
            directory = todo.pop()
            for name, size in self._listed(directory):
                if size is None:
                    todo.append(name)
                else:
                    found[name] = size
        return found

    def directories(self) -> list[str]:
        """What lies at the top and holds something, by name."""
        return sorted(name for name, size in self._listed("") if size is None)

    def _listed(self, directory: str) -> list[tuple[str, int | None]]:
        """Names in one directory with their sizes, None for directories. (`find` of a file system takes an error for an empty directory.)"""
        path = self._path(directory)
        with self._errors("list", directory), contextlib.suppress(FileNotFoundError):
            self._fs.invalidate_cache()
            entries = [(str(entry["name"]).rstrip("/"), entry) for entry in self._fs.ls(path, detail=True)]
            inside = [(whole[len(self._root) :].strip("/"), entry) for whole, entry in entries if whole != path]
            return [(name, None if entry["type"] == "directory" else int(entry["size"])) for name, entry in inside]
        return []

    def remove(self, name: str) -> None:
        """Remove an object; one that is not there is gone already."""
        with self._errors("remove", name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def remove_all(self, under: str) -> None:
        """Remove everything below a name."""
        with self._errors("remove", under), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(under), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _with_parents(self, path: str, act: Callable[[], None]) -> None:
        """Stores of objects have no directories, and are not asked to make any; file systems say that one is missing."""
        try:
            act()
        except FileNotFoundError:
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            act()

    @contextlib.contextmanager
    def _errors(self, what: str, name: str) -> Iterator[None]:
        try:
            yield
        except ShoalError:
            raise
        except FileNotFoundError:
            raise MissingError(f"there is no {self.url}/{name}") from None
        except Exception as error:
            raise StorageError(f"cannot {what} {self.url}/{name}: {_said(error, _secrets(self._fs))}") from None


def retried(act: Callable[[], Result], attempts: int = ATTEMPTS, sleep: Callable[[float], None] = time.sleep) -> Result:
    """Try again, a little later each time, where the store does not answer; what is missing stays missing."""
    for attempt in range(attempts - 1):
        try:
            return act()
        except MissingError:
            raise
        except StorageError:
            sleep(FIRST_WAIT_SECONDS * 2**attempt)
    return act()


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the URL's place in it. Its connections are its own: another thread may open the same URL."""
    protocol = url.partition("://")[0]
    try:
        import fsspec
    except ImportError:
        raise ConfigError(f"{url}: a run in a store needs the package fsspec: pip install 'shoal[storage]'") from None
    try:
        fsspec.get_filesystem_class(protocol)
        file_system, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or getattr(error, "name", None) or protocol
        raise ConfigError(f"{url}: {protocol}:// needs the package {package}, which is not installed: pip install {package}") from None
    except Exception as error:
        if isinstance(error, ValueError) and protocol not in fsspec.available_protocols():
            raise ConfigError(
                f"{url}: fsspec knows no file system {protocol}://; expected one such as s3://, gs://, abfs://, sftp:// or file://"
            ) from None
        raise StorageError(f"cannot open {url}: {_said(error, [])}") from None
    return file_system, str(root).rstrip("/")


def _progress(moved: Callable[[], None]) -> Any:
    from fsspec.callbacks import Callback

    return Callback(hooks={"moved": lambda *_, **__: moved()})


def _said(error: Exception, secrets: list[str]) -> str:
    """An error in one line, without secrets."""
    return hide(" ".join(f"{type(error).__name__}: {error}".split()), secrets)[:500]


def _secrets(file_system: Any) -> list[str]:
    """Texts among the options of a file system, which come from fsspec's own configuration: any of them may be a secret."""
    found: list[str] = []
    todo: list[Any] = [getattr(file_system, "storage_options", {})]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, str) and "://" not in value:
            found.append(value)
    return found
