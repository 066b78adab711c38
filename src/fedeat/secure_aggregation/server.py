"""The server's side: it adds up masked vectors and takes the masks off their sum, never off one of them."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from fedeat.aggregation.secure import Contribution
from fedeat.errors import QuorumError, UpdateError
from fedeat.secure_aggregation import fixed_point, masks, secret_sharing
from fedeat.secure_aggregation.client import LEAST_CLIENTS, threshold
from fedeat.secure_aggregation.fixed_point import Words
from fedeat.secure_aggregation.key_agreement import SEAL_BYTES, agree, is_usable, public_key
from fedeat.secure_aggregation.messages import (
    Advertise,
    Answer,
    Ask,
    Keys,
    Mask,
    Masked,
    Request,
    Revealed,
    Roster,
    Share,
    Shares,
    Unmask,
    digest,
    mask_purpose,
)

A = TypeVar("A", Keys, Shares, Masked, Revealed)


class Sums:
    """Secure sums over the clients of one round: a `SecureSum`.

    A client that fails to answer is left out of what follows, by name and reason; the sum it was masked into is
    recovered, as long as `threshold` clients answer.

    Attributes:
        present: who still answers.
        counted: whose vectors are in the newest sum.
        lost: client -> why it is not present any more.
    """

    def __init__(self, ask: Ask, clients: Sequence[int], *, norm_bound: float, sums: int) -> None:
        """Has the clients exchange keys and shares for all sums of the round.

        Args:
            ask: reaches them.
            clients: at least three.
            norm_bound: > 0, longest update of a client.
            sums: most sums that will be asked for.

        Raises:
            QuorumError: too few answer.
        """
        self._ask, self._bound, self._sums = ask, norm_bound, sums
        self.present: tuple[int, ...] = tuple(sorted(clients))
        self.counted: tuple[int, ...] = ()
        self.lost: dict[int, str] = {}
        self._number = 0
        self._needed = LEAST_CLIENTS
        context = os.urandom(32)
        keys = self._collect({client: Advertise(context, sums) for client in self.present}, Keys)
        self._roster: Roster = self._fit(keys)
        self._needed = max(LEAST_CLIENTS, threshold(len(self._roster)))
        self._settle(self._roster)
        self._salt = digest(context, self._roster)
        shares = self._collect({client: Share(self._roster) for client in self.present}, Shares)
        expected = 2 * secret_sharing.SHARE_BYTES * sums + SEAL_BYTES
        whole = {
            client: answer
            for client, answer in shares.items()
            if set(answer.envelopes) == set(self._roster) - {client}
            and all(len(envelope) == expected for envelope in answer.envelopes.values())
        }
        self._settle(whole)
        self._envelopes = {
            to: {sender: shares[sender].envelopes[to] for sender in self.present if sender != to} for to in self.present
        }

    def keep(self, clients: Collection[int]) -> None:
        """Goes on with these clients alone.

        Raises:
            QuorumError: they are too few.
        """
        self._settle(dict.fromkeys(clients))

    def __call__(self, contribution: Contribution) -> Tensor:
        """The sum of a contribution over all clients that answer.

        Raises:
            QuorumError: too few answer.
            UpdateError: shares do not fit together, a client left its limits, or all sums have been used.
        """
        number, participants = self._number, self.present
        if number >= self._sums:
            raise UpdateError(f"all {self._sums} secure sums of this round have been used")
        self._number += 1
        asked = {
            client: Mask(number, participants, contribution, self._envelopes[client] if number == 0 else {})
            for client in participants
        }
        vectors = self._collect(asked, Masked)
        length = _most_common(len(vector.words) for vector in vectors.values())
        for client in [client for client, vector in vectors.items() if len(vector.words) != length]:
            self.lost[client] = f"sent a vector of another length than the {length} of the others"
            del vectors[client]
        self._settle(vectors)
        survivors = self.counted = self.present
        dropped = tuple(client for client in participants if client not in survivors)
        revealed = self._collect({client: Unmask(number, survivors, dropped) for client in survivors}, Revealed)
        whole = {
            client: answer
            for client, answer in revealed.items()
            if set(answer.seeds) == set(survivors) and set(answer.keys) == set(dropped)
        }
        self._settle(whole)
        total = np.zeros(length, dtype=np.uint64)
        for client in survivors:
            total += vectors[client].words
            seed = self._joined({owner: answer.seeds[client] for owner, answer in whole.items()}, client)
            if hashlib.sha256(seed).digest() != self._roster[client].commitments[number]:
                raise UpdateError(f"the shares of client {client}'s self mask do not fit: some client sent a wrong one")
            total -= masks.stream(seed, length)
        for client in dropped:
            key = self._joined({owner: answer.keys[client] for owner, answer in whole.items()}, client)
            total += self._masks_of(client, key, survivors, length)
        return fixed_point.decode(total, contribution.limits(self._bound), len(self._roster), len(survivors))

    def _masks_of(self, client: int, key: bytes, survivors: Sequence[int], length: int) -> Words:
        """What a client that dropped out would have added to cancel the masks that others share with it."""
        number = self._number - 1
        if public_key(key) != self._roster[client].masks[number]:
            raise UpdateError(f"the shares of client {client}'s mask key do not fit: some client sent a wrong one")
        seeds = {
            peer: agree(
                key, self._roster[peer].masks[number], salt=self._salt, purpose=mask_purpose(number, client, peer)
            )
            for peer in survivors
        }
        return masks.pairwise(client, seeds, length)

    def _joined(self, parts: Mapping[int, bytes], client: int) -> bytes:
        chosen = dict(sorted(parts.items())[: threshold(len(self._roster))])
        try:
            return secret_sharing.join(chosen)
        except UpdateError as error:
            raise UpdateError(f"client {client}: {error}") from None

    def _collect(self, requests: Mapping[int, Request], kind: type[A]) -> dict[int, A]:
        """The answers of the kind asked for; who gives another is lost."""
        found: dict[int, A] = {}
        answers: Mapping[int, Answer | str] = self._ask(requests)
        for client in requests:
            answer = answers.get(client, "did not answer")
            if isinstance(answer, kind):
                found[client] = answer
            else:
                self.lost[client] = answer if isinstance(answer, str) else "answered something else than was asked"
        return found

    def _fit(self, keys: Mapping[int, Keys]) -> Roster:
        """Those whose keys a roster can hold: with one other every client would refuse it, and blame the server."""
        sent = Counter(key for own in keys.values() for key in {own.envelope, *own.masks})
        found = {}
        for client, own in keys.items():
            public = (own.envelope, *own.masks)
            if not len(own.masks) == len(own.commitments) == self._sums:
                self.lost[client] = "sent keys for another number of sums"
            elif len(set(public)) < len(public):
                self.lost[client] = "sent one public key several times, expected a fresh one for each sum"
            elif any(sent[key] > 1 for key in public):
                self.lost[client] = "sent a public key that another client sent too"
            elif not all(map(is_usable, public)):
                self.lost[client] = "sent a public key that agrees on no secret, expected one of X25519"
            else:
                found[client] = own
        return found

    def _settle(self, answered: Mapping[int, object]) -> None:
        """Goes on with those who answered.

        Raises:
            QuorumError: they are fewer than a sum needs; names each that was lost and why.
        """
        for client in self.present:
            if client not in answered:
                self.lost.setdefault(client, "sent an incomplete answer")
        self.present = tuple(client for client in self.present if client in answered)
        if len(self.present) < self._needed:
            raise QuorumError(
                f"{len(self.present)} clients are left in the secure sum, expected at least {self._needed} so that it "
                f"hides each of them.{self.reasons()}"
            )

    def reasons(self) -> str:
        """Who was lost and why, for the end of a message."""
        lost = "".join(f"\n  - client {client}: {why}" for client, why in sorted(self.lost.items()))
        return f" Lost:{lost or ' none'}"


def _most_common(values: Iterable[int]) -> int:
    found = list(values)
    return int(max(set(found), key=found.count)) if found else 0
