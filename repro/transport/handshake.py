"""Who is there: a challenge and its answer in both directions, inside TLS 1.3 with certificates both ways where asked.

Either side proves that it knows the shared secret by an HMAC over everything said so far, both nonces included, so that
nothing recorded can be played again and neither side's proof can be thrown back at it. The secret alone keeps strangers
out of a trusted network; it hides nothing and does not protect what follows. TLS does both.

A receiver that does not let a sender in says why, in place of its next word, so that "busy" is not taken for "forbidden".
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import ssl
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

from repro.errors import UserError
from repro.transport.wire import AwayError, PeerError, close, read_exactly

# magic, version, role, backend, slot, session, nonce, oldest
_HELLO: Final = struct.Struct("<6sHBBH16s32sQ")
_CHALLENGE: Final = struct.Struct("<B32s")  # refusal, nonce
_PROOF_BYTES: Final = 32
_WELCOME: Final = struct.Struct("<B32s16sQ")  # refusal, proof, token of the session's memory, window
_TERMS: Final = struct.Struct("<16sQ")  # of a welcome, what its proof is over
_MAGIC: Final = b"PRFAAS"
_VERSION: Final = 3
# What a receiver with no room for another TLS handshake says: a fatal alert, "internal error", in the clear.
_BUSY_ALERT: Final = bytes((21, 3, 3, 0, 2, 2, 80))
_BUSY_REASON: Final = "TLSV1_ALERT_INTERNAL_ERROR"


class Role(IntEnum):
    """What a connection is for."""

    DATA = 0
    CONTROL = 1


class Refusal(IntEnum):
    """Why a receiver does not let a connection in; its text is the sender's to say."""

    NONE = 0
    BUSY = 1
    SECRET = 2
    SENDERS = 3
    CONNECTIONS = 4
    BACKEND = 5
    VERSION = 6

    @property
    def text(self) -> str:
        """In the sender's words."""
        return _REFUSALS[self]


_REFUSALS: Final = {
    Refusal.NONE: "the receiver lets it in",
    Refusal.BUSY: "the receiver is busy: as many connections as it serves at once are in their handshake",
    Refusal.SECRET: "the receiver refused the secret",
    Refusal.SENDERS: "the receiver is busy: as many senders as it takes are there (transport.limits.max_sessions)",
    Refusal.CONNECTIONS: "the receiver takes no more connections of one sender (transport.limits.max_connections)",
    Refusal.BACKEND: "the receiver takes KVCache by another transport.backend",
    Refusal.VERSION: "the receiver speaks another version of the handshake",
}


class RefusedError(PeerError):
    """A peer that is not let in, and is told so."""

    def __init__(self, refusal: Refusal, message: str) -> None:
        self.refusal = refusal
        super().__init__(message)


@dataclass(frozen=True)
class Hello:
    """What a sender says first. `oldest`: transfers below it need no answer any more."""

    role: Role
    slot: int
    session: bytes
    oldest: int = 0
    backend: int = 0


@dataclass(frozen=True)
class Welcome:
    """What it gets back. `token` changes when the receiver has lost its memory of the session."""

    token: bytes
    window_bytes: int


def _proof(secret: bytes, who: bytes, said: bytes) -> bytes:
    return hmac.digest(secret, who + said, "sha256")


def introduce(sock: socket.socket, hello: Hello, secret: bytes, timeout_s: float) -> Welcome:
    """The sender's part.

    Raises:
        PeerError: where the receiver refuses, is too slow, or cannot prove itself; AwayError where it has no room.
    """
    deadline = time.monotonic() + timeout_s
    first = _HELLO.pack(
        _MAGIC,
        _VERSION,
        hello.role,
        hello.backend,
        hello.slot,
        hello.session,
        os.urandom(32),
        hello.oldest,
    )
    challenge = _ask(sock, first, _CHALLENGE.size, deadline)
    said = first + challenge
    answer = _ask(sock, _proof(secret, b"sender", said), _WELCOME.size, deadline)
    _, proof, token, window = _WELCOME.unpack(answer)
    if not hmac.compare_digest(proof, _proof(secret, b"receiver", said + _TERMS.pack(token, window))):
        raise PeerError("the receiver does not know the shared secret")
    return Welcome(token, window)


def _ask(sock: socket.socket, words: bytes, size: int, deadline: float) -> bytes:
    """Say something and read the answer. Raises PeerError, in the receiver's words where it says why it refuses."""
    # A receiver that has refused and closed already fails the sending, but what it said before can be read.
    with contextlib.suppress(OSError):
        sock.sendall(words)
    try:
        first = read_exactly(sock, 1, deadline)
        rest = b"" if first[0] else read_exactly(sock, size - 1, deadline)
    except PeerError as error:
        raise PeerError(f"no answer to the handshake, neither a welcome nor a refusal: {error}") from None
    if first[0]:
        if first[0] not in set(Refusal):
            raise PeerError("what answers is no receiver, or one that speaks TLS only")
        refusal = Refusal(first[0])
        raise (AwayError if refusal in (Refusal.BUSY, Refusal.SENDERS) else PeerError)(refusal.text)
    return bytes(first + rest)


def examine(sock: socket.socket, secret: bytes, timeout_s: float) -> tuple[Hello, bytes]:
    """The receiver's part up to the sender's proof: the hello, and all that was said. Raises PeerError."""
    deadline = time.monotonic() + timeout_s
    first = bytes(read_exactly(sock, _HELLO.size, deadline))
    magic, version, role, backend, slot, session, _nonce, oldest = _HELLO.unpack(first)
    if magic != _MAGIC:
        raise PeerError(f"garbage instead of a handshake ({first[:8]!r})")
    if version != _VERSION:
        raise RefusedError(
            Refusal.VERSION, f"speaks version {version} of the handshake, only {_VERSION} is spoken here"
        )
    if role not in (Role.DATA, Role.CONTROL):
        raise PeerError(f"asks for an unknown role, {role}")
    challenge = _CHALLENGE.pack(Refusal.NONE, os.urandom(32))
    said = first + challenge
    try:
        sock.sendall(challenge)
        proof = bytes(read_exactly(sock, _PROOF_BYTES, deadline))
    except OSError as error:
        raise PeerError(f"closed during the handshake ({error.strerror or error})") from None
    if not hmac.compare_digest(proof, _proof(secret, b"sender", said)):
        raise RefusedError(Refusal.SECRET, "wrong secret")
    return Hello(Role(role), slot, session, oldest, backend), said


def welcome(sock: socket.socket, welcome: Welcome, secret: bytes, said: bytes) -> None:
    """The receiver's last word, which proves that it knows the secret too. Raises PeerError."""
    proof = _proof(secret, b"receiver", said + _TERMS.pack(welcome.token, welcome.window_bytes))
    try:
        sock.sendall(_WELCOME.pack(Refusal.NONE, proof, welcome.token, welcome.window_bytes))
    except OSError as error:
        raise PeerError(f"closed during the handshake ({error.strerror or error})") from None


def turn_away(sock: socket.socket, refusal: Refusal, *, before_tls: bool = False) -> None:
    """Tell a peer why it is not let in, as far as it still listens: one packet, which is never waited for."""
    with contextlib.suppress(OSError):
        sock.sendall(_BUSY_ALERT if before_tls else bytes((refusal,)))


def tls_context(folder: str, *, receiver: bool) -> ssl.SSLContext:
    """Mutual TLS 1.3 from a folder of `scripts/make_certificates`. Raises UserError where it is not one."""
    name = "receiver" if receiver else "sender"
    root = Path(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if receiver else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(root / "ca.pem")
        context.load_cert_chain(root / f"{name}.pem", root / f"{name}.key")
    except OSError as error:
        raise UserError(
            f"transport.tls: {folder} has no usable ca.pem, {name}.pem and {name}.key ({error.strerror or error}); "
            f"scripts/make_certificates writes them"
        ) from None
    if receiver:
        # A session ticket would be data against the direction of the connection.
        context.num_tickets = 0
    return context


def encrypt(sock: socket.socket, context: ssl.SSLContext, *, receiver: bool, timeout_s: float) -> ssl.SSLSocket:
    """Wrap a connection. The names in certificates say which end one is, not the address. Raises PeerError, AwayError where it is busy."""
    sock.settimeout(timeout_s)
    try:
        name = None if receiver else "kvcache-receiver"
        wrapped = context.wrap_socket(sock, server_side=receiver, server_hostname=name)
    except (ssl.SSLError, OSError) as error:
        close(sock)
        if getattr(error, "reason", None) == _BUSY_REASON:
            raise AwayError(Refusal.BUSY.text) from None
        raise PeerError(f"TLS handshake failed ({error})") from None
    wrapped.settimeout(None)
    return wrapped
