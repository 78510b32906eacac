"""What a serving deployment shows of itself, in the form of Prometheus: requests by route, times, queues, and what crossed the link.

A deployment that decodes alone, without KVCache from elsewhere, answers just as well and measures something else. Here it shows: the bytes
that PrfaaS instances sent, as their TCP counts them, stand beside the KVCache that arrived of offloaded requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from repro.record.requests import ANSWERED, ROUTES
from repro.serving.listener import PHASES, View
from repro.serving.messages import Sending

_LONG_S: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_SHORT_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
#: Histogram → what it shows and which column of the requests table it is from.
_PHASES: Final[Mapping[str, tuple[str, str]]] = {
    "prfaas_queue_seconds": ("Arrival to the start of prefill", "queue_s"),
    "prfaas_prefill_seconds": ("Start to end of prefill", "prefill_s"),
    "prfaas_transfer_exposed_seconds": ("End of prefill to the last byte of KVCache at the decode side", "transfer_exposed_s"),
    "prfaas_decode_queue_seconds": ("Last byte to joining the running batch", "decode_queue_s"),
    "prfaas_router_ttft_seconds": ("Arrival at the router to the first token at the decode side", "ttft_s"),
}  # fmt: skip


class Exposition:
    """The metrics of one deployment; every method is safe from any thread."""

    def __init__(self, model: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self._before: dict[str, Sending] = {}
        Gauge("prfaas_model", "The model that is served, as a label", ["name"], registry=registry).labels(model).set(1)
        self._requests = Counter("prfaas_requests", "Requests that have left", ["route", "outcome"], registry=registry)
        self._turned_away = Counter(
            "prfaas_requests_turned_away", "Requests that found too many under way", registry=registry
        )
        self._prompt = Counter(
            "prfaas_prompt_tokens", "Prompt tokens of answered requests", ["route"], registry=registry
        )
        self._output = Counter(
            "prfaas_output_tokens", "Tokens that were brought to clients", ["route"], registry=registry
        )
        self._kv = Counter(
            "prfaas_kv_bytes", "KVCache that arrived whole at a decode instance: over the link (prfaas), within its cluster (pd)",
            ["route"], registry=registry,
        )  # fmt: skip
        self._link = Counter(
            "prfaas_link_bytes", "What PrfaaS instances sent over the link: TCP payload (wire), KVCache acknowledged (acked) or sent again",
            ["kind"], registry=registry,
        )  # fmt: skip
        # Named as vLLM's, so that a client that looks for one sees whether there is a prefix cache.
        self._spared = Counter(
            "prfaas_prefix_cache_hits", "Prompt tokens that a prefix cache spared", registry=registry
        )
        self._ttft = Histogram(
            "prfaas_ttft_seconds",
            "Request received to its first token at the front",
            ["route"],
            registry=registry,
            buckets=_LONG_S,
        )
        self._tpot = Histogram(
            "prfaas_tpot_seconds",
            "Time per output token after the first, at the front",
            ["route"],
            registry=registry,
            buckets=_SHORT_S,
        )
        self._first = Histogram(
            "prfaas_request_prefill_time_seconds",
            "Start of prefill to the first token",
            registry=registry,
            buckets=_LONG_S,
        )
        self._phases = {
            name: Histogram(name, words, ["route"], registry=registry, buckets=_LONG_S)
            for name, (words, _) in _PHASES.items()
        }
        self._threshold = Gauge("prfaas_threshold_tokens", "Longer uncached prompts are offloaded", registry=registry)
        self._scarce = Gauge(
            "prfaas_bandwidth_scarce", "Whether the short-term loop takes the link to be scarce", registry=registry
        )
        self._up = Gauge("prfaas_link_up", "Whether the link is taken to carry anything", registry=registry)
        self._used = Gauge(
            "prfaas_link_utilisation", "Egress over what the link was sold as, in the last period", registry=registry
        )
        self._depth = Gauge(
            "prfaas_requests_in_phase", "Requests under way, by where they are", ["phase"], registry=registry
        )
        self._held = Gauge(
            "prfaas_instance_requests", "Requests that an instance holds", ["instance", "role"], registry=registry
        )
        for route in ROUTES:  # series that are there from the start can be subtracted
            for counter in (self._prompt, self._output, self._kv):
                counter.labels(route)
            self._requests.labels(route, "ok")
        for kind in ("wire", "acked", "resent"):
            self._link.labels(kind)

    def turned_away(self) -> None:
        """A request found too many under way."""
        self._turned_away.inc()

    def left(self, row: Mapping[str, Any], output_tokens: int, ttft_s: float, tpot_s: float) -> None:
        """A request has left, after so many tokens; times at the front, nan where there are none."""
        route = row["route"]
        self._requests.labels(route, row["outcome"]).inc()
        self._output.labels(route).inc(output_tokens)
        self._kv.labels(route).inc(row["payload_bytes"])
        if row["outcome"] in ANSWERED:
            self._prompt.labels(route).inc(row["input_tokens"])
            self._spared.inc(row["cached_tokens"])
            self._first.observe(row["ttft_s"] - row["queue_s"])
            for name, (_, column) in _PHASES.items():
                self._phases[name].labels(route).observe(max(row[column], 0.0))
        for histogram, seconds in ((self._ttft, ttft_s), (self._tpot, tpot_s)):
            if not math.isnan(seconds):
                histogram.labels(route).observe(seconds)

    def sent(self, name: str, said: Sending) -> None:
        """What an instance has sent since its start; one that was started anew counts from nothing."""
        if not name.startswith("prfaas"):
            return
        before = self._before.get(name)
        if before is not None and said.wire_bytes < before.wire_bytes:
            before = None
        self._before[name] = said
        for kind in ("wire", "acked", "resent"):
            now, then = getattr(said, f"{kind}_bytes"), getattr(before, f"{kind}_bytes", 0)
            self._link.labels(kind).inc(max(now - then, 0))

    def text(self, view: View) -> bytes:
        """All of it, with the router's view of this moment."""
        self._threshold.set(view.threshold_tokens)
        self._scarce.set(view.bandwidth_scarce)
        self._up.set(view.link_up)
        self._used.set(view.link_utilisation)
        for phase in PHASES:
            self._depth.labels(phase).set(view.phases[phase])
        self._held.clear()
        for name, held in view.held.items():
            self._held.labels(name, view.roles[name]).set(held)
        return bytes(generate_latest(self._registry))
