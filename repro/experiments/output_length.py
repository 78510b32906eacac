"""Outputs longer or shorter than the 1,024 tokens that the split was chosen for: where decode becomes the bottleneck."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from repro.experiments import simulated, study_figures, study_findings
from repro.experiments.base import SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.scheduling.throughput import Deployment
from repro.simulate.deployments import requests
from repro.workload.arrivals import Poisson
from repro.workload.outputs import FixedOutput, LogNormalOutput, OutputLengths
from repro.workload.stream import Independent


@dataclass(frozen=True)
class Options(simulated.Options):
    """`means` of the output length in tokens; each is run fixed, and log-normal with coefficient of variation `cv`."""

    load: float = 0.7
    seeds: int = 3
    means: tuple[int, ...] = (256, 1024, 2048)
    cv: float = 1.0


def run(context: Context) -> Outcome:
    """Static and adaptive policies at every output length, on the same arrivals and inputs."""
    options: Options = context.options
    setting = simulated.Setting.of(context)
    rate = setting.rate(options.load)
    count = round(rate * options.duration_s)
    chosen = {
        name: spec for name, spec in setting.policies().items() if name in ("static", "short_term", "two_timescale")
    }
    comparisons = []
    for mean in options.means:
        laws: dict[str, OutputLengths] = {"fixed": FixedOutput(mean), "log_normal": LogNormalOutput(mean, options.cv)}
        for kind, law in laws.items():
            stream = partial(_with_outputs, setting.base, Poisson(rate), count, law)
            comparisons.append(simulated.Comparison(chosen, stream, prefix=f"{kind}_{mean}."))
    window_s = (options.warmup_s, options.duration_s)
    return simulated.compare(context, comparisons, window_s, setting.slo, options.seeds, bin_s=60.0)


def _with_outputs(base: Deployment, arrivals: Poisson, count: int, law: OutputLengths, seed: int) -> Independent:
    return requests(base, arrivals, count, seed, law)


EXPERIMENT = Experiment(
    "output_length",
    {"simulate": (*SIMULATED, *SCHEDULER, "options")},
    run,
    {"goodput": study_figures.draw_goodput},
    Options,
    simulated.check,
    profile_files,
    finding=study_findings.goodput,
)
