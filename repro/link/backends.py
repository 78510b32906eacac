"""Which backend makes a link: the most faithful one that this machine and this user can run.

`auto` takes, in the order below, the first available one that gives up nothing of what was asked; where every one
gives something up, the most faithful that is available. What was given up is said in a line each and goes into the
record. Availability is found by doing: the link itself is built, in namespaces that vanish if that fails.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

from repro.errors import UserError
from repro.link import leftovers
from repro.link.link import DirectLink, Link, NamespacedLink, RelayLink, Unavailable
from repro.link.spec import LinkSpec

log = logging.getLogger("repro.link")


@dataclass(frozen=True)
class Backend:
    """One way of making a link.

    `refuses` says what makes it pointless (it is then never built), `gives_up` what it leaves out; both in a line
    each. Where it cannot be had on this machine, `make` raises Unavailable.
    """

    name: str
    make: Callable[[LinkSpec, str, list[str]], Link]
    refuses: Callable[[LinkSpec], list[str]]
    gives_up: Callable[[LinkSpec], list[str]]
    automatic: bool = True


def open_link(spec: LinkSpec, *, run: str, time_scale: float = 1.0, byte_scale: float = 1.0) -> Link:
    """Make the link that `spec` asks for, scaled, for the run of that name; use the result as a context manager.

    Leftovers of killed runs are removed first. Nothing is measured yet: `Link.check` does that.

    Raises:
        UserError: if the backend that was asked for is not available, or cannot do what was asked.
    """
    if not re.fullmatch(r"[\w.-]{1,64}", run):
        raise UserError(f"link: run name {run!r}; accepted: up to 64 letters, digits, '.', '-' and '_'")
    for member in leftovers.clean():
        log.warning("link: removed a leftover of run %s: %s", member.run, member.command)
    spec = spec.scaled(time_scale, byte_scale)
    if spec.backend != "auto":
        backend = BY_NAME[spec.backend]
        if reasons := backend.refuses(spec):
            raise UserError(f"link.backend: {backend.name} refuses {'; '.join(reasons)}")
        return backend.make(spec, run, backend.gives_up(spec))
    return _automatic(spec, run)


def _automatic(spec: LinkSpec, run: str) -> Link:
    candidates = [backend for backend in BACKENDS if backend.automatic and not backend.refuses(spec)]
    # Stable: among those that give up something the order of faithfulness stays.
    candidates.sort(key=lambda backend: bool(backend.gives_up(spec)))
    missing: list[str] = []
    for backend in candidates:
        try:
            link = backend.make(spec, run, backend.gives_up(spec))
        except Unavailable as reason:
            missing.append(f"{backend.name}: {reason.why}")
            continue
        link.facts["not_available"] = missing
        return link
    raise UserError(f"link.backend: none is available: {'; '.join(missing)}")


def _shapeless(spec: LinkSpec) -> list[str]:
    """What tbf cannot do at all."""
    return [
        reason
        for reason, asked in (
            ("a delay (it only has a rate and loss)", spec.rtt_s > 0 or any(c.rtt_s for c in spec.schedule)),
            ("jitter", spec.jitter_s > 0),
            ("bursty loss", spec.loss > 0 and spec.loss_burst_segments > 1),
            ("a capacity trace", _traced(spec)),
        )
        if asked
    ]


def _beyond_netem(spec: LinkSpec) -> list[str]:
    if spec.jitter_s == 0:
        return []
    lost = ["jitter reorders packets"]
    if spec.jitter_correlation_s > 0:
        lost.append(f"jitter correlation over {spec.jitter_correlation_s:g} s: drawn anew for every packet")
    if spec.jitter_distribution != "normal":
        lost.append(f"{spec.jitter_distribution} jitter: drawn from a normal distribution")
    return lost


def _beyond_relay(spec: LinkSpec) -> list[str]:
    lost = ["TCP dynamics: congestion control never sees the link, and a connection opens without its RTT"]
    if spec.loss > 0 or any(change.loss for change in spec.schedule):
        lost.append(f"loss of {spec.loss:g}: a relay loses nothing")
    if spec.congestion_control is not None:
        lost.append(f"congestion control {spec.congestion_control}: has no effect through a relay")
    return lost


def _everything(spec: LinkSpec) -> list[str]:
    asked = {
        "rate": spec.rate_bps is not None or _traced(spec),
        "RTT": spec.rtt_s > 0,
        "loss": spec.loss > 0,
        "jitter": spec.jitter_s > 0,
        "schedule": bool(spec.schedule),
    }
    return [f"{name}: not emulated, the network is as it is" for name, was_asked in asked.items() if was_asked]


def _traced(spec: LinkSpec) -> bool:
    return spec.capacity_trace is not None or spec.reverse_capacity_trace is not None


def _nothing(_: LinkSpec) -> list[str]:
    return []


def _namespaced(name: str) -> Callable[[LinkSpec, str, list[str]], Link]:
    return lambda spec, run, given_up: NamespacedLink(spec, run, name, given_up)


#: From the most to the least faithful.
BACKENDS = (
    Backend("netem", _namespaced("netem"), lambda s: ["a capacity trace"] if _traced(s) else [], _beyond_netem),
    Backend("packet", _namespaced("packet"), _nothing, _nothing),
    Backend("tbf", _namespaced("tbf"), _shapeless, _nothing),
    Backend("relay", RelayLink, _nothing, _beyond_relay),
    Backend(
        "none", lambda s, run, given_up: DirectLink(s, run, "none", given_up), _nothing, _everything, automatic=False
    ),
)
BY_NAME = {backend.name: backend for backend in BACKENDS}
