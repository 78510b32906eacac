"""Who is there: a challenge and its answer in both directions, inside TLS 1.3 with certificates both ways where asked.

Either side proves that it knows the shared secret by an HMAC over everything said so far, both nonces included, so that
nothing recorded can be played again and neither side's proof can be thrown back at it. The secret alone keeps strangers
out of a trusted network; it hides nothing and does not protect what follows. TLS does both.
"""

from __future__ import annotations

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
from repro.transport.wire import PeerError, close, read_exactly

# magic, version, role, backend, slot, segment bytes, session, nonce, oldest
_HELLO: Final = struct.Struct("<6sHBBH16s32sQ")
_CHALLENGE: Final = struct.Struct("<32s16s")  # nonce, receiver
_PROOF_BYTES: Final = 32
_WELCOME: Final = struct.Struct("<32s16sQ")  # proof, token of the session's memory, window
_MAGIC: Final = b"PRFAAS"
_VERSION: Final = 2


class Role(IntEnum):
    """What a connection is for."""

    DATA = 0
    CONTROL = 1


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
    """The sender's part. Raises PeerError where the receiver refuses, is too slow, or cannot prove itself."""
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
    try:
        sock.sendall(first)
        challenge = bytes(read_exactly(sock, _CHALLENGE.size, deadline))
        said = first + challenge
        sock.sendall(_proof(secret, b"sender", said))
        answer = read_exactly(sock, _WELCOME.size, deadline)
    except OSError as error:
        raise PeerError(f"the receiver closed during the handshake ({error.strerror or error})") from None
    except PeerError as error:
        raise PeerError(f"the receiver refused the secret or certificate, or is no receiver: {error}") from None
    proof, token, window = _WELCOME.unpack(answer)
    if not hmac.compare_digest(proof, _proof(secret, b"receiver", said + token)):
        raise PeerError("the receiver does not know the shared secret")
    return Welcome(token, window)


def examine(sock: socket.socket, secret: bytes, timeout_s: float) -> tuple[Hello, bytes]:
    """The receiver's part up to the sender's proof: the hello, and all that was said. Raises PeerError."""
    deadline = time.monotonic() + timeout_s
    first = bytes(read_exactly(sock, _HELLO.size, deadline))
    magic, version, role, backend, slot, session, _nonce, oldest = _HELLO.unpack(first)
    if magic != _MAGIC:
        raise PeerError(f"garbage instead of a handshake ({first[:8]!r})")
    if version != _VERSION:
        raise PeerError(f"speaks version {version} of the handshake, only {_VERSION} is spoken here")
    if role not in (Role.DATA, Role.CONTROL):
        raise PeerError(f"asks for an unknown role, {role}")
    challenge = _CHALLENGE.pack(os.urandom(32), bytes(16))
    said = first + challenge
    try:
        sock.sendall(challenge)
        proof = bytes(read_exactly(sock, _PROOF_BYTES, deadline))
    except OSError as error:
        raise PeerError(f"closed during the handshake ({error.strerror or error})") from None
    if not hmac.compare_digest(proof, _proof(secret, b"sender", said)):
        raise PeerError("wrong secret")
    return Hello(Role(role), slot, session, oldest, backend), said


def welcome(sock: socket.socket, welcome: Welcome, secret: bytes, said: bytes) -> None:
    """The receiver's last word, which proves that it knows the secret too. Raises PeerError."""
    proof = _proof(secret, b"receiver", said + welcome.token)
    try:
        sock.sendall(_WELCOME.pack(proof, welcome.token, welcome.window_bytes))
    except OSError as error:
        raise PeerError(f"closed during the handshake ({error.strerror or error})") from None


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
    """Wrap a connection. The names in certificates say which end one is, not the address. Raises PeerError."""
    sock.settimeout(timeout_s)
    try:
        name = None if receiver else "kvcache-receiver"
        wrapped = context.wrap_socket(sock, server_side=receiver, server_hostname=name)
    except (ssl.SSLError, OSError) as error:
        close(sock)
        raise PeerError(f"TLS handshake failed ({error})") from None
    wrapped.settimeout(None)
    return wrapped
