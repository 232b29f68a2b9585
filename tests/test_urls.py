"""URLs of runs: what is one, what is refused, and that no message shows a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import ConfigError
from shoal.settings import resolve
from shoal.urls import check_url, hide, is_url, local_directory, name_of

SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.mark.parametrize("path", ["runs/x", "/runs/x", "~/x", "ALE/Pong-v5", "file.py:make", "a:b", "", None, Path("s3://bucket/x")])
def test_a_path_is_no_url(path: object) -> None:
    assert not is_url(path)


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("s3://bucket/runs/x/", "s3://bucket/runs/x"),
        ("S3://bucket/Runs", "s3://bucket/Runs"),
        ("file:///shared/my@runs/x", "file:///shared/my@runs/x"),
        ("memory://x", "memory://x"),
    ],
)
def test_a_url_is_written_down_in_one_form(url: str, whole: str) -> None:
    assert is_url(url)
    assert check_url(url) == whole


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (f"s3://AKIA:{SECRET}@bucket/x", "secret"),
        (f"sftp://{SECRET}@host/x", "secret"),
        (f"abfs://container/x?sig={SECRET}", "secret"),
        (f"s3://bucket/x?{SECRET}", "secret"),
        (f"s3://bucket/x#{SECRET}", "secret"),
        ("simplecache::s3://bucket/x", "chained"),
        ("s3://bucket::file:///x", "chained"),
        ("https://example.org/x", "nothing can be written"),
        ("file://runs/x", "begins at the root"),
        ("s3://", "names no directory"),
        ("s3://bucket/../x", "names no directory"),
        ("s3://bucket/*", "names no directory"),
    ],
)
def test_what_is_no_place_for_a_run_is_refused_without_showing_a_secret(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as refused:
        check_url(url)
    assert SECRET not in str(refused.value)
    if is_url(url):
        with pytest.raises(ConfigError) as refused:
            resolve("CartPole-v1", {"run_dir": url})
        assert SECRET not in str(refused.value)


def test_a_text_is_told_without_its_secrets() -> None:
    text = f"GET https://store/x?X-Amz-Credential=AKIA&X-Amz-Signature={SECRET} as s3://me:{SECRET}@bucket with {SECRET} or other-secret failed: why?"
    told = hide(text, ["other-secret"], {"AWS_SECRET_ACCESS_KEY": SECRET, "HOME": "failed"})
    assert SECRET not in told
    assert "other-secret" not in told
    assert told.startswith("GET https://store/x?***")
    assert told.endswith("failed: why?")
    assert hide("cannot read /runs/x: no such file", environment={}) == "cannot read /runs/x: no such file"


def test_the_working_copy_of_a_url_has_one_place_which_no_other_url_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = local_directory("s3://bucket/runs/x")
    assert place == local_directory("s3://bucket/runs/x/")
    assert place.parent == tmp_path / "shoal" / "runs"
    assert place.name.startswith("x-")
    assert place != local_directory("gs://bucket/runs/x") != local_directory("s3://bucket/runs/y")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert local_directory("s3://bucket/runs/x").parent == tmp_path / "home" / ".cache" / "shoal" / "runs"


def test_a_new_run_does_not_go_to_the_url_whose_configuration_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    url = "s3://bucket/runs/x"
    for directory, kept in ((local_directory(url), None), (tmp_path / "mine", url)):
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(f"env: {{id: CartPole-v1}}\nrun_dir: {url}\n")
        assert resolve(str(directory))[0].run_dir == kept


def test_names_are_fit_for_files() -> None:
    assert [name_of(url) for url in ("s3://b/runs/my run!/", "s3://b", "file:///...")] == ["my-run", "b", "run"]
