"""Scenarios: what each change changes, plans that know the future, and a finding that is recomputed from the record."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from repro.bench._simulate_ours import deployment
from repro.composition import compose
from repro.experiments import scenario_plans as plans
from repro.experiments.scenario_worlds import SCENARIOS, Changes, World, world
from repro.experiments.scenarios import POLICIES, reaction_s
from repro.record.directory import Record
from repro.runner import run
from repro.scheduling.spec import PolicySpec
from repro.scheduling.throughput import OperatingPoint, Stages, evaluate
from repro.scheduling.timetable import Planned
from repro.simulate.deployments import simulated, with_scheduler
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.records import Table
from repro.simulate.simulation import Simulation
from repro.workload.phases import Phases

FREE = PolicySpec("free", threshold_step_tokens=1000, lengths="true_mean")
CHANGES = Changes(0.6, 2.0, 2, 0.5, 1.6, 0.5)
#: Which scenarios each of the changes touches.
TOUCHED = {
    "mu": {"mixed_prompts", "flash_crowd"}, "output_factor": {"longer_outputs"}, "lost_instances": {"lost_instances"},
    "link_factor": {"halved_link"}, "crowd_factor": {"flash_crowd"}, "hit_rate": {"moving_hit_rate"},
}  # fmt: skip


def made(name: str, changes: Changes = CHANGES, headroom: float = 1.25) -> World:
    return world(name, deployment()[0], SharedLinkSpec(), changes, 4, 600.0, headroom, FREE)


@pytest.mark.parametrize("key", [item.name for item in fields(Changes)])
def test_each_change_shows_in_its_scenarios_and_in_no_other(key: str) -> None:
    value = getattr(CHANGES, key)
    other = replace(CHANGES, **{key: value + 1 if isinstance(value, int) else 0.7 * value})
    assert {name for name in SCENARIOS if made(name) != made(name, other)} == TOUCHED[key]


def test_a_link_is_bought_with_its_headroom_and_halved_for_one_hour() -> None:
    one = made("halved_link")
    assert made("halved_link", headroom=2.0).link.rate_bps == pytest.approx(1.6 * one.link.rate_bps)
    assert [change.rate_bps / one.link.rate_bps for change in one.link.changes] == [0.5, 1.0]
    assert [condition.base.egress_bps / one.link.rate_bps for condition in one.conditions] == [1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_oracle_can_serve_every_condition_and_the_worst_one_at_the_load(name: str) -> None:
    one = made(name)
    rate = one.rate(0.8, FREE)
    loads = [rate * condition.factor / plans.search(condition.base, FREE).lambda_max for condition in one.conditions]
    assert max(loads) == pytest.approx(0.8)
    assert one.seconds == 4 * 600.0


def test_requests_of_a_phase_come_in_its_time_at_its_rate() -> None:
    phases = made("flash_crowd").phases(5.0)
    times = np.concatenate([batch.arrival_s for batch in Phases(phases, 1)])
    assert (np.diff(times) >= 0).all()
    assert np.histogram(times, [0, 600, 900, 1200])[0] == pytest.approx([3000, 2400, 1500], rel=0.1)


def test_the_best_sequence_moves_only_where_moving_pays() -> None:
    one = made("moving_hit_rate")
    tables = [{(1e4, 2): 0.9 + 0.1 * (i % 2), (1e4, 3): 1.0 - 0.1 * (i % 2)} for i in range(4)]
    assert [n_p for _, n_p in plans.best_sequence(one, tables, 1.0)] == [3, 2, 3, 2]
    assert len(set(plans.best_sequence(one, tables, 600.0))) == 1
    better = [{(1e4, 2): 0.5, (1e4, 3): 0.6}] * 4
    assert plans.best_static(one, better) == (1e4, 3)


def test_where_decode_binds_a_plan_takes_the_threshold_with_most_room_in_prefill() -> None:
    base = replace(deployment()[0], output_tokens=2048.0)
    tied = plans.search(base, replace(FREE, n_p=3))
    threshold, n_p = plans.roomiest(base, replace(FREE, n_p=3))
    roomy = evaluate(base, threshold, n_p, base.n_pd - n_p, "true_mean")
    assert n_p == 3
    assert roomy.lambda_max == pytest.approx(tied.lambda_max) == pytest.approx(tied.stages.pd_decode)

    def room(point: OperatingPoint) -> float:
        return Stages(point.stages.prfaas, point.stages.pd_prefill, np.inf).lambda_max(point.offload_fraction)

    assert room(roomy) > 1.1 * room(tied)


def test_a_plan_is_tried_for_as_long_as_a_condition_lasts_without_a_break() -> None:
    longer, crowd = made("longer_outputs"), made("flash_crowd")
    assert [plans._lasting_s(longer, one) for one in longer.conditions] == [600.0, 1800.0, 1800.0, 1800.0]
    assert [plans._lasting_s(crowd, one) for one in crowd.conditions] == [1200.0, 300.0, 300.0, 1200.0, 1200.0]


def test_by_hand_a_change_is_answered_an_hour_late() -> None:
    one = made("longer_outputs")
    found = plans.by_hand(one, FREE, 600.0)
    assert [entry.at_s for entry in found] == [0.0, 600.0, 1200.0, 1800.0]
    assert found[1].n_p == found[0].n_p > found[2].n_p == found[3].n_p


def test_a_simulated_deployment_follows_a_timetable_and_pays_for_its_moves() -> None:
    base, _ = deployment()
    one = made("longer_outputs")
    point = evaluate(base, 20_000.0, 3, 5, "true_mean")
    spec = with_scheduler(
        simulated(base, point, one.link), timetable=(Planned(60.0, 9000.0, 5), Planned(200.0, 9000.0, 4))
    )
    summary = Simulation(spec, Table()).run(Phases(one.phases(1.0)[:1], 3))
    assert summary.conversions == 3
    reached = {(sample.n_p, sample.n_d): sample.at_s for sample in reversed(summary.samples)}
    assert reached[5, 3] > 60 + 10, "a node restarts before it serves"
    assert (summary.samples[-1].n_p, summary.samples[-1].n_d) == (4, 4)
    assert summary.samples[-1].threshold_tokens == 9000.0


def test_the_time_to_react_ends_where_a_policy_has_caught_up_for_good() -> None:
    one = made("longer_outputs")
    bins = np.arange(0, one.seconds, 60.0)
    oracle = pd.DataFrame({"at_s": bins, "arrived": 100, "met": 100})
    slow = oracle.assign(met=np.where((bins >= 600) & (bins < 900), 0, 100))
    assert reaction_s(one, oracle, oracle) == 0.0
    assert reaction_s(one, slow, oracle) == 540.0


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    words = [
        "experiment=scenarios", "options.seeds=2", "options.hours=3", "options.hour_s=60", "options.warmup_s=5",
        "options.scenarios=[longer_outputs]", "tracking=disabled", "processes=1", f"results={tmp_path_factory.mktemp('results')}",
    ]  # fmt: skip
    return run(compose(words), ["repro", *words], lambda line: None)


def test_the_finding_is_recomputed_from_the_record(record: Record) -> None:
    table, said = record.metrics, record.provenance["finding"]

    def per_case(metric: str) -> dict[str, float]:
        rows = table[table["metric"] == metric]
        return dict(zip(rows["case"].str.removeprefix("longer_outputs."), rows["value"], strict=True))

    regret, over = per_case("regret_fraction"), per_case("goodput_over_static_fraction")
    assert set(regret) == set(POLICIES)
    assert f"at most {100 * regret['adaptive']:.1f} % of an oracle's" in said
    assert f"{100 * over['adaptive']:+.1f} % (longer outputs)" in said
    samples = record.table("samples")
    goodput = samples[samples["metric"] == "goodput"].pivot_table(index="seed", columns="case", values="value")
    oracle = goodput["longer_outputs.oracle"]
    left = (oracle - goodput["longer_outputs.adaptive"]) / oracle
    assert regret["adaptive"] == pytest.approx(left.mean())
    assert (oracle >= goodput["longer_outputs.static"]).all()
    assert over["oracle"] >= 0


def test_a_policy_that_does_not_adapt_is_refused_by_name(tmp_path: Path) -> None:
    from repro.errors import UserError
    from repro.runner import prepare

    with pytest.raises(UserError, match=r"policy\.adaptive\.enabled: false"):
        prepare(compose(["experiment=scenarios", "policy=paper", f"results={tmp_path}"]))
