"""Keys: who may read them, what they prove, and what is refused."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from fedeat.errors import FedeatError
from fedeat.flower import keys


def test_private_keys_are_their_owners_alone(tmp_path: Path) -> None:
    written = [*keys.make_server_keys(tmp_path), *keys.make_node_key(tmp_path, "clinic-a")]
    secrets = [path for path in written if path.suffix == ".key"]
    assert {path.name for path in secrets} == {"ca.key", "server.key", "clinic-a.key"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets)


def test_the_authority_proves_the_server_on_its_hosts(tmp_path: Path) -> None:
    keys.make_server_keys(tmp_path, ["federation.example.org", "10.1.2.3"])
    authority = x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes())
    server = x509.load_pem_x509_certificate((tmp_path / "server.pem").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "federation.example.org"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1", "10.1.2.3"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))


def test_a_new_server_certificate_keeps_the_authority(tmp_path: Path) -> None:
    keys.make_server_keys(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("ca.pem", "ca.key", "server.pem")}
    keys.make_server_keys(tmp_path, ["other"])
    assert (tmp_path / "ca.pem").read_bytes() == before["ca.pem"]
    assert (tmp_path / "ca.key").read_bytes() == before["ca.key"]
    assert (tmp_path / "server.pem").read_bytes() != before["server.pem"]


def test_half_an_authority_is_refused(tmp_path: Path) -> None:
    keys.make_server_keys(tmp_path)
    (tmp_path / "ca.key").unlink()
    with pytest.raises(FedeatError, match=r"ca.pem is there and .*ca.key is not"):
        keys.make_server_keys(tmp_path)


def test_a_nodes_key_is_never_overwritten_and_its_name_names_files(tmp_path: Path) -> None:
    keys.make_node_key(tmp_path, "a")
    with pytest.raises(FedeatError, match="is there already"):
        keys.make_node_key(tmp_path, "a")
    for name in ("../x", "", "a/b", ".a"):
        with pytest.raises(FedeatError, match="a node's name names files"):
            keys.make_node_key(tmp_path, name)


def test_a_public_key_is_read_and_others_are_refused(tmp_path: Path) -> None:
    _, public = keys.make_node_key(tmp_path, "a")
    assert keys.read_public_key(public).startswith(b"-----BEGIN PUBLIC KEY-----")
    public.write_text("ssh-ed25519 nonsense")
    with pytest.raises(FedeatError, match="holds no public key"):
        keys.read_public_key(public)
