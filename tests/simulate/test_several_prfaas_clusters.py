"""Several PrfaaS clusters of the configuration: Λ_max, egress, and which of them the scheduler chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import TinyProfile, play

from repro import runner
from repro.composition import compose
from repro.errors import UserError
from repro.experiments import base, simulated
from repro.experiments.base import Context
from repro.experiments.deployment import site_links
from repro.scheduling.observations import LinkReport
from repro.scheduling.policies import Naive
from repro.scheduling.scheduler import Scheduler
from repro.scheduling.short_term import ShortTermSpec
from repro.scheduling.spec import SchedulerSpec
from repro.scheduling.throughput import Deployment, evaluate
from repro.settings import Settings
from repro.simulate.deployments import requests
from repro.simulate.deployments import simulated as deployed
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.simulation import Summary
from repro.simulate.spec import PdCluster, PrfaasCluster
from repro.workload.arrivals import Poisson

WHOLE = ["cluster.prfaas.instances=4", "link.rate_bps=1.2e10", "link.rtt_s=0.01"]
HALVES = [
    "cluster.prfaas.instances=2", "link.rate_bps=6e9", "link.rtt_s=0.01",
    "cluster.also_prfaas=[{instances: 2, rate_bps: 6e9, rtt_s: 0.01}]",
]  # fmt: skip
#: The first is bound by its link, the second by its instances.
UNEQUAL = [
    "cluster.prfaas.instances=2", "link.rate_bps=2e9", "cluster.also_prfaas=[{instances: 1, rate_bps: 5e10, rtt_s: 0.05}]",
]  # fmt: skip
CLUSTERS = {"whole": WHOLE, "halves": HALVES, "unequal": UNEQUAL}


def settings_of(words: Sequence[str], tmp_path: Path) -> Settings:
    small = ["policy=static", "policy.threshold_step_tokens=1000", "tracking=disabled", f"results={tmp_path}"]
    return runner.prepare(compose(["experiment=simulation", *small, *words])).settings


def setting_of(settings: Settings, tmp_path: Path) -> simulated.Setting:
    return simulated.Setting.of(Context(settings, None, tmp_path, lambda line: None))


def simulate(words: Sequence[str], load: float, tmp_path: Path, n: int = 2000) -> tuple[Summary, bool, float]:
    """A run's summary, whether its queues grew, and its mean TTFT."""
    settings = settings_of(words, tmp_path)
    setting = setting_of(settings, tmp_path)
    spec = deployed(setting.base, setting.point, setting.link, site_links=site_links(settings))
    table, summary = play(spec, requests(setting.base, Poisson(setting.rate(load)), n, 1))
    return summary, simulated.overloaded(table), float(table["ttft_s"].mean())


def test_two_halves_have_the_lambda_max_the_egress_and_nearly_the_ttft_of_the_whole(tmp_path: Path) -> None:
    points = {name: setting_of(settings_of(CLUSTERS[name], tmp_path), tmp_path).point for name in ("whole", "halves")}
    assert points["halves"] == points["whole"]
    whole, _, whole_s = simulate(WHOLE, 0.8, tmp_path)
    halves, _, halves_s = simulate(HALVES, 0.8, tmp_path)
    assert halves.egress_bytes == pytest.approx(whole.egress_bytes, rel=1e-9)
    assert halves.cluster_egress_bytes[1] == pytest.approx(halves.egress_bytes / 2, rel=0.1)
    assert halves_s == pytest.approx(whole_s, rel=0.05)


@pytest.mark.parametrize("name", ["halves", "unequal"])
def test_queues_stay_below_the_summed_lambda_max_and_grow_above_it(name: str, tmp_path: Path) -> None:
    assert not simulate(CLUSTERS[name], 0.9, tmp_path)[1]
    assert simulate(CLUSTERS[name], 1.15, tmp_path)[1]


def test_equation_3_is_the_sum_of_each_clusters_slower_part(tmp_path: Path) -> None:
    setting = setting_of(settings_of(UNEQUAL, tmp_path), tmp_path)
    own, point = setting.base, setting.point
    by_link, by_instances = replace(own, sites=()), replace(own, n_prfaas=1, egress_bps=5e10, sites=())

    def theta(one: Deployment) -> float:
        return evaluate(one, point.threshold_tokens, point.n_p, point.n_d, "true_mean").stages.prfaas

    assert theta(own) == pytest.approx(theta(by_link) + theta(by_instances))
    assert point.n_prfaas == 3


def scheduler_of(*sites: tuple[int, float, float]) -> Scheduler:
    """Everything is offloaded to clusters of so many instances, each at a rate and an RTT."""
    spec = SchedulerSpec(Naive(), short_term=ShortTermSpec(enabled=True))
    profile = TinyProfile(s_per_token=1e-4, bytes_per_token=1e5)
    links = [PrfaasCluster(profile, n, SharedLinkSpec(rate_bps=bps, rtt_s=rtt_s)) for n, bps, rtt_s in sites]
    return Scheduler(spec, [PdCluster(profile, 1, 4)], links)


def test_a_request_goes_where_its_kvcache_would_come_from_first() -> None:
    near, far = (2, 50e9, 0.002), (2, 50e9, 0.3)
    assert scheduler_of(far, near).arrive(0.0, 0, 20_000).prfaas == 1, "the nearer"
    assert scheduler_of((2, 1e9, 0.002), near).arrive(0.0, 0, 20_000).prfaas == 1, "the wider link"
    busy = scheduler_of((1, 50e9, 0.002), (1, 50e9, 0.3))
    assert [busy.arrive(0.0, number, 20_000).prfaas for number in range(3)] == [0, 1, 0], "the less busy"
    cut = scheduler_of(near, far)
    cut.link_changed(0, up=False)
    assert cut.arrive(0.0, 0, 20_000).prfaas == 1, "the one that carries"


def test_the_fast_loops_reports_correct_what_is_believed_of_a_link() -> None:
    scheduler = scheduler_of((2, 50e9, 0.002), (2, 50e9, 0.3))
    calm = LinkReport(50e9, 0.0, 0.0)
    scheduler.short_term(1.0, 0, [calm, calm])
    assert scheduler.arrive(1.0, 0, 20_000).prfaas == 0
    scheduler.short_term(2.0, 0, [LinkReport(1e8, 1.0, 1e9), calm])
    assert scheduler.arrive(2.0, 1, 20_000).prfaas == 1


REFUSED = {
    "none_first": (["cluster.prfaas.instances=0"], "cluster.also_prfaas: further clusters beside none"),
    "failures": (["cluster.failures.mtbf_s=60", "cluster.failures.repair_s=9"], "cluster.failures: of several"),
    "caches": (["policy.cache.enabled=true", "workload=agentic"], "cluster.also_prfaas: has no prefix caches"),
    "profile": (["profile=paper_1t_h20"], r"cluster.also_prfaas\[0\].profile: has no effect beside profile="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_several_clusters_cannot_do_is_refused_by_name(name: str, tmp_path: Path) -> None:
    words, message = REFUSED[name]
    site = "cluster.also_prfaas=[{instances: 1, rate_bps: 1e10, rtt_s: 0.05, profile: paper_1t_h200}]"
    with pytest.raises(UserError, match=f"^{message}"):
        settings_of([*words, site], tmp_path)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("instances: 0, rate_bps: 1e10, rtt_s: 0.0", "cluster.also_prfaas[0].instances: 0"),
        ("instances: 1, rate_bps: 0.0, rtt_s: 0.0", "cluster.also_prfaas[0].rate_bps: 0"),
        ("instances: 1, rate_bps: 1e10, rtt_s: -1.0", "cluster.also_prfaas[0].rtt_s: -1"),
        ("instances: 1, rate_bps: 1e10", "cluster.also_prfaas[0].rtt_s"),
        ("instances: 1, rate_bps: 1e10, rtt_s: 0, loss: 0.1", "loss: no such key; accepted: instances"),
        ("instances: 1, rate_bps: 1e10, rtt_s: 0.0, profile: silicon:kimi_k3@b200", "cluster.also_prfaas[0].profile"),
    ],
    ids=["instances", "rate", "rtt", "rtt_missing", "unknown", "another_model"],
)
def test_a_site_that_cannot_be_is_refused_by_name(site: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        settings_of([f"cluster.also_prfaas=[{{{site}}}]"], tmp_path)
    assert message in str(refused.value)


def test_only_the_simulation_of_one_deployment_reads_further_clusters() -> None:
    reading = [
        name
        for name in ("simulation", "table6", "burst", "tenants")
        if base.load(name).reads_key(base.SITES, "simulate")
    ]
    assert reading == ["simulation"]
