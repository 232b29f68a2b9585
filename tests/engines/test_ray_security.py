"""Tokens, certificates, and which clusters are refused. What Ray itself does with them is in the tests that have Ray."""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import re
import socket
import ssl
import stat
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engines import ray_connecting, ray_security
from shoal.engines.errors_told import rebuild_error
from shoal.engines.ray_security import check_cluster, find_token, local_environment, make_certificate, make_secrets, redact
from shoal.errors import ConfigError, EnvironmentFault
from shoal.settings import resolve

FIB_TRIE = """Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     +-- 10.1.0.0/16 2 0 2
        |-- 10.1.0.0
           /16 link UNICAST
        |-- 10.1.2.3
           /32 host LOCAL
        |-- 10.1.255.255
           /32 link BROADCAST
        |-- 127.0.0.1
           /32 host LOCAL
Local:
        |-- 10.1.2.3
           /32 host LOCAL
"""


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- secrets
def test_secrets_are_readable_by_their_owner_alone_and_made_once(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        files = make_secrets(tmp_path / "secrets")
    finally:
        os.umask(old)
    assert [file.name for file in files] == ["token", "ca.crt", "ca.key"]
    assert {mode(file) for file in files} == {0o600}
    assert mode(tmp_path / "secrets") == 0o700
    before = [file.read_bytes() for file in files]
    make_secrets(tmp_path / "secrets")
    assert [file.read_bytes() for file in files] == before
    token = files[0].read_text().strip()
    assert len(bytes.fromhex(token)) == 32
    assert make_secrets(tmp_path / "other")[0].read_text().strip() != token
    assert sorted(path.name for path in (tmp_path / "secrets").iterdir()) == ["ca.crt", "ca.key", "token"]


@pytest.mark.parametrize("others", [0o755, 0o770, 0o701], ids=oct)
def test_a_directory_that_others_may_enter_gets_no_secrets(others: int, tmp_path: Path) -> None:
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(others)
    with pytest.raises(ConfigError, match=rf"open: others may enter it \(mode 0{others:o}\), .*chmod 700 {place}"):
        make_secrets(place)
    assert list(place.iterdir()) == []
    place.chmod(0o700)
    assert len(make_secrets(place)) == 3


def test_addresses_of_this_host_are_those_of_the_kernel() -> None:
    assert ray_security.local_addresses(FIB_TRIE) == ["10.1.2.3", "127.0.0.1"]
    assert {"localhost", "127.0.0.1", socket.gethostname()} <= set(ray_security.own_names())


# ---- certificates: two ends that speak TLS as Ray's do, each with its certificate
def contexts(client: Path, server: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    made = []
    for purpose, node in ((ssl.PROTOCOL_TLS_CLIENT, client), (ssl.PROTOCOL_TLS_SERVER, server)):
        context = ssl.SSLContext(purpose)
        context.load_verify_locations(node / "ca.crt")
        context.load_cert_chain(node / "tls.crt", node / "tls.key")
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        made.append(context)
    return made[0], made[1]


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> str:
    """What the server's answer was, through a connection of two threads. Raises what the client raises."""
    near, far = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(far, server_side=True) as end:
                end.sendall(b"welcome")
        except (ssl.SSLError, OSError):
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(near, server_hostname=name) as end:
            return end.recv(16).decode()
    finally:
        near.close()
        thread.join(300)


def node(root: Path, authority: str, name: str, names: list[str]) -> Path:
    make_secrets(root / authority)
    make_certificate(root / authority, root / name, names)
    return root / name


def test_nodes_of_one_authority_trust_each_other_by_name_and_by_address(tmp_path: Path) -> None:
    one = node(tmp_path, "ours", "one", ["node-1", "10.0.0.1", "fd00::1"])
    two = node(tmp_path, "ours", "two", ["node_2.cluster.local", "10.0.0.2"])
    for client, server, name in ((one, two, "10.0.0.2"), (two, one, "10.0.0.1"), (two, one, "node-1"), (two, one, "fd00::1")):
        assert shake_hands(*contexts(client, server), name) == "welcome"
    assert {mode(file) for file in one.iterdir()} == {0o600}
    assert (one / "ca.crt").read_bytes() == (tmp_path / "ours" / "ca.crt").read_bytes()
    assert not (one / "ca.key").exists()


def test_another_address_and_another_authority_are_not_trusted(tmp_path: Path) -> None:
    one = node(tmp_path, "ours", "one", ["10.0.0.1"])
    two = node(tmp_path, "ours", "two", ["10.0.0.2"])
    stranger = node(tmp_path, "theirs", "stranger", ["10.0.0.1"])
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        shake_hands(*contexts(one, two), "10.0.0.3")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(*contexts(one, stranger), "10.0.0.1")
    client, server = contexts(stranger, two)
    client.load_verify_locations(two / "ca.crt")  # it takes the server for what it is, and is refused all the same
    said = ""
    with contextlib.suppress(ssl.SSLError, OSError):
        said = shake_hands(client, server, "10.0.0.2")
    assert said == ""


@pytest.mark.parametrize("name", ["$(FQ_RAY_IP)", "", "a b", "-x", "10.0.0.256:1", "a" * 254])
def test_a_name_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    make_secrets(tmp_path)
    with pytest.raises(ConfigError, match="neither a host name nor an IP address"):
        make_certificate(tmp_path, tmp_path / "node", [name])
    assert not (tmp_path / "node").exists()


def test_without_an_authority_there_is_no_certificate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no authority"):
        make_certificate(tmp_path, tmp_path / "node", ["a"])
    make_secrets(tmp_path)
    (tmp_path / "ca.key").write_text("damaged")
    with pytest.raises(ConfigError, match="holds no authority"):
        make_certificate(tmp_path, tmp_path / "node", ["a"])


def test_a_local_cluster_has_token_and_tls_on_whatever_the_user_has_set(tmp_path: Path) -> None:
    made = local_environment(tmp_path / "private")
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "mine", "HOME": "/nowhere", **made}
    assert check_cluster(environment, allow_insecure=False, ask=lambda: True) == []
    assert find_token(environment) == (tmp_path / "private" / "token").read_text().strip()
    assert environment["RAY_USE_TLS"] == "1"
    own = tmp_path / "private" / "node"
    assert {made[f"RAY_TLS_{name}"] for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT")} == {
        str(own / file) for file in ("tls.crt", "tls.key", "ca.crt")
    }
    assert shake_hands(*contexts(own, own), "127.0.0.1") == "welcome"
    assert not (tmp_path / "private" / "ca.key").exists(), "nobody needs it any more"


# ---- joining
def written(path: Path, text: str, permissions: int = 0o600) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(permissions)
    return str(path)


def test_the_token_is_found_where_ray_finds_it_and_in_its_order(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert find_token({}) is None
    assert find_token(home) is None
    written(tmp_path / ".ray" / "auth_token", " default \nsecond line")
    assert find_token(home) == "default"
    path = {**home, "RAY_AUTH_TOKEN_PATH": written(tmp_path / "token", "file\n")}
    assert find_token(path) == "file"
    assert find_token({**path, "RAY_AUTH_TOKEN": "variable "}) == "variable"
    assert find_token({**path, "RAY_AUTH_TOKEN": ""}) == "file"
    for text, said in (("\n", "is empty"), (None, "no token can be read")):
        lost = written(tmp_path / "lost", text) if text else str(tmp_path / "none")
        with pytest.raises(ConfigError, match=f"^RAY_AUTH_TOKEN_PATH: .*{said}"):
            find_token({**home, "RAY_AUTH_TOKEN_PATH": lost})


SAFE = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t0ken", "RAY_USE_TLS": "1"}


@pytest.mark.parametrize(
    ("environment", "asks", "why"),
    [
        ({}, None, "RAY_AUTH_MODE is not `token`"),
        ({"RAY_AUTH_TOKEN": "t0ken"}, None, "RAY_AUTH_MODE is not `token`"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "t0ken"}, True, "RAY_AUTH_MODE is not `token`"),
        ({"RAY_AUTH_MODE": "token", "HOME": "/nowhere"}, None, "neither RAY_AUTH_TOKEN nor"),
        (SAFE, False, "it answers calls that carry none"),
        (SAFE, None, "could not be found out"),
    ],
)
def test_a_cluster_without_a_token_is_refused_unless_that_is_allowed(environment: dict[str, str], asks: bool | None, why: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_cluster(environment, allow_insecure=False, ask=lambda: asks)
    assert all(part in str(refused.value) for part in ("CVE-2023-48022", why, "--allow-insecure-cluster"))
    assert "t0ken" not in str(refused.value)
    warnings = check_cluster(environment, allow_insecure=True, ask=lambda: asks)
    assert "CVE-2023-48022" in warnings[0]
    assert why in warnings[0]


def test_a_cluster_with_token_and_tls_is_joined_without_a_word() -> None:
    assert check_cluster(SAFE, allow_insecure=False, ask=lambda: True) == []
    assert check_cluster({**SAFE, "RAY_AUTH_MODE": "TOKEN"}, allow_insecure=False, ask=lambda: True) == []


def test_a_cluster_is_not_asked_where_the_environment_settles_it() -> None:
    def ask() -> bool | None:
        raise AssertionError("asked for nothing")

    for environment in ({}, {"RAY_AUTH_MODE": "token", "HOME": "/nowhere"}):
        with pytest.raises(ConfigError, match="CVE-2023-48022"):
            check_cluster(environment, allow_insecure=False, ask=ask)


def test_no_tls_and_a_token_that_others_may_read_are_warned_of(tmp_path: Path) -> None:
    (warning,) = check_cluster({**SAFE, "RAY_USE_TLS": "0"}, allow_insecure=False, ask=lambda: True)
    assert "without TLS" in warning
    file = written(tmp_path / "token", "t0ken", 0o644)
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": file, "RAY_USE_TLS": "true"}
    (warning,) = check_cluster(environment, allow_insecure=False, ask=lambda: True)
    assert f"chmod 600 {file}" in warning
    Path(file).chmod(0o600)
    assert check_cluster(environment, allow_insecure=False, ask=lambda: True) == []


def test_what_cannot_be_asked_is_not_known(tmp_path: Path) -> None:
    """Also not where Ray is missing: the process that asks finds no module of this name."""
    (tmp_path / "ray.py").write_text("raise ImportError('no Ray here')")
    around = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        assert ray_security.asks_for_token(address, around, timeout_seconds=300) is None


def test_the_process_that_asks_has_no_token_and_is_not_waited_for_without_end(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("import time\ntime.sleep(600)")
    around = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(tmp_path),
        "RAY_AUTH_TOKEN": "t0ken",
        "RAY_AUTH_TOKEN_PATH": "/a",
        "RAY_AUTH_MODE": "token",
    }
    assert ray_security.asks_for_token("127.0.0.1:1", around, timeout_seconds=2) is None
    done = subprocess.run
    seen: dict[str, str] = {}

    def look(*args: Any, env: dict[str, str], **how: Any) -> Any:
        seen.update(env)
        return done([sys.executable, "-c", "print('REFUSED')"], **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_security.subprocess, "run", look)
        assert ray_security.asks_for_token("127.0.0.1:1", around) is True
    assert {name: value for name, value in seen.items() if "AUTH" in name} == {"RAY_AUTH_MODE": "disabled"}


@pytest.mark.parametrize(
    ("served", "joined", "said"),
    [
        ("tls", "0", "the cluster at .* has TLS, and this environment has not; set RAY_USE_TLS=1"),
        ("plain", "1", "this environment has TLS .*, and the cluster at .* has not"),
        ("tls", "1", None),
        ("plain", "0", None),
    ],
)
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_tls_at_one_end_alone_is_told_before_anything_is_asked(
    scheme: str, served: str, joined: str, said: str | None, tmp_path: Path
) -> None:
    """A server that wants to see certificates, as Ray's, and one that speaks first, as HTTP/2 does. There is no Ray to ask them anything else."""
    (tmp_path / "ray.py").write_text("raise ImportError('no Ray here')")
    around = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "RAY_USE_TLS": joined}
    _, context = contexts(*[node(tmp_path, "ours", "one", ["127.0.0.1"])] * 2)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    if served == "tls":
                        context.wrap_socket(connection, server_side=True).close()
                    else:
                        connection.sendall(b"\0\0\0\4\0\0\0\0\0")
                        connection.recv(65536)

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"{scheme}127.0.0.1:{server.getsockname()[1]}"
        if said is None:
            assert ray_security.asks_for_token(address, around, timeout_seconds=300) is None
        else:
            with pytest.raises(ConfigError, match=said):
                ray_security.asks_for_token(address, around, timeout_seconds=300)
        thread.join(300)


@pytest.mark.parametrize(
    ("environment", "found", "said"),
    [
        ({}, "", "it may ask for a token .* or for TLS"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t0ken"}, "REFUSED", r"it refuses the token of this environment \(RAY_AUTH_TOKEN\)"),
        ({"RAY_AUTH_MODE": "token", "HOME": "/home/me"}, "REFUSED", r"\(/home/me/.ray/auth_token\)"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/a"},
            "UNKNOWN",
            r"likely the token \(/a\) .*, the certificates \(RAY_TLS_\*\)",
        ),
    ],
)
def test_why_a_cluster_was_not_joined_is_guessed_at(
    environment: dict[str, str], found: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_security, "_ask", lambda address, around, seconds: found)
    words = ray_security.why_not_joined("h:1", environment)
    assert re.search(said, words), words
    assert "t0ken" not in words


def test_a_token_that_is_there_is_used_where_nobody_said_otherwise(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    written(tmp_path / ".ray" / "auth_token", "t0ken")
    home = {"HOME": str(tmp_path)}
    assert ray_security.use_token(home) == ray_security.use_token({"RAY_AUTH_TOKEN": "t0ken"}) == {"RAY_AUTH_MODE": "token"}
    for settled in ({**home, "RAY_AUTH_MODE": "disabled"}, {**home, "RAY_AUTH_MODE": ""}, {"HOME": "/nowhere"}):
        assert ray_security.use_token(settled) == {}


# ---- joining, with a Ray that fails
def test_a_token_that_nobody_spoke_of_goes_only_to_a_cluster_that_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".ray").mkdir()
    written(tmp_path / ".ray" / "auth_token", "t0ken")
    around = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    monkeypatch.setattr(ray_connecting, "_check_reachable", lambda *asked: None)
    for insecure, asked in ((False, ["token"]), (True, [])):
        seen: list[str] = []
        monkeypatch.setattr(os, "environ", dict(around))
        monkeypatch.setattr(ray_connecting, "asks_for_token", lambda address, how, seen=seen: seen.append(how["RAY_AUTH_MODE"]) or False)
        monkeypatch.setitem(sys.modules, "ray", None)  # whoever joins fails
        monkeypatch.setattr(ray_connecting.importlib.util, "find_spec", lambda name: "here")
        config, _ = resolve("CartPole-v1", {"engine": "ray", "ray.address": "h:1", "ray.allow_insecure_cluster": insecure})
        with pytest.raises(ConfigError, match="import of ray" if insecure else "token"):
            ray_connecting.connect(config, lambda warning: None)
        assert seen == asked


@pytest.mark.parametrize(("address", "said"), [(None, "started on this machine"), ("auto", "joined at auto")])
def test_whatever_ray_raises_as_it_begins_is_one_line_without_secrets(
    address: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(*args: Any, **how: Any) -> None:
        raise Exception("The current node timed out during startup.\nRAY_AUTH_TOKEN=c0ffee")

    fake = types.ModuleType("ray")
    fake.__spec__ = importlib.machinery.ModuleSpec("ray", None)
    monkeypatch.setattr(fake, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(os, "environ", {**os.environ, **SAFE})
    monkeypatch.setattr(ray_connecting, "asks_for_token", lambda *asked: True)
    monkeypatch.setattr(ray_connecting, "_check_there_is_one", lambda: None)
    monkeypatch.setattr(ray_connecting, "why_not_joined", lambda *asked: "; perhaps the token")
    monkeypatch.delitem(os.environ, "RAY_ADDRESS", raising=False)
    config, _ = resolve("CartPole-v1", {"engine": "ray", "ray.address": address})
    with pytest.raises(ConfigError, match=f"no cluster could be {said}: The current node timed out") as refused:
        ray_connecting.connect(config, print)
    assert "c0ffee" not in str(refused.value)
    assert str(refused.value).endswith("; is it too busy for Ray to start in time?" if address is None else "; perhaps the token")
    assert refused.value.__suppress_context__, "the cause is not redacted"


@pytest.mark.parametrize(
    ("address", "variable", "said"),
    [
        ("auto", None, "--address auto joins the cluster of this machine, and none runs here: `ray start --head` starts one"),
        ("auto", "127.0.0.1:1", "at 127.0.0.1:1, which RAY_ADDRESS names: .*`unset RAY_ADDRESS`"),
        (None, "127.0.0.1:1", "at 127.0.0.1:1, which RAY_ADDRESS names: .*`unset RAY_ADDRESS`"),
        (None, "http://127.0.0.1:8265", "at http://127.0.0.1:8265, which RAY_ADDRESS names"),
        ("127.0.0.1:1", "127.0.0.1:2", "at 127.0.0.1:1, which --address names: .*; without --address this machine has its own"),
    ],
)
def test_an_address_where_no_cluster_is_says_in_one_line_what_to_do(
    address: str | None, variable: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "ray" / "ray_current_cluster", "127.0.0.1:1")  # of a cluster that is gone
    monkeypatch.setattr(ray_connecting, "Path", lambda place: Path(tmp_path if str(place) == "/proc" else place))
    around = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    monkeypatch.setattr(os, "environ", {**around, "RAY_TMPDIR": str(tmp_path), **({"RAY_ADDRESS": variable} if variable else {})})
    config, _ = resolve("CartPole-v1", {"engine": "ray", "ray.address": address})
    with pytest.raises(ConfigError, match=said) as refused:
        ray_connecting.connect(config, print)
    assert "\n" not in str(refused.value)
    assert "CVE" not in str(refused.value), "that is no matter of tokens"


def test_clusters_of_this_machine_are_found_by_their_nodes_and_by_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "ray" / "ray_current_cluster", "127.0.0.1:1\n")
    written(tmp_path / "7" / "cmdline", "/site/ray/core/src/ray/raylet/raylet\0--gcs-address=10.0.0.1:6379\0")
    written(tmp_path / "8" / "cmdline", "vi\0--gcs-address=10.0.0.2:6379\0")
    monkeypatch.setattr(ray_connecting, "Path", lambda place: Path(tmp_path if str(place) == "/proc" else place))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert ray_connecting.local_clusters() == ["10.0.0.1:6379", "127.0.0.1:1"]


# ---- saying
def test_a_token_comes_into_no_text(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": written(tmp_path / "token", "c0ffee")}
    said = redact(f"joined with c0ffee, {environment}", environment)
    assert said == f"joined with ***, {environment}"
    os.environ["RAY_AUTH_TOKEN"] = "of-this-process"
    try:
        assert redact("say of-this-process") == "say ***"
    finally:
        del os.environ["RAY_AUTH_TOKEN"]
    lost = {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}
    assert redact("nothing to hide", lost) == "nothing to hide"


def test_private_keys_come_into_no_text(tmp_path: Path) -> None:
    key = make_secrets(tmp_path)[2].read_text()
    assert redact(f"before {key} after", {}).split() == ["before", "***", "after"]
    assert redact(f"cut {key[:80]}", {}) == "cut ***"


forms: list[Any] = [
    "Authorization: Bearer {}", "authorization: bearer {}", "RAY_AUTH_TOKEN={}", "export RAY_AUTH_TOKEN='{}'", '"RAY_AUTH_TOKEN": "{}"',
    "{{'RAY_AUTH_TOKEN': '{}', 'RAY_AUTH_MODE': 'token'}}", "Cookie: ray-authentication-token={}; a=b",
]  # fmt: skip


@pytest.mark.parametrize("form", forms)
@given(token=st.text("0123456789abcdefghXYZ._~+/-", min_size=8, max_size=80))
def test_a_token_is_hidden_wherever_it_is_shown_as_one(form: str, token: str) -> None:
    hidden = redact(form.format(token), {})
    assert token not in hidden
    assert hidden == form.format("***")


def test_what_is_no_secret_stays() -> None:
    text = "weights_sha256 0a1b, RAY_AUTH_TOKEN_PATH=/a/token, RAY_AUTH_MODE=token, the bearer\nof a name"
    assert redact(text, {}) == text


def test_errors_of_other_processes_are_raised_without_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "c0ffee")
    facts: dict[str, Any] = {"message": "say c0ffee", "traceback": "line c0ffee", "report": {"error": "c0ffee", "step": 3}}
    fault = rebuild_error({**facts, "error": "EnvironmentFault"})
    assert isinstance(fault, EnvironmentFault)
    assert (str(fault), fault.report) == ("say ***", {"error": "***", "step": 3, "traceback": "line ***"})
    assert str(rebuild_error({**facts, "error": "KeyError"})) == "KeyError: say ***\nline ***"
    assert str(rebuild_error({**facts, "error": "ConfigError"})) == "say ***"
