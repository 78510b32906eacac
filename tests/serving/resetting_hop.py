"""A hop on the sender's side of a link that resets one of the connections through it again and again.

    python resetting_hop.py HOST PORT PERIOD_S

Listens on loopback and leads to HOST:PORT. Every PERIOD_S the connection that has lived longest is reset at both ends with
a TCP RST, as a stateful box that forgets a connection would do. It needs no privilege, and runs wherever a program can
be started: `Link.command` puts it into a side's namespace. Says its port in the first line; to each further line of its
input it answers what it has seen so far, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import sys
import threading
import time


class Hop:
    def __init__(self, target: tuple[str, int], period_s: float) -> None:
        self._target = target
        self._period_s = period_s
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.seen = {"opened": 0, "resets": 0, "carried_bytes": 0, "first_bytes": ""}
        for work in (self._accept, self._reset):
            threading.Thread(target=work, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(self._target, timeout=2)
            except OSError:
                near.close()
                continue
            # Small buffers: what the sender believes to be on its way is not all in here.
            for end in (near, far):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
            self.seen["opened"] += 1
            self._pairs.append((near, far))
            for source, sink, outward in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._carry, args=(source, sink, outward), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, outward: bool) -> None:
        first = outward
        with contextlib.suppress(OSError):
            while data := source.recv(8 << 10):
                if first and data[:1].hex() not in self.seen["first_bytes"].split():
                    self.seen["first_bytes"] += f"{data[:1].hex()} "
                first = False
                sink.sendall(data)
                self.seen["carried_bytes"] += len(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _reset(self) -> None:
        while True:
            time.sleep(self._period_s)
            if self._pairs:
                for end in self._pairs.pop(0):
                    with contextlib.suppress(OSError):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        end.shutdown(socket.SHUT_RD)  # wakes the thread that reads
                        end.close()
                self.seen["resets"] += 1


if __name__ == "__main__":
    hop = Hop((sys.argv[1], int(sys.argv[2])), float(sys.argv[3]))
    print(hop.port, flush=True)
    for _ in sys.stdin:
        print(json.dumps(hop.seen), flush=True)
