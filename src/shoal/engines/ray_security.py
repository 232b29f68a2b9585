"""What keeps a Ray cluster to its owner: a token that every call carries, TLS between all nodes, and a refusal of clusters that ask for neither.

Who enforces what (Ray 2.60): a cluster that was started with RAY_AUTH_MODE=token refuses every call without its token, also that of a driver. The other way round nobody
complains: a driver with a token joins a cluster that asks for none. So a driver looks at its own environment (`check_cluster`), and asks the cluster without
a token, in a process of its own (`asks_for_token`). With TLS, both ends of every gRPC connection show a certificate that the run's own authority signed, and names or
addresses must fit; the HTTP of Ray's dashboard is not encrypted.

All of it must be in the environment before Ray is imported: Ray reads it once. Ray is imported nowhere here.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError

TOKEN, AUTHORITY, AUTHORITY_KEY, CERTIFICATE, KEY = "token", "ca.crt", "ca.key", "tls.crt", "tls.key"
MOST_ADDRESSES = 4096  # in one certificate
AUTHORITY_DAYS, CERTIFICATE_DAYS = 3650, 365
_CLOCKS_DIFFER = timedelta(minutes=10)
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_HIDDEN = "***"
_UNKNOWN = (
    "whether it answers calls that carry none could not be found out: there is no cluster, its certificates are of another authority (RAY_TLS_CA_CERT), "
    "or it was too slow to answer; try again"
)
_SECRETS_IN_TEXT = (
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), _HIDDEN),
    (re.compile(r"(\bbearer\s+)[^\s\"',;]{8,}", re.I), rf"\1{_HIDDEN}"),
    (re.compile(r"(\bRAY_AUTH_TOKEN[\"']?\s*[=:]\s*[\"']?)[^\s\"',;]+"), rf"\1{_HIDDEN}"),
    (re.compile(r"(\bray-authentication-token=)[^\s\"',;]+"), rf"\1{_HIDDEN}"),
)


# ---- making ---------------------------------------------------------------------------------------------------------------
def make_secrets(directory: Path) -> list[Path]:
    """A token and an authority in a directory that its owner alone may enter, each file with mode 0600. What is there already is kept, since a cluster may be
    using it. Raises ConfigError for a directory that others may enter."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (mode := stat.S_IMODE(directory.stat().st_mode)) & 0o077:
        raise ConfigError(
            f"{directory}: others may enter it (mode {mode:04o}), and it is to hold secrets: chmod 700 {directory}, or name another directory"
        )
    token, certificate, key = directory / TOKEN, directory / AUTHORITY, directory / AUTHORITY_KEY
    if not token.exists():
        make_token(token)
    if not (certificate.exists() and key.exists()):
        make_authority(directory)
    return [token, certificate, key]


def make_token(path: Path) -> None:
    """256 random bits as hexadecimal digits, readable by the owner alone."""
    _write_private(path, f"{secrets.token_hex(32)}\n".encode())


def make_authority(directory: Path) -> None:
    """A certificate authority that signs the nodes of one cluster: `ca.crt` and `ca.key`. Raises ConfigError without the package `cryptography`."""
    x509, hashes, serialization, ec = _cryptography()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "shoal cluster")])
    usage = {name: name in ("key_cert_sign", "crl_sign") for name in _KEY_USES}
    certificate = (
        _builder(x509, name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_private(directory / AUTHORITY_KEY, _key_bytes(serialization, key))
    _write_private(directory / AUTHORITY, certificate.public_bytes(serialization.Encoding.PEM))


def make_certificate(authority: Path, out: Path, names: Sequence[str]) -> None:
    """`tls.crt` and `tls.key` of a node in `out`, signed by the authority in the other directory, whose `ca.crt` is put beside them.

    Args:
      names: host names and IP addresses at which others reach the node, or an IPv4 network such as 10.0.0.0/28, all of whose addresses are meant; Ray connects by
        address, and TLS compares.
    Raises:
      ConfigError: a name that is none, an authority that is missing or damaged, or the package `cryptography` missing.
    """
    x509, hashes, serialization, ec = _cryptography()
    names = [each for name in names for each in _addresses(name)]
    wrong = [name for name in names if not _is_address(name) and not _HOST.fullmatch(name)]
    if wrong or not names:
        raise ConfigError(f"name: {wrong[0] if wrong else 'nothing'!r} is neither a host name nor an IP address")
    try:
        signer = x509.load_pem_x509_certificate((authority / AUTHORITY).read_bytes())
        signing_key = serialization.load_pem_private_key((authority / AUTHORITY_KEY).read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{authority} holds no authority, {AUTHORITY} and {AUTHORITY_KEY} ({error}); `shoal deploy secrets DIR` makes one"
        ) from error
    alternatives = [
        x509.IPAddress(ipaddress.ip_address(name)) if _is_address(name) else x509.DNSName(name) for name in dict.fromkeys(names)
    ]
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "shoal node")])
    uses = [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH, x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        _builder(x509, subject, signer.subject, key.public_key(), CERTIFICATE_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signing_key, hashes.SHA256())
    )
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write_private(out / KEY, _key_bytes(serialization, key))
    _write_private(out / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM))
    _write_private(out / AUTHORITY, (authority / AUTHORITY).read_bytes())


def own_names() -> list[str]:
    """The names and addresses of this host: `localhost`, its host name, and every IPv4 address of its interfaces."""
    names = ["localhost", "127.0.0.1", socket.gethostname()]
    with contextlib.suppress(OSError):
        names += local_addresses(Path("/proc/net/fib_trie").read_text(encoding="ascii"))
    return list(dict.fromkeys(names))


def local_addresses(fib_trie: str) -> list[str]:
    """The addresses that the kernel's routing table calls this host's own, out of the text of /proc/net/fib_trie."""
    return list(dict.fromkeys(re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", fib_trie)))


_KEY_USES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
    "encipher_only", "decipher_only",
)  # fmt: skip


def _cryptography() -> tuple[Any, Any, Any, Any]:
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ConfigError(f"certificates need the package cryptography ({error}): pip install 'cryptography>=44'") from error
    return x509, hashes, serialization, ec


def _builder(x509: Any, subject: Any, issuer: Any, public_key: Any, days: int) -> Any:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + timedelta(days=days))
    )


def _key_bytes(serialization: Any, key: Any) -> bytes:
    content: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return content


def _addresses(name: str) -> list[str]:
    """The addresses of hosts in a small network; a name that is none as it is."""
    with contextlib.suppress(ValueError):
        network = ipaddress.IPv4Network(name)
        if "/" in name and network.num_addresses <= MOST_ADDRESSES:
            return [str(address) for address in network.hosts()]
    return [name]


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _write_private(path: Path, content: bytes) -> None:
    """The file is whole or not there, and nobody else could read it at any moment."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    aside.replace(path)


# ---- starting and joining ------------------------------------------------------------------------------------------------------
def local_environment(directory: Path) -> dict[str, str]:
    """What the environment of a Ray cluster must say that shoal starts on this host, and that of its drivers: token and TLS on, and workers as
    important as any other program.

    The secrets are made in `directory`, which is a private one that lasts as long as the cluster, and no part of a run. The authority's key is not kept: it
    has no other node to sign.
    """
    make_secrets(directory)
    node = directory / "node"
    make_certificate(directory, node, own_names())
    (directory / AUTHORITY_KEY).unlink()
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "",  # it would count before the file
        "RAY_AUTH_TOKEN_PATH": str(directory / TOKEN),
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(node / CERTIFICATE),
        "RAY_TLS_SERVER_KEY": str(node / KEY),
        "RAY_TLS_CA_CERT": str(node / AUTHORITY),
        "RAY_worker_niceness": "0",
    }


def token_file(environment: Mapping[str, str]) -> Path | None:
    """The file that Ray would take its token from, where RAY_AUTH_TOKEN does not hold it: RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token."""
    if environment.get("RAY_AUTH_TOKEN"):
        return None
    if environment.get("RAY_AUTH_TOKEN_PATH"):
        return Path(environment["RAY_AUTH_TOKEN_PATH"])
    return Path(environment["HOME"]) / ".ray" / "auth_token" if environment.get("HOME") else None


def find_token(environment: Mapping[str, str]) -> str | None:
    """The token that Ray would find in this environment, in its order, or None. Raises ConfigError for a path that leads to none, where Ray would abort."""
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    file = token_file(environment)
    try:
        token = "" if file is None else file.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        if environment.get("RAY_AUTH_TOKEN_PATH"):
            raise ConfigError(
                f"RAY_AUTH_TOKEN_PATH: no token can be read from {file} ({getattr(error, 'strerror', None) or error})"
            ) from error
        return None
    if not token and environment.get("RAY_AUTH_TOKEN_PATH"):
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH: {file} is empty; `shoal deploy secrets DIR` makes a token")
    return token or None


def use_token(environment: Mapping[str, str]) -> dict[str, str]:
    """What the environment is to say besides: token authentication is on where RAY_AUTH_MODE is not set and there is a token, as `ray start` has it. A driver
    that joins by an address would go without."""
    return {"RAY_AUTH_MODE": "token"} if "RAY_AUTH_MODE" not in environment and find_token(environment) is not None else {}


def check_cluster(environment: Mapping[str, str], allow_insecure: bool, ask: Callable[[], bool | None]) -> list[str]:
    """What to warn of before a driver with this environment joins a cluster.

    Args:
      allow_insecure: `--allow-insecure-cluster`: what would be refused is a warning.
      ask: whether the cluster refuses calls without a token, see `asks_for_token`; None where it cannot be found out. Not called where this
        environment settles it.
    Raises:
      ConfigError: the cluster is joined without a token, asks for none, or may ask for none; says why that is no cluster to train on.
    """
    why = None
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        why = "RAY_AUTH_MODE is not `token`"
    elif find_token(environment) is None:
        why = "RAY_AUTH_MODE is `token`, but neither RAY_AUTH_TOKEN nor RAY_AUTH_TOKEN_PATH nor ~/.ray/auth_token has one"
    else:
        why = {True: None, False: "it answers calls that carry none", None: _UNKNOWN}[ask()]
    danger = "whoever reaches the ports of such a cluster can run any code on all of its nodes (CVE-2023-48022)"
    if why and not allow_insecure:
        would = "might" if why == _UNKNOWN else "would"
        raise ConfigError(
            f"ray.address: this Ray cluster {would} be joined without token authentication ({why}), and {danger}. Start it, and join it, with RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH=FILE (Ray 2.52 or newer; `shoal deploy secrets DIR` makes the file); or give --allow-insecure-cluster, on a network that is yours alone"
        )
    has = "may have" if why == _UNKNOWN else "has"
    warnings = [f"the Ray cluster {has} no token authentication ({why}): {danger}"] if why else []
    if not has_tls(environment):
        warnings.append(
            "the Ray cluster is joined without TLS (RAY_USE_TLS): whoever reads its network reads the token and all that is sent"
        )
    file = token_file(environment)
    if not why and file is not None and file.stat().st_mode & 0o077:
        warnings.append(f"others on this host may read the token in {file}: chmod 600 {file}")
    return warnings


def has_tls(environment: Mapping[str, str]) -> bool:
    """Whether Ray encrypts what it sends, in this environment, and asks who is there."""
    return environment.get("RAY_USE_TLS", "0").lower() in ("1", "true")


_ASK = """
import socket, ssl, sys
address, has_tls = sys.argv[1], sys.argv[2] == "tls"

def speaks_tls(place):
    host, _, port = place.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host.strip("[]"), int(port)), 10) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # it speaks TLS, and wants to see a certificate
    except (OSError, ValueError):
        return None

try:
    place = address.removeprefix("ray://")
    if address == "auto":
        from ray._private import services
        place = services.canonicalize_bootstrap_address_or_die(address)
    speaks = speaks_tls(place)
    if speaks is not None and speaks != has_tls:
        print("TLS" if speaks else "PLAIN")
        sys.exit()
    if address.startswith("ray://"):
        import grpc
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc
        ping = ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING)
        driver = ray_client_pb2_grpc.RayletDriverStub(init_grpc_channel(address.removeprefix("ray://")))
        driver.ClusterInfo(ping, timeout=10, metadata=[("client_id", "shoal")])
    else:
        from ray._raylet import GcsClient
        GcsClient(address=place).internal_kv_keys(b"shoal", None, timeout=10)
except Exception as error:
    print("REFUSED" if "authenticat" in f"{type(error).__name__} {error}".lower() else "UNKNOWN")
else:
    print("ANSWERED")
"""


def asks_for_token(address: str, environment: Mapping[str, str], timeout_seconds: float = 60.0) -> bool | None:
    """Whether the cluster at `HOST:PORT`, `auto` or `ray://HOST:PORT` refuses a call that carries no token; None where it cannot be found out (nobody is there).

    Waits for a process that asks it as a driver without token would; one that does not answer in time is killed.

    Raises:
      ConfigError: one of the two has TLS, the cluster or this environment.
    """
    bare = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH_")}
    said = _ask(address, {**bare, "RAY_AUTH_MODE": "disabled"}, timeout_seconds)
    if said == "TLS":
        raise ConfigError(
            f"ray.address: the cluster at {address} has TLS, and this environment has not; set RAY_USE_TLS=1, and RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY "
            "and RAY_TLS_CA_CERT to files that `shoal deploy certificate` makes with the authority of that cluster"
        )
    if said == "PLAIN":
        raise ConfigError(
            f"ray.address: this environment has TLS (RAY_USE_TLS), and the cluster at {address} has not; start it with TLS too, or `unset RAY_USE_TLS`"
        )
    return {"REFUSED": True, "ANSWERED": False}.get(said)


def why_not_joined(address: str, environment: Mapping[str, str], timeout_seconds: float = 60.0) -> str:
    """What may be wrong where Ray could not join a cluster, to be added to what it said. Waits as `asks_for_token`."""
    if environment.get("RAY_AUTH_MODE", "").lower() != "token":
        return "; it may ask for a token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH=FILE) or for TLS (RAY_USE_TLS=1)"
    source = "RAY_AUTH_TOKEN" if (file := token_file(environment)) is None else str(file)
    if _ask(address, environment, timeout_seconds) == "REFUSED":
        return f"; it refuses the token of this environment ({source}), which has to be the one that it was started with"
    return f"; likely the token ({source}) is not the one that it was started with, the certificates (RAY_TLS_*) are of another authority, or it is too slow"


def _ask(address: str, environment: Mapping[str, str], timeout_seconds: float) -> str:
    """What a process with this environment finds: REFUSED or ANSWERED of its call; TLS or PLAIN, where that is what the cluster speaks and the environment
    does not; else something else."""
    command = [sys.executable, "-c", _ASK, address, "tls" if has_tls(environment) else "plain"]
    try:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=timeout_seconds, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip().rpartition("\n")[2]


# ---- saying ----------------------------------------------------------------------------------------------------------------------
def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without secrets: this environment's token (default: the process's own), whatever a call or a variable would show as one, and private keys."""
    if token := _own_token(environment):
        text = text.replace(token, _HIDDEN)
    for pattern, hidden in _SECRETS_IN_TEXT:
        text = pattern.sub(hidden, text)
    return text


def redact_all(value: Any) -> Any:
    """What was JSON, with every text in it redacted, those that are keys too."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact_all(key): redact_all(each) for key, each in value.items()}
    return [redact_all(each) for each in value] if isinstance(value, (list, tuple)) else value


def secret_spans(text: str) -> list[tuple[int, int]]:
    """Where `redact` hides something: begin and end of each."""
    token = _own_token(None)
    patterns = [*([re.compile(re.escape(token))] if token else []), *(pattern for pattern, _ in _SECRETS_IN_TEXT)]
    return [found.span() for pattern in patterns for found in pattern.finditer(text)]


def _own_token(environment: Mapping[str, str] | None) -> str | None:
    with contextlib.suppress(ConfigError):
        return find_token(os.environ if environment is None else environment)
    return None
