"""Keys of a federation: its certificate authority, the server's certificate, and a key pair for each node.

    ca.pem          everybody's: what proves the server to nodes
    ca.key          whoever runs the federation: signs server certificates; may be kept off line
    server.pem/key  the server's certificate and private key
    nodes/NAME.pub  the server's: the nodes that may join
    NAME.key        the node's alone

A node that makes its own key and sends only NAME.pub never lets its private key travel.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedeat.errors import FedeatError
from fedeat.records import make_directory

_CURVE = ec.SECP384R1()
_HASH = hashes.SHA384()
_YEARS_CA, _YEARS_SERVER = 10, 2
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def make_server_keys(directory: Path, hosts: Sequence[str] = ()) -> list[Path]:
    """A certificate authority, where there is none yet, and a server certificate that it signs.

    Args:
        directory: where they go; made where it does not exist.
        hosts: names and addresses by which nodes reach the server, beside this machine's own.

    Returns:
        The files that were written.

    Raises:
        FedeatError: only one half of the authority is there, or a host is no name and no address.
    """
    make_directory(directory)
    authority, secret = directory / "ca.pem", directory / "ca.key"
    written = []
    if authority.exists() != secret.exists():
        there, missing = (authority, secret) if authority.exists() else (secret, authority)
        raise FedeatError(f"{there} is there and {missing} is not. Put it back, or remove both to begin anew.")
    if not authority.exists():
        key = ec.generate_private_key(_CURVE)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedeat federation")])
        builder = _builder(name, name, key.public_key(), _YEARS_CA)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(signs=True), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        _write_secret(secret, _pem(key))
        authority.write_bytes(builder.sign(key, _HASH).public_bytes(serialization.Encoding.PEM))
        written += [authority, secret]
    issuer = x509.load_pem_x509_certificate(authority.read_bytes())
    signer = serialization.load_pem_private_key(secret.read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(_CURVE)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedeat server")])
    builder = _builder(name, issuer.subject, key.public_key(), _YEARS_SERVER)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    names = [_general_name(host) for host in dict.fromkeys((*LOOPBACK, *hosts))]
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False
    )
    _write_secret(directory / "server.key", _pem(key))
    (directory / "server.pem").write_bytes(builder.sign(signer, _HASH).public_bytes(serialization.Encoding.PEM))
    return [*written, directory / "server.pem", directory / "server.key"]


def make_node_key(directory: Path, name: str) -> tuple[Path, Path]:
    """A node's key pair.

    Args:
        directory: where they go: NAME.key, and nodes/NAME.pub for the server.
        name: of the node: letters, digits, _ . and -.

    Returns:
        The private and the public file.

    Raises:
        FedeatError: the name is no file name, or the node has a key already.
    """
    if not _NAME.fullmatch(name):
        raise FedeatError(f"node {name!r}: a node's name names files. Expected letters, digits, _ . and -.")
    secret, public = directory / f"{name}.key", directory / "nodes" / f"{name}.pub"
    for path in (secret, public):
        if path.exists():
            raise FedeatError(f"{path} is there already. Choose another name, or remove it to make a new key.")
    make_directory(public.parent)
    key = ec.generate_private_key(_CURVE)
    form = serialization.PrivateFormat.OpenSSH
    _write_secret(secret, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    openssh = serialization.Encoding.OpenSSH
    public.write_bytes(key.public_key().public_bytes(openssh, serialization.PublicFormat.OpenSSH) + b"\n")
    return secret, public


def read_public_key(path: Path) -> bytes:
    """A node's public key as Flower registers it.

    Raises:
        FedeatError: the file holds no such key.
    """
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except Exception as error:
        raise FedeatError(f"{path} holds no public key: {error}. Expected what fedeat keys --node writes.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise FedeatError(f"{path} holds a key of another kind. Expected what fedeat keys --node writes.")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, years: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks of two machines differ
        .not_valid_after(now + datetime.timedelta(days=365 * years))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode())
    except UnicodeError:
        raise FedeatError(f"--host {host}: expected a name or an address by which nodes reach the server.") from None


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_secret(path: Path, content: bytes) -> None:
    """Writes a file that from its first moment only its owner may read."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
