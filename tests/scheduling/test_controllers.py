"""The two loops, each step of which is a pure function of what was observed."""

import math
from dataclasses import replace

import numpy as np
import pytest

from repro.errors import UserError
from repro.scheduling import long_term, short_term
from repro.scheduling.admission import AdmissionSpec, admitted
from repro.scheduling.load import Capacity, Costs, Recent, balance, curve
from repro.scheduling.long_term import DecodeView, LongTermSpec
from repro.scheduling.short_term import Observation, ShortTermSpec, ShortTermState
from repro.scheduling.views import ClusterView, LinkView

COSTS = Costs(prfaas_s=lambda x: x * 1e-4, pd_s=lambda x: x * 2e-4, kv_bytes=lambda x: 1e8 + 2e4 * x)
LENGTHS = tuple(int(x) for x in np.random.default_rng(0).lognormal(9.9, 1.0, 512))
SPEC = ShortTermSpec(enabled=True)


def seen(
    utilisation: float = 0.1, waiting_s: float = 0.0, capacity_bps: float = 100e9, rate: float = 1.0, at_s: float = 0.0
) -> Observation:
    link = LinkView(capacity_bps, utilisation)
    return Observation(at_s, LENGTHS, rate, ClusterView(4, waiting_s), ClusterView(3, 0.0), link)


@pytest.mark.parametrize("horizon_s", [None, 10.0])
def test_balance_is_as_good_as_an_exhaustive_search_over_every_request(horizon_s: float | None) -> None:
    capacity = Capacity(4, 3, 20e9, waiting_prfaas_s=6.0, waiting_pd_s=0.5, backlog_bytes=1e9)
    found = balance(LENGTHS, 2.0, COSTS, capacity, horizon_s, patience_s=8.0, held_tokens=5_000.0)

    def judge(threshold: float) -> tuple[float, float]:
        x = np.array(LENGTHS)
        long, short = x[x > threshold], x[x <= threshold]
        each = 2.0 / len(x)
        prfaas, link = COSTS.prfaas_s(long).sum() * each / 4, 8 * COSTS.kv_bytes(long).sum() * each / 20e9
        local = COSTS.pd_s(short).sum() * each / 3
        load = max(prfaas, link, local)
        if horizon_s is None:
            return 1 / load, load

        def wait(rho: float, now: float) -> float:
            stray = math.sqrt(horizon_s)
            return (now + stray * math.log1p(math.exp((now + horizon_s * (rho - 1)) / stray))) / 2

        def in_time(service_s: np.ndarray, wait_s: float) -> float:
            return float((1 - np.exp(-np.maximum(8.0 - service_s, 0) / wait_s)).sum())

        away = max(wait(prfaas, 6.0), wait(link, 8 * 1e9 / 20e9))
        return (in_time(COSTS.prfaas_s(long), away) + in_time(COSTS.pd_s(short), wait(local, 0.5))) / len(x), load

    best = max(judge(t)[0] for t in [0, *LENGTHS])
    worth, load = judge(found.threshold_tokens)
    # Forty-eight candidates instead of every rank, and slices instead of requests, cost no more than this.
    assert worth == pytest.approx(best, rel=0.02)
    assert found.worth == pytest.approx(worth, rel=0.01)
    assert found.load == pytest.approx(load)
    assert found.held_worth == pytest.approx(judge(5_000.0)[0], rel=0.03)
    assert found.held_worth <= found.worth


def test_a_window_gives_the_curve_of_its_lengths_once_a_block_of_them_is_new() -> None:
    recent = Recent(64)
    for length in LENGTHS[:64]:
        recent.append(length)
    first = recent.curve(COSTS)
    assert all((a == b).all() for a, b in zip(first, curve(LENGTHS[:64], COSTS), strict=True))
    recent.append(LENGTHS[64])
    recent.arrived(1)
    assert recent.curve(COSTS) is first
    for length in LENGTHS[65:68]:
        recent.append(length)
    recent.arrived(3)
    assert all((a == b).all() for a, b in zip(recent.curve(COSTS), curve(LENGTHS[4:68], COSTS), strict=True))


def test_a_request_that_the_local_hardware_prefills_too_late_is_not_kept_there() -> None:
    roomy = Capacity(4, 300, 1e8)
    kept = balance(LENGTHS, 1.0, COSTS, roomy).threshold_tokens
    x = np.array(LENGTHS)
    hopeless = x[COSTS.pd_s(x) > 4.0]
    spread = balance(
        LENGTHS, 1.0, COSTS, roomy._replace(egress_bps=1e12, n_prfaas=400), 30.0, patience_s=4.0
    ).threshold_tokens
    assert spread < hopeless.min() <= kept


@pytest.mark.parametrize("load", [0.3, 1.0, 1.5])
def test_a_search_that_gains_less_than_the_margin_keeps_the_threshold(load: float) -> None:
    surge = seen(waiting_s=3.0, rate=load)
    found = balance(
        LENGTHS, load, COSTS, short_term.capacity_of(surge), SPEC.horizon_s, SPEC.patience_s, held_tokens=15_000.0
    )
    gain = found.worth / found.held_worth - 1
    state = ShortTermState(15_000.0)
    assert short_term.step(replace(SPEC, gain=gain + 1e-6), state, surge, COSTS).threshold_tokens == 15_000.0
    if gain > 2e-6:
        assert (
            short_term.step(replace(SPEC, gain=gain - 1e-6), state, surge, COSTS).threshold_tokens
            == found.threshold_tokens
        )


def test_a_backlog_that_nothing_can_undo_does_not_overload_the_other_side() -> None:
    stuck = balance(LENGTHS, 1.5, COSTS, Capacity(4, 3, 2e9, backlog_bytes=50e9), 30.0, patience_s=10.0)
    x = np.array(LENGTHS)
    local = COSTS.pd_s(x[x <= stuck.threshold_tokens]).sum() * 1.5 / len(x) / 3
    assert 0.5 < local < 1.1


def test_a_short_outage_is_not_taken_for_a_lost_link() -> None:
    state = short_term.step(SPEC, ShortTermState(10_000.0), seen(), COSTS)
    for second in range(60):
        state = short_term.step(SPEC, state, seen(capacity_bps=0.0, at_s=float(second)), COSTS)
        if second == 5:
            early = state.threshold_tokens
    assert early < max(LENGTHS)
    for second in range(60, 400):
        state = short_term.step(SPEC, state, seen(capacity_bps=0.0, at_s=float(second)), COSTS)
    assert state.threshold_tokens > early


def test_balance_without_prfaas_keeps_everything_local_and_without_pd_nothing() -> None:
    assert balance(LENGTHS, 1.0, COSTS, Capacity(0, 3, 1e9)).threshold_tokens == max(LENGTHS)
    assert balance(LENGTHS, 1.0, COSTS, Capacity(4, 0, 1e12)).threshold_tokens == 0.0
    assert balance(LENGTHS, 1.0, COSTS, Capacity(4, 3, 0.0)).threshold_tokens == max(LENGTHS)


def test_a_thinner_link_raises_the_threshold() -> None:
    thresholds = [balance(LENGTHS, 2.0, COSTS, Capacity(4, 3, bps)).threshold_tokens for bps in (1e9, 3e9, 10e9, 100e9)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > thresholds[-1]


def test_the_fast_loop_leaves_a_calm_system_alone() -> None:
    state = ShortTermState(19_400.0)
    assert short_term.step(SPEC, state, seen(), COSTS) == state._replace(capacity_bps=100e9)


def test_the_fast_loop_raises_the_threshold_under_a_full_link_and_returns_it_afterwards() -> None:
    state = short_term.step(SPEC, ShortTermState(5_000.0), seen(), COSTS)
    pressed = short_term.step(SPEC, state, seen(utilisation=1.0, capacity_bps=3e9), COSTS)
    assert pressed.pressed
    assert pressed.bandwidth_scarce
    assert pressed.threshold_tokens > 5_000
    soon = short_term.step(SPEC, pressed, seen(utilisation=0.1, at_s=1.0), COSTS)
    assert soon.threshold_tokens == pressed.threshold_tokens
    calm = short_term.step(SPEC, soon, seen(utilisation=0.1, at_s=SPEC.search_s), COSTS)
    assert not calm.pressed
    assert calm.threshold_tokens < pressed.threshold_tokens


def test_when_pressure_ends_the_threshold_returns_to_where_it_was_unless_that_is_clearly_worse() -> None:
    rested = balance(LENGTHS, 1.0, COSTS, Capacity(4, 3, 100e9)).threshold_tokens * 1.02
    pressed = short_term.step(SPEC, ShortTermState(rested), seen(utilisation=1.0, capacity_bps=1e9), COSTS)
    assert pressed.threshold_tokens > rested
    after = seen(at_s=SPEC.search_s)
    assert short_term.step(SPEC, pressed, after, COSTS).threshold_tokens == rested
    assert short_term.step(SPEC, pressed._replace(resting_tokens=500.0), after, COSTS).threshold_tokens > 500.0


def test_hysteresis_keeps_the_scarce_rule_between_the_two_levels() -> None:
    scarce, plain = ShortTermState(1e4, True, True), ShortTermState(1e4)
    between = seen(utilisation=0.7)
    assert short_term.step(SPEC, scarce, between, COSTS).bandwidth_scarce
    assert not short_term.step(SPEC, plain, between, COSTS).bandwidth_scarce


def test_under_lasting_pressure_the_threshold_is_searched_at_intervals() -> None:
    full = seen(utilisation=1.0, capacity_bps=6e9)
    first = short_term.step(SPEC, ShortTermState(0.0), full, COSTS)
    thinner = seen(utilisation=1.0, capacity_bps=1e9, at_s=1.0)
    assert short_term.step(SPEC, first, thinner, COSTS).threshold_tokens == first.threshold_tokens
    later = short_term.step(SPEC, first, thinner._replace(at_s=5.0), COSTS)
    assert later.threshold_tokens > first.threshold_tokens


def test_a_queue_surge_at_prfaas_sends_less_there() -> None:
    there = seen(waiting_s=8.0, rate=2.0)
    here = there._replace(prfaas=ClusterView(4), pd=ClusterView(3, 8.0))
    state = ShortTermState(15_000.0)
    assert (
        short_term.step(SPEC, state, there, COSTS).threshold_tokens
        > short_term.step(SPEC, state, here, COSTS).threshold_tokens
    )


def test_the_slow_loop_moves_a_node_towards_the_bottleneck_and_rests_when_balanced() -> None:
    spec = LongTermSpec(enabled=True)
    rate = 3 / float(np.mean(COSTS.pd_s(np.array(LENGTHS))))
    busy = Observation(0.0, LENGTHS, rate, ClusterView(0), ClusterView(3), LinkView(0.0))
    assert long_term.step(spec, busy, DecodeView(9, 1e6, 1000.0), COSTS) == 1
    assert (
        long_term.step(spec, busy._replace(rate_per_s=rate / 3), DecodeView(3, 350.0 * rate / 3, 1000.0), COSTS) == -1
    )
    assert long_term.step(spec, busy._replace(rate_per_s=rate / 3), DecodeView(9, 1e6, 1000.0), COSTS) == 0


def test_the_slow_loop_never_takes_the_last_decode_node() -> None:
    spec = LongTermSpec(enabled=True)
    assert long_term.step(spec, seen(rate=1e3), DecodeView(1, 1e9, 1.0), COSTS) == 0


def test_admission_refuses_beyond_its_limit_only() -> None:
    limit = AdmissionSpec(10.0).limit_s
    assert admitted(9.9, limit)
    assert not admitted(10.1, limit)
    assert admitted(1e9, AdmissionSpec().limit_s)
    assert AdmissionSpec().limit_s == math.inf


def test_levels_that_cross_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"policy\.short_term\.utilisation_low"):
        ShortTermSpec(utilisation_high=0.5, utilisation_low=0.6)
