"""Request routers: which cluster prefills a request (§3.4.3, and the baselines of Table 6).

A router is a frozen value with one pure method. Thresholds that move are moved by the controllers (short_term.py, long_term.py) and
arrive in the `SchedulerState`, so the same `Prfaas` value serves static and adaptive runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from repro.errors import UserError
from repro.scheduling.views import LOCAL, REMOTE, RequestView, Route, SchedulerState


class Router(Protocol):
    """Chooses the prefill cluster of one request."""

    def route(self, request: RequestView, state: SchedulerState) -> Route:
        """The decision, from nothing but its two arguments."""
        ...


@dataclass(frozen=True)
class Homogeneous:
    """Everything is prefilled in the PD cluster (Table 6's baseline)."""

    def route(self, request: RequestView, state: SchedulerState) -> Route:  # noqa: ARG002
        """Always local, on the local cache."""
        cached = request.cached_pd_tokens
        return Route(False, cached) if cached else LOCAL


@dataclass(frozen=True)
class Naive:
    """Everything is prefilled in the PrfaaS cluster (Table 6's naive heterogeneous PD)."""

    def route(self, request: RequestView, state: SchedulerState) -> Route:  # noqa: ARG002
        """Always remote, on the remote cache."""
        cached = request.cached_prfaas_tokens
        return Route(True, cached) if cached else REMOTE


@dataclass(frozen=True)
class RandomSplit:
    """Offloads `share` of the requests blindly: what selecting by length is worth shows against this at the same share.

    The coin is a hash of the request's id, so a replay makes the same choices.
    """

    share: float
    salt: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"policy.offload_share: {self.share} is not a fraction; accepted: 0 to 1")

    def route(self, request: RequestView, state: SchedulerState) -> Route:  # noqa: ARG002
        """Remote for a fixed pseudo-random `share` of ids."""
        if splitmix64(request.id + self.salt) < self.share * 2.0**64:
            return Route(True, request.cached_prfaas_tokens)
        return Route(False, request.cached_pd_tokens)


@dataclass(frozen=True)
class Threshold:
    """Requests with more than t uncached tokens in the PD cluster are offloaded; each cluster counts its own cache."""

    def route(self, request: RequestView, state: SchedulerState) -> Route:
        """The scarce-bandwidth rule at all times."""
        return _own_cache(request, state.threshold_tokens)


@dataclass(frozen=True)
class LengthAware:
    """The best prefix of any cluster counts, and is moved to where it is needed, without a look at the link."""

    def route(self, request: RequestView, state: SchedulerState) -> Route:
        """The abundant-bandwidth rule at all times."""
        return _best_cache(request, state.threshold_tokens)


@dataclass(frozen=True)
class Prfaas:
    """The paper's policy: the scarce rule under bandwidth pressure, the abundant rule otherwise."""

    def route(self, request: RequestView, state: SchedulerState) -> Route:
        """One of the two rules, by the state."""
        if state.bandwidth_scarce:
            return _own_cache(request, state.threshold_tokens)
        return _best_cache(request, state.threshold_tokens)


def _own_cache(request: RequestView, threshold_tokens: float) -> Route:
    _, total, local, remote = request
    if total - local <= threshold_tokens:
        return Route(False, local) if local else LOCAL
    return Route(True, remote) if remote else REMOTE


def _best_cache(request: RequestView, threshold_tokens: float) -> Route:
    _, total, local, remote = request
    if local == remote == 0:
        return LOCAL if total <= threshold_tokens else REMOTE
    if total - max(local, remote) <= threshold_tokens:
        return Route(False, max(local, remote), fetch=remote > local)
    return Route(True, max(local, remote), fetch=local > remote)


def splitmix64(value: int) -> int:
    """A well-mixed 64-bit hash of an integer."""
    mixed = (value + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return mixed ^ mixed >> 31


#: Routers by the name that `policy.router` takes.
ROUTERS: dict[str, type[Router]] = {
    "homogeneous": Homogeneous,
    "naive": Naive,
    "random_split": RandomSplit,
    "threshold": Threshold,
    "length_aware": LengthAware,
    "prfaas": Prfaas,
}


def router(name: str) -> Router:
    """A router that has no parameters, by name.

    Raises:
        UserError: for a name that is not in `ROUTERS`.
    """
    if name not in ROUTERS:
        raise UserError(f"policy.router: {name!r} is unknown; accepted: {', '.join(ROUTERS)}")
    return ROUTERS[name]()
