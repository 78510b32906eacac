"""What each mechanism is worth: the full scheduler, and the same with one part taken away, through bursts on a link that drops and fails.

`static` has none of the parts. Differences are taken to `two_timescale`, the full scheduler, so a negative one is what the missing part
was worth. The rule that chooses among caches by bandwidth has no case here: these requests share no prefix, so it would change nothing
(`agentic` shows what it is worth).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from repro.experiments import simulated, study_figures, study_findings
from repro.experiments.base import SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.scheduling.admission import AdmissionSpec
from repro.scheduling.policies import RandomSplit
from repro.scheduling.short_term import ShortTermSpec
from repro.simulate.deployments import payload_share, requests, with_scheduler
from repro.simulate.link_spec import CapacityChange
from repro.workload.arrivals import Piecewise

#: Arrivals come faster for the last minute of every five; the link drops, and later fails.
_EVERY_S, _BURST_S = 300.0, 60.0
_DROP_S, _DOWN_S = (450.0, 510.0), (800.0, 820.0)


@dataclass(frozen=True)
class Options(simulated.Options):
    """Bursts every five minutes; the link drops to `dropped_bps` at 450 s for a minute and is down at 800 s for 20 s."""

    load: float = 0.75
    burst_load: float = 1.3
    dropped_bps: float = 5e9
    admit_ttft_s: float = 10.0


def run(context: Context) -> Outcome:
    """Every variant on the same requests and the same link."""
    options: Options = context.options
    setting = simulated.Setting.of(context)
    whole = setting.link.rate_bps
    dropped = options.dropped_bps * payload_share(context.settings.link)
    faults = ((_DROP_S[0], dropped), (_DROP_S[1], whole), (_DOWN_S[0], 0.0), (_DOWN_S[1], whole))
    link = replace(setting.link, changes=tuple(CapacityChange(at, rate) for at, rate in faults))
    policies = setting.policies(link)
    full = policies["two_timescale"]
    cases = {
        "two_timescale": full,
        "no_short_term": with_scheduler(full, short_term=ShortTermSpec()),
        "no_long_term": policies["short_term"],
        "no_fallback": with_scheduler(full, fallback_s=None),
        "no_length_rule": with_scheduler(full, router=RandomSplit(setting.point.offload_fraction)),
        "least_work_to_round_robin": with_scheduler(full, placement="round_robin"),
        "with_admission": with_scheduler(full, admission=AdmissionSpec(options.admit_ttft_s)),
        "chunked_prefill": replace(full, chunk_tokens=8192),
        "static": policies["static"],
    }
    rates = setting.rate(options.load), setting.rate(options.burst_load)
    arrivals = Piecewise(rates, (_EVERY_S - _BURST_S, _BURST_S))
    count = round(setting.rate(0.8 * options.load + 0.2 * options.burst_load) * options.duration_s)
    comparison = simulated.Comparison(cases, partial(requests, setting.base, arrivals, count), "two_timescale")
    window_s = (options.warmup_s, options.duration_s)
    return simulated.compare(context, [comparison], window_s, setting.slo, options.seeds)


def happenings(options: Mapping[str, Any]) -> list[study_figures.Span]:
    """Bursts, and what happens to the link."""
    return [
        *study_figures.every(_EVERY_S, _BURST_S, options["duration_s"], "burst of arrivals"),
        *(study_figures.Span(*span, "link slower or down") for span in (_DROP_S, _DOWN_S)),
    ]


EXPERIMENT = Experiment(
    "ablation",
    {"simulate": (*SIMULATED, *SCHEDULER, "options")},
    run,
    study_figures.figures(happenings),
    Options,
    simulated.check,
    profile_files,
    finding=study_findings.goodput,
)
