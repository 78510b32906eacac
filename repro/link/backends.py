"""Which backend makes a link: the most faithful one that this machine and this user can run.

`auto` prefers, in order, one that gives up nothing of what was asked; where there is none, the one that gives up
least. What was given up is said in one line each and goes into the record.
"""

from __future__ import annotations

import re

from repro.errors import UserError
from repro.link import leftovers
from repro.link.link import DirectLink, Link, RelayLink
from repro.link.spec import LinkSpec


def open_link(spec: LinkSpec, *, run: str, time_scale: float = 1.0, byte_scale: float = 1.0) -> Link:
    """Make the link that `spec` asks for, scaled, for the run of that name; use the result as a context manager.

    Leftovers of killed runs are removed first.

    Raises:
        UserError: if the backend that was asked for is not available, or cannot do what was asked.
    """
    if not re.fullmatch(r"[\w.-]{1,64}", run):
        raise UserError(f"link: run name {run!r}; accepted: up to 64 letters, digits, '.', '-' and '_'")
    leftovers.clean()
    scaled = spec.scaled(time_scale, byte_scale)
    if spec.backend == "none":
        return DirectLink(scaled, run, "none", _lost_without_link(scaled))
    return RelayLink(scaled, run, _lost_in_relay(scaled))


def _lost_without_link(spec: LinkSpec) -> list[str]:
    asked = {
        "rate": spec.rate_bps is not None or spec.capacity_trace is not None,
        "RTT": spec.rtt_s > 0,
        "loss": spec.loss > 0,
        "jitter": spec.jitter_s > 0,
        "schedule": bool(spec.schedule),
    }
    return [f"{name}: not emulated, this is plain loopback" for name, was_asked in asked.items() if was_asked]


def _lost_in_relay(spec: LinkSpec) -> list[str]:
    lost = [
        "TCP dynamics: slow start and congestion control never see the link, and a connection opens without its RTT"
    ]
    if spec.loss > 0 or any(change.loss for change in spec.schedule):
        lost.append(f"loss of {spec.loss:g}: a relay loses nothing")
    if spec.congestion_control is not None:
        lost.append(f"congestion control {spec.congestion_control}: has no effect through a relay")
    return lost
