"""URLs of run directories in a store (`s3://bucket/runs/x`): what is one, what is refused, where its working copy lies, and texts without secrets.

Nothing is opened here, and no file system is imported.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeGuard

from shoal.errors import ConfigError

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://(.*)", re.S)
_ON_DISK = ("file", "local")  # their paths are those of this machine, and may hold any character
_READ_ONLY = ("http", "https", "data", "git", "github", "gist")
_HIDDEN = "***"
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|ACCESS_KEY|ACCOUNT_KEY|CONNECTION_STRING|SAS_|_SAS", re.I)
_SECRETS_IN_TEXT = (
    (re.compile(r"(://)[^\s\"']*@"), rf"\1{_HIDDEN}@"),
    (re.compile(r"(://[^\s\"'?#]*[?#])[^\s\"']+"), rf"\1{_HIDDEN}"),
    (re.compile(r"([?&][\w.%-]+=)[^&\s\"']+"), rf"\1{_HIDDEN}"),
)
_SHORTEST_SECRET = 8


def is_url(path: object) -> TypeGuard[str]:
    """Whether this names a place in a store, and no path of this disk."""
    return isinstance(path, str) and _URL.fullmatch(path) is not None


def check_url(url: str) -> str:
    """The URL as it is written down: without a slash at its end. A user or a query may hold a secret, and would stand in config.yaml and in messages.

    Raises:
      ConfigError: it has one of these, chains file systems (`::`), cannot be written to, or leads nowhere; the message shows no secret.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise ConfigError(f"{hide(url)} is no URL; expected one such as s3://bucket/runs/x")
    protocol, place = match[1].lower(), match[2].rstrip("/")
    shown = hide(url)
    on_disk = protocol in _ON_DISK
    if not on_disk and ("@" in place or re.search(r"[?#]", place)):
        raise ConfigError(
            f"{shown}: a URL with a user or a query may hold a secret, and is written down with the run; leave it out, and give credentials as the file "
            "system finds them by itself (AWS_PROFILE and the like, or fsspec's own ~/.config/fsspec and FSSPEC_PROTOCOL_KEY)"
        )
    if "::" in url:
        raise ConfigError(f"{shown}: file systems cannot be chained (::); name the store itself")
    if protocol in _READ_ONLY:
        raise ConfigError(f"{shown}: nothing can be written to {protocol}://; take a store such as s3://, gs:// or file://")
    if on_disk and not place.startswith("/"):
        raise ConfigError(f"{shown}: a path in a URL begins at the root, such as {protocol}:///shared/runs/x")
    if not place.strip("/") or ".." in place.split("/") or re.search(r"[*\[\]\s]", place):
        raise ConfigError(f"{shown} names no directory; expected {protocol}://PLACE/runs/x, without .., *, [, ] and spaces")
    return f"{protocol}://{place}"


def name_of(url: str) -> str:
    """The last part of a URL, fit for a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", url.rstrip("/").rpartition("/")[2]).strip("-.")[:80] or "run"


def local_directory(url: str) -> Path:
    """Where the working copy of the run at this URL lies: `$XDG_CACHE_HOME/shoal/runs/` (default: `~/.cache/shoal/runs/`). Raises ConfigError as `check_url`."""
    whole = check_url(url)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return (cache / "shoal" / "runs" / f"{name_of(whole)}-{hashlib.sha256(whole.encode()).hexdigest()[:16]}").resolve()


def hide(text: str, secrets: Iterable[str] = (), environment: Mapping[str, str] | None = None) -> str:
    """The text without users and queries of URLs, without these secrets, and without the values of this environment's variables (default: the
    process's own) whose names say that they are secret."""
    variables = os.environ if environment is None else environment
    hidden = {value for name, value in variables.items() if _SECRET_NAME.search(name)} | set(secrets)
    for secret in sorted(hidden, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, _HIDDEN)
    for pattern, shown in _SECRETS_IN_TEXT:
        text = pattern.sub(shown, text)
    return text
