"""Outputs longer or shorter than the 1,024 tokens that the split was chosen for: where decode becomes the bottleneck."""

from __future__ import annotations

from dataclasses import dataclass

from repro.experiments import simulated
from repro.experiments.base import SCHEDULER, SIMULATED, Context, Experiment, Outcome
from repro.experiments.deployment import profile_files
from repro.simulate.deployments import requests
from repro.workload.arrivals import Poisson
from repro.workload.outputs import FixedOutput, LogNormalOutput, OutputLengths


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
    outcomes = []
    for mean in options.means:
        laws: dict[str, OutputLengths] = {"fixed": FixedOutput(mean), "log_normal": LogNormalOutput(mean, options.cv)}
        for kind, law in laws.items():
            outcomes.append(
                simulated.compare(
                    context, chosen, lambda seed, law=law: requests(setting.base, Poisson(rate), count, seed, law),  # type: ignore[misc]
                    (options.warmup_s, options.duration_s), setting.slo, options.seeds, prefix=f"{kind}_{mean}.", bin_s=60.0,
                )
            )  # fmt: skip
    return simulated.merge(outcomes)


EXPERIMENT = Experiment(
    "output_length",
    {"simulate": (*SIMULATED, *SCHEDULER, "options")},
    run,
    {"goodput": simulated.draw_goodput},
    Options,
    simulated.check,
    profile_files,
)
