"""Both control loops of one PD cluster, from reports to decisions (§3.4.3): what is averaged over what time, and which node moves.

The steps themselves are pure functions of an observation (short_term.py, long_term.py); here observations are made out of reports and the
scheduler's own account of the work that it has promised.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from repro.scheduling import long_term, short_term
from repro.scheduling.clusters import PdClusterState, PrfaasClusterState
from repro.scheduling.decisions import Conversion
from repro.scheduling.long_term import DecodeView
from repro.scheduling.observations import InstanceReport, LinkReport, PdReport
from repro.scheduling.short_term import Observation
from repro.scheduling.spec import SchedulerSpec
from repro.scheduling.views import ClusterView, LinkView, SchedulerState

#: Memory of the arrival rate that the fast loop sees.
_RATE_MEMORY_S = 20.0


def observe(
    now_s: float,
    spec: SchedulerSpec,
    pd: PdClusterState,
    prfaas: Sequence[PrfaasClusterState],
    links: Sequence[LinkReport],
) -> Observation:
    """What a PD cluster's loops see now; of PrfaaS instances and links it counts its share. `links` has one report per PrfaaS cluster."""
    elapsed_s = now_s - pd.measured_s
    if elapsed_s > 0:
        rate = pd.arrived / elapsed_s
        pd.recent.arrived(pd.arrived)
        pd.rate_per_s = _ewma(pd.rate_per_s, rate, elapsed_s, _RATE_MEMORY_S)
        pd.slow_rate_per_s = _ewma(pd.slow_rate_per_s, rate, elapsed_s, spec.long_term.memory_s)
        pd.arrived, pd.measured_s = 0, now_s
    capacity = used = backlog = rtt_s = waiting = 0.0
    instances = 0
    for cluster in prfaas:
        link = links[cluster.index]
        capacity += link.capacity_bps
        used += link.utilisation * link.capacity_bps
        backlog += link.backlog_bytes
        rtt_s = max(rtt_s, link.rtt_s)
        serving = cluster.serving
        instances += serving
        waiting += cluster.waiting_s(now_s) * serving
    share = pd.share
    return Observation(
        now_s,
        pd.recent,
        pd.rate_per_s,
        ClusterView(max(round(instances * share), min(instances, 1)), waiting / instances if instances else 0.0),
        ClusterView(pd.serving, pd.waiting_s(now_s)),
        LinkView(capacity * share, used / capacity if capacity > 0 else 1.0, backlog * share, 0.0, rtt_s),
    )


def move_threshold(spec: SchedulerSpec, pd: PdClusterState, seen: Observation) -> None:
    """One beat of the fast loop: routing sees its outcome in `pd.state`."""
    short = spec.short_term
    pd.slow_capacity_bps = _ewma(pd.slow_capacity_bps, seen.link.capacity_bps, short.period_s, spec.long_term.memory_s)
    pd.short_term = after = short_term.step(short, pd.short_term, seen, pd.costs)
    pd.state = SchedulerState(after.threshold_tokens, after.bandwidth_scarce, seen.pd, seen.prfaas, seen.link)


def move_node(spec: SchedulerSpec, pd: PdClusterState, seen: Observation, report: PdReport) -> Conversion | None:
    """One beat of the slow loop: the conversion to begin, if any; one node at a time, and the one with the least to finish."""
    usual = seen._replace(rate_per_s=pd.slow_rate_per_s, link=seen.link._replace(capacity_bps=pd.slow_capacity_bps))
    decode = DecodeView(len(pd.decoding), pd.tokens_per_s, report.finished_tokens / report.finished)
    move = long_term.step(spec.long_term, usual, decode, pd.costs)
    if not move:
        return None
    if move > 0:
        instance = _idlest(report.decode, pd.decoding)
        pd.decoding.remove(instance)
        pd.conversion = Conversion(pd.index, instance, "prefill")
    else:
        instance = _idlest(report.prefill, pd.placement.free_at_s)
        pd.placement.remove(instance)
        pd.conversion = Conversion(pd.index, instance, "decode")
    return pd.conversion


def _idlest(reports: Sequence[InstanceReport], serving: Collection[int]) -> int:
    """The instance with the fewest requests; one that has not reported has none."""
    requests = {report.instance: report.requests for report in reports}
    return min((requests.get(instance, 0), instance) for instance in serving)[1]


def _ewma(before: float, value: float, elapsed_s: float, memory_s: float) -> float:
    return value if math.isnan(before) else before + (1 - math.exp(-elapsed_s / memory_s)) * (value - before)
