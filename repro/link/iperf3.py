"""iperf3 across an emulated link, from the prefill to the decode side: another program's word on what TCP carries there."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from repro import processes
from repro.link.link import Link
from repro.processes import Child, tied

_PORT = 5201


def installed() -> bool:
    """Whether there is an iperf3 to ask."""
    return shutil.which("iperf3") is not None


def stream(
    link: Link, connections: int, control: str | None, seconds: float, omit_s: float, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """What iperf3 reports of so many connections that send for `seconds`, after `omit_s` that do not count; empty where it failed."""
    if not installed():
        return {}
    serve = link.command("decode", tied(["iperf3", "-s", "-1", "-p", f"{_PORT}", "-B", link.listen_host("decode")]))
    server = Child("iperf3 server", serve, channel=False, stderr="dropped")
    try:
        time.sleep(0.2)
        host, port = link.dial(_PORT)
        words = [
            "iperf3",
            "-c",
            host,
            "-p",
            str(port),
            "-J",
            "-t",
            f"{math.ceil(seconds)}",
            "-O",
            f"{math.ceil(omit_s)}",
        ]
        words += ["-P", str(connections), *([] if control is None else ["-C", control]), *extra]
        done = processes.run(link.command("prefill", tied(words)), timeout_s=60 + seconds + omit_s)
        told = json.loads(done.stdout)
        return told if "sum_received" in told.get("end", {}) else {}
    except (ValueError, subprocess.TimeoutExpired):
        return {}
    finally:
        server.kill()
