"""Other people's engines behind the same interface: Mooncake's transfer engine and NIXL, which write into remote memory.

Everything but the bytes stays as it is: schedule, windows, manifests, acknowledgements, resumption and exactly-once are
those of `Sender` and `Session`. A data connection then carries requests for places (RESERVE), their answers (PLACE) and
notices (WRITTEN), a whole batch at a time; the payload goes by the engine. Install, into an environment of Python 3.11:

    apt-get install libibverbs1 libnl-3-200 libnl-route-3-200                    # for mooncake
    pip install --no-deps mooncake-transfer-engine-non-cuda==0.3.13              # Mooncake over TCP
    pip install --no-deps nixl==1.5.1 nixl-cu12==1.5.1                           # NIXL: UCX, UCX_TLS=tcp,self

What they cannot do here: encrypt or authenticate the payload (TLS and the secret cover the connections beside it only);
be paced by `set_rate_cap` or told a congestion control; show TCP_INFO of their own sockets; cross a relay link, which
carries no ports but the one that was dialled; keep a hostile peer that knows the secret out of other transfers' memory,
or from altering its own after a checksum has held; be stopped in the middle of a write, so that memory which such a
write may still reach is lent to nobody else until its sender has dialled again, which it does only once the write has
returned. Both spin while they wait. Payloads outside of `register`ed memory are copied once, and a lost connection costs
a new engine, with mooncake about a second.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.util
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from repro.errors import UserError
from repro.transport.wire import PeerError, read_sealed, sealed

_LENGTH = struct.Struct("<I")
_MAX_DESCRIPTION_BYTES = 1 << 20
_PATIENCE_S = 30.0
_MODULES = {"mooncake": "mooncake.engine", "nixl": "nixl._api"}


class Target(Protocol):
    """Memory that others write into."""

    def describe(self) -> dict[str, Any]:
        """What a writer must know; JSON."""

    def close(self) -> None:
        """Forget the memory."""


class Origin(Protocol):
    """An engine that writes into one target."""

    def register(self, view: memoryview) -> None:
        """Payloads will lie in there."""

    def write(self, writes: list[tuple[memoryview, int]]) -> None:
        """Write each view to its offset in the target. Raises OSError, here as above, where the engine fails."""

    def close(self) -> None:
        """End the engine."""


def missing(backend: str) -> str | None:
    """Why a backend cannot be used here, or None where it can."""
    module = _MODULES[backend]
    try:
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            return f"{module.partition('.')[0]} is not installed"
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None


def started(backend: str, argv: Sequence[str], *, namespaced: bool) -> list[str]:
    """How to start a process that will use a backend, within the network namespace of a link where it is one.

    UCX looks for network devices in /sys/class/net, which goes on to show those of the namespace that mounted it: a
    process that will use nixl gets a /sys of its own. Where that may not be mounted the process ends, and says so.
    """
    if backend != "nixl" or not namespaced:
        return list(argv)
    return ["unshare", "--mount", "sh", "-c", 'mount -t sysfs sysfs /sys && exec "$@"', "sh", *argv]


def open_target(backend: str, memory: memoryview, host: str) -> Target:
    """Offer memory to writers. Raises UserError where the backend is missing or fails."""
    _require(backend)
    return _MooncakeTarget(memory, host) if backend == "mooncake" else _NixlTarget(memory)


def open_origin(backend: str, description: dict[str, Any], host: str, bounce_bytes: int) -> Origin:
    """An engine for one connection. Raises OSError where it cannot reach the target."""
    _require(backend)
    kind = _MooncakeOrigin if backend == "mooncake" else _NixlOrigin
    with _border(backend):
        return _Origin(backend, kind(description, host, bounce_bytes))


def send_description(sock: socket.socket, target: Target) -> None:
    """The receiver's part, after the handshake of a data connection."""
    text = json.dumps(target.describe()).encode()
    sock.sendall(sealed(_LENGTH.pack(len(text))) + sealed(text))


def read_description(sock: socket.socket, timeout_s: float) -> dict[str, Any]:
    """The sender's part. Raises PeerError."""
    deadline = time.monotonic() + timeout_s
    (length,) = _LENGTH.unpack(read_sealed(sock, _LENGTH.size, deadline))
    if length > _MAX_DESCRIPTION_BYTES:
        raise PeerError(f"a description of {length} bytes")
    try:
        description = json.loads(read_sealed(sock, length, deadline))
    except ValueError:
        raise PeerError("a description that is not JSON") from None
    if not isinstance(description, dict):
        raise PeerError("a description that is not an object")
    return description


def address_of(view: memoryview) -> int:
    """Where a contiguous view begins in this process's memory."""
    import numpy as np

    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data) if view.nbytes else 0


@contextlib.contextmanager
def _border(backend: str) -> Iterator[None]:
    """Whatever an engine raises is a failed connection to us, which is tried again."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{backend}: {type(error).__name__}: {error}") from error


class _Origin:
    """An engine behind its border."""

    def __init__(self, backend: str, engine: Origin) -> None:
        self._backend, self._engine = backend, engine

    def register(self, view: memoryview) -> None:
        with _border(self._backend):
            self._engine.register(view)

    def write(self, writes: list[tuple[memoryview, int]]) -> None:
        with _border(self._backend):
            self._engine.write(writes)

    def close(self) -> None:
        with contextlib.suppress(OSError), _border(self._backend):
            self._engine.close()


class _Registered:
    """Which memory an engine may send from; what lies elsewhere is copied into a buffer that it may."""

    def __init__(self, bounce_bytes: int) -> None:
        self._bounce = memoryview(bytearray(bounce_bytes))
        self._regions: list[tuple[int, int, memoryview]] = []
        self.register(self._bounce)

    def register(self, view: memoryview) -> None:
        """See `Origin.register`."""
        start = address_of(view)
        self._admit(start, view.nbytes)
        self._regions.append((start, start + view.nbytes, view))

    def _admit(self, address: int, size: int) -> None:
        raise NotImplementedError

    def _addresses(self, views: list[memoryview]) -> list[int]:
        addresses, used = [], 0
        for view in views:
            address = address_of(view)
            if not any(start <= address and address + view.nbytes <= end for start, end, _ in self._regions[1:]):
                if used + view.nbytes > len(self._bounce):
                    raise OSError(f"a batch of more than {len(self._bounce)} bytes outside of registered memory")
                self._bounce[used : used + view.nbytes] = view
                address = self._regions[0][0] + used
                used += view.nbytes
            addresses.append(address)
        return addresses


class _MooncakeTarget:
    def __init__(self, memory: memoryview, host: str) -> None:
        if host in ("", "0.0.0.0", "::"):
            raise UserError(f"transport: mooncake needs the address that senders reach, not {host!r}, to listen on")
        self._engine, self._memory, self._host = _mooncake(host), memory, host
        self._base = address_of(memory)
        _checked(self._engine.register_memory(self._base, memory.nbytes), "register_memory")

    def describe(self) -> dict[str, Any]:
        return {"segment": f"{self._host}:{self._engine.get_rpc_port()}", "base": self._base}

    def close(self) -> None:
        self._engine.unregister_memory(self._base)


class _MooncakeOrigin(_Registered):
    def __init__(self, description: dict[str, Any], host: str, bounce_bytes: int) -> None:
        self._engine = _mooncake(host)
        self._segment, self._base = str(description["segment"]), int(description["base"])
        super().__init__(bounce_bytes)

    def _admit(self, address: int, size: int) -> None:
        _checked(self._engine.register_memory(address, size), "register_memory")

    def write(self, writes: list[tuple[memoryview, int]]) -> None:
        local = self._addresses([view for view, _ in writes])
        remote = [self._base + offset for _, offset in writes]
        sizes = [view.nbytes for view, _ in writes]
        _checked(self._engine.batch_transfer_sync_write(self._segment, local, remote, sizes), "write")

    def close(self) -> None:
        for start, _, _ in self._regions:
            self._engine.unregister_memory(start)
        self._regions.clear()


class _NixlTarget:
    def __init__(self, memory: memoryview) -> None:
        self._agent, self._memory = _nixl(), memory
        self._base = address_of(memory)
        self._handle = self._agent.register_memory([(self._base, memory.nbytes, 0, "")], "DRAM")

    def describe(self) -> dict[str, Any]:
        return {"agent": base64.b64encode(self._agent.get_agent_metadata()).decode(), "base": self._base}

    def close(self) -> None:
        self._agent.deregister_memory(self._handle)
        del self._agent  # it spins until it is collected


class _NixlOrigin(_Registered):
    def __init__(self, description: dict[str, Any], host: str, bounce_bytes: int) -> None:
        del host  # UCX chooses the interface
        self._agent = _nixl()
        self._handles: list[Any] = []
        self._base = int(description["base"])
        self._peer = self._agent.add_remote_agent(base64.b64decode(description["agent"]))
        super().__init__(bounce_bytes)

    def _admit(self, address: int, size: int) -> None:
        self._handles.append(self._agent.register_memory([(address, size, 0, "")], "DRAM"))

    def write(self, writes: list[tuple[memoryview, int]]) -> None:
        local = self._addresses([view for view, _ in writes])
        sizes = [view.nbytes for view, _ in writes]
        near = self._agent.get_xfer_descs([(a, n, 0) for a, n in zip(local, sizes, strict=True)], "DRAM")
        places = [(self._base + offset, n, 0) for (_, offset), n in zip(writes, sizes, strict=True)]
        far = self._agent.get_xfer_descs(places, "DRAM")
        handle = self._agent.initialize_xfer("WRITE", near, far, self._peer, b"")
        try:
            state, until = self._agent.transfer(handle), time.monotonic() + _PATIENCE_S
            while state == "PROC":
                if time.monotonic() > until:
                    raise OSError(f"nixl: a write did not end within {_PATIENCE_S:g} s")
                time.sleep(0.0001)
                state = self._agent.check_xfer_state(handle)
            if state != "DONE":
                raise OSError(f"nixl: a write ended as {state}")
        finally:
            self._agent.release_xfer_handle(handle)

    def close(self) -> None:
        for handle in self._handles:
            self._agent.deregister_memory(handle)
        self._handles.clear()
        self._agent.remove_remote_agent(self._peer)
        del self._agent  # it spins until it is collected


def _require(backend: str) -> None:
    if reason := missing(backend):
        raise UserError(
            f"transport.backend: {backend} cannot be used here: {reason}; see repro.transport.remote_memory"
        )


def _checked(status: int, what: str) -> None:
    if status != 0:
        raise OSError(f"mooncake: {what} failed with status {status}")


def _mooncake(host: str) -> Any:
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    _checked(engine.initialize(host, "P2PHANDSHAKE", "tcp", ""), "initialize")
    return engine


def _nixl() -> Any:
    os.environ.setdefault("UCX_TLS", "tcp,self")
    # InfiniBand's module is of no use here, and a library that it brings crashes when the process ends.
    os.environ.setdefault("UCX_MODULES", "^ib")
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    api = importlib.import_module("nixl._api")
    return api.nixl_agent(f"kvcache-{os.urandom(8).hex()}", api.nixl_agent_config(backends=["UCX"]))
