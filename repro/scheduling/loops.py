"""Both control loops of one PD cluster, from reports to decisions (§3.4.3): what is averaged over what time, and which node moves.

The steps themselves are pure functions of an observation (short_term.py, long_term.py); here observations are made out of reports and the
scheduler's own account of the work that it has promised.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from repro.scheduling import adaptive, long_term, short_term, timetable
from repro.scheduling.adaptive import Situation, Split
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
        if spec.adaptive.enabled:
            pd.arrival_rate.add(now_s, float(pd.arrived), elapsed_s)
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
    if spec.adaptive.enabled:
        pd.egress_bps.add(seen.at_s, seen.link.capacity_bps * short.period_s, short.period_s)
    pd.short_term = after = short_term.step(short, pd.short_term, seen, pd.costs)
    pd.state = SchedulerState(after.threshold_tokens, after.bandwidth_scarce, seen.pd, seen.prfaas, seen.link)


def move_node(spec: SchedulerSpec, pd: PdClusterState, seen: Observation, report: PdReport) -> Conversion | None:
    """One beat of the slow loop: the conversion to begin, if any; one node at a time, and the one with the least to finish."""
    usual = seen._replace(rate_per_s=pd.slow_rate_per_s, link=seen.link._replace(capacity_bps=pd.slow_capacity_bps))
    decode = DecodeView(len(pd.decoding), pd.tokens_per_s, report.finished_tokens / report.finished)
    move = long_term.step(spec.long_term, usual, decode, pd.costs)
    return _convert(pd, move, report) if move else None


def follow(now_s: float, spec: SchedulerSpec, pd: PdClusterState, report: PdReport) -> Conversion | None:
    """One look at the timetable: its threshold from its moment on, and the next node on its way to the split."""
    wanted = timetable.planned(spec.timetable, now_s)
    if wanted is None:
        return None
    if wanted.threshold_tokens != pd.short_term.threshold_tokens:
        pd.short_term = pd.short_term._replace(threshold_tokens=wanted.threshold_tokens)
        pd.state = pd.state._replace(threshold_tokens=wanted.threshold_tokens)
    to_prefill = sum([conversion.to == "prefill" for conversion in pd.conversions])
    turning = 2 * to_prefill - len(pd.conversions)
    way = timetable.step(pd.serving + to_prefill, turning, wanted)
    if not way or (way > 0 and len(pd.decoding) < 2) or (way < 0 and not pd.serving):
        return None
    return _convert(pd, way, report)


def adapt(
    now_s: float, spec: SchedulerSpec, pd: PdClusterState, seen: Observation, report: PdReport
) -> Conversion | None:
    """One beat of the adaptive loop: the next conversion, if any, and the threshold for what serves now. Several may be under way."""
    own = spec.adaptive
    finished, tokens = report.finished - pd.finished, report.finished_tokens - pd.finished_tokens
    pd.finished, pd.finished_tokens = report.finished, report.finished_tokens
    pd.output_length.add(now_s, float(tokens), float(finished))
    if now_s < own.warmup_s or not report.finished or not seen.lengths:
        return None
    at = _situation(pd, seen, report)
    way = adaptive.step(own, at, pd.costs, now_s, pd.history)
    conversion = None
    if way:
        conversion = _convert(pd, way, report)
        pd.history.moved(now_s, way, conversion.instance)
        at = _situation(pd, seen._replace(pd=ClusterView(pd.serving, pd.waiting_s(now_s))), report)
    search_threshold(spec, pd, at)
    return conversion


def search_threshold(spec: SchedulerSpec, pd: PdClusterState, at: Situation) -> None:
    """Let the threshold rest where it is best for what serves now; under pressure the fast loop has it, and returns it there."""
    found = adaptive.threshold(spec.adaptive, at, pd.costs)
    state = pd.short_term
    if state.pressed:
        pd.short_term = state._replace(resting_tokens=found)
    elif found != state.threshold_tokens:
        pd.short_term = state._replace(threshold_tokens=found)
        pd.state = pd.state._replace(threshold_tokens=found)


def _situation(pd: PdClusterState, seen: Observation, report: PdReport) -> Situation:
    output, n_d = pd.output_length.ratio, len(pd.decoding)
    serving = Split(pd.serving, n_d)
    to_prefill = sum([conversion.to == "prefill" for conversion in pd.conversions])
    to_decode = len(pd.conversions) - to_prefill
    slow = seen._replace(rate_per_s=pd.arrival_rate.ratio, link=seen.link._replace(capacity_bps=pd.egress_bps.ratio))
    return Situation(
        slow,
        DecodeView(n_d, pd.tokens_per_s, output),
        report.waiting_decode * output / (pd.tokens_per_s * max(n_d, 1)),
        output * pd.batch_max / pd.tokens_per_s,
        serving,
        Split(serving.n_p + to_prefill, n_d + to_decode),
        to_prefill - to_decode,
        pd.short_term.resting_tokens if pd.short_term.pressed else pd.short_term.threshold_tokens,
    )


def _convert(pd: PdClusterState, way: int, report: PdReport) -> Conversion:
    """Take the node with the least to finish out of its role."""
    if way > 0:
        instance = _idlest(report.decode, pd.decoding)
        pd.decoding.remove(instance)
        conversion = Conversion(pd.index, instance, "prefill")
    else:
        instance = _idlest(report.prefill, pd.placement.free_at_s)
        pd.placement.remove(instance)
        conversion = Conversion(pd.index, instance, "decode")
    pd.conversions.append(conversion)
    return conversion


def _idlest(reports: Sequence[InstanceReport], serving: Collection[int]) -> int:
    """The instance with the fewest requests; one that has not reported has none."""
    requests = {report.instance: report.requests for report in reports}
    return min((requests.get(instance, 0), instance) for instance in serving)[1]


def _ewma(before: float, value: float, elapsed_s: float, memory_s: float) -> float:
    return value if math.isnan(before) else before + (1 - math.exp(-elapsed_s / memory_s)) * (value - before)
