"""The HTTP server of a serving deployment, from its socket to its end: uvicorn in a thread, stopped by an event."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from repro.errors import UserError
from repro.serving.api import Api
from repro.serving.front import Front
from repro.serving.router import Router

#: Requests under way when it is told to stop have so long.
_GRACE_S = 2


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there; port 0 takes a free one. Raises UserError where the address or port cannot be had."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port: {port}; accepted: 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(
            f"--host, --port: {host}, {port}: {error}; accepted: an address of this machine and its port"
        ) from error
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(2048)
        except OSError as error:
            raise UserError(
                f"--port: {host}:{port} cannot be listened on ({error.strerror}); accepted: another, or 0 for a free one"
            ) from error
        yield listener


def serve_until(over: threading.Event, router: Router, front: Front, api: Api, listener: socket.socket) -> None:
    """Answer at that socket until the event is set; what is under way then has a moment to end. Closes the socket."""
    config = uvicorn.Config(
        api.app(), log_config=None, access_log=False, lifespan="off", ws="none", loop="asyncio", http="h11", server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_GRACE_S,
    )  # fmt: skip
    server = uvicorn.Server(config)

    async def run() -> None:
        front.attach(router, asyncio.get_running_loop())
        await server.serve(sockets=[listener])
        await front.idle(1.0)

    def guarded() -> None:
        try:
            asyncio.run(run())
        finally:
            over.set()

    thread = threading.Thread(target=guarded, name="http", daemon=True)
    thread.start()
    try:
        over.wait()
    finally:
        front.close()
        server.should_exit = True
        thread.join(_GRACE_S + 3.0)


def signalled() -> threading.Event:
    """Is set by the first SIGINT or SIGTERM; the next one does what it did before."""
    over = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(*_: object) -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        over.set()

    for number in before:
        signal.signal(number, stop)
    return over
