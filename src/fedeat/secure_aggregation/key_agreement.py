"""Secrets between two clients (X25519, HKDF-SHA256), and envelopes that only the other one opens (ChaCha20-Poly1305).

A secret is derived for one purpose in one round of one roster: the roster's digest is the salt, so that two clients
that were shown different rosters have no secret in common and their masks do not cancel.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedeat.errors import UpdateError

KEY_BYTES = 32


def fresh_key() -> bytes:
    """A private key, from the operating system's randomness: no seed of a run may tell it."""
    return os.urandom(KEY_BYTES)


def public_key(private: bytes) -> bytes:
    """The public half, 32 bytes."""
    key = X25519PrivateKey.from_private_bytes(private).public_key()
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def agree(private: bytes, public: bytes, *, salt: bytes, purpose: str) -> bytes:
    """The secret that the owners of two keys share for a purpose.

    Args:
        private: one's own key.
        public: the other's.
        salt: digest of the roster.
        purpose: what it is for, the same words on both sides.

    Raises:
        UpdateError: the public key is none.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise UpdateError("a public key of the roster is no X25519 key") from None
    return HKDF(hashes.SHA256(), KEY_BYTES, salt, purpose.encode()).derive(shared)


def is_usable(public: bytes) -> bool:
    """Whether others can agree with the owner of a public key on a secret; with one of low order nobody can."""
    try:
        agree(fresh_key(), public, salt=b"", purpose="none")
    except UpdateError:
        return False
    return True


SEAL_BYTES = 16
"""By which an envelope is longer than its content."""


def seal(secret: bytes, content: bytes) -> bytes:
    """An envelope; a secret seals one envelope alone, so its nonce is zero."""
    return ChaCha20Poly1305(secret).encrypt(bytes(12), content, None)


def unseal(secret: bytes, envelope: bytes) -> bytes:
    """What is in an envelope.

    Raises:
        UpdateError: it was sealed with another secret, or changed on its way.
    """
    try:
        return ChaCha20Poly1305(secret).decrypt(bytes(12), envelope, None)
    except (InvalidTag, ValueError):
        raise UpdateError("the envelope with shares does not open: it was changed, or is for another roster") from None
