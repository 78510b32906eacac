"""The slow loop that adapts: estimates that forget, and a search over all splits that an overload cannot stop."""

import math

import numpy as np
import pytest

from repro.errors import UserError
from repro.scheduling import adaptive
from repro.scheduling.adaptive import AdaptiveSpec, Decaying, History, Situation, Split
from repro.scheduling.load import Costs
from repro.scheduling.long_term import DecodeView, LongTermSpec
from repro.scheduling.short_term import Observation
from repro.scheduling.spec import PolicySpec
from repro.scheduling.views import ClusterView, LinkView

COSTS = Costs(prfaas_s=lambda x: x * 1e-4, pd_s=lambda x: x * 2e-4, kv_bytes=lambda x: 1e8 + 2e4 * x)
LENGTHS = tuple(int(x) for x in np.random.default_rng(0).lognormal(9.9, 1.0, 512))
SPEC = AdaptiveSpec(enabled=True)


def situation(
    n_p: int, n_d: int, rate: float, output_tokens: float, waiting_s: float = 0.0, waiting_decode_s: float = 0.0
) -> Situation:
    seen = Observation(0.0, LENGTHS, rate, ClusterView(1), ClusterView(n_p, waiting_s), LinkView(100e9, 0.1))
    split = Split(n_p, n_d)
    decode = DecodeView(n_d, 1000.0, output_tokens)
    return Situation(seen, decode, waiting_decode_s, 30.0, split, split, 0, 20_000.0)


def test_an_estimate_is_right_from_its_first_value_and_forgets_as_its_memory_says() -> None:
    estimate = Decaying(100.0)
    assert math.isnan(estimate.ratio)
    estimate.add(1.0, 1024.0, 1.0)
    assert estimate.ratio == 1024.0
    for second in range(2, 10_000):
        estimate.add(float(second), 1024.0, 1.0)
    for second in range(10_000, 10_100):
        estimate.add(float(second), 2048.0, 1.0)
    assert estimate.ratio == pytest.approx(2048 - 1024 / math.e, rel=0.01)


def test_a_split_that_several_moves_must_reach_is_gone_for_although_the_first_move_brings_little() -> None:
    loaded = situation(1, 7, 2.0, 100.0, waiting_s=60.0)
    found = adaptive.plan(SPEC, loaded, COSTS)
    assert found.split.n_p >= 3
    assert adaptive.step(SPEC, loaded, COSTS, 0.0, History(SPEC.hold_s)) == 1
    assert adaptive.step(SPEC, situation(6, 2, 2.0, 2900.0), COSTS, 0.0, History(SPEC.hold_s)) == -1


@pytest.mark.parametrize("rate", [0.5, 2.0, 4.0, 8.0])
def test_no_overload_makes_it_rest_where_another_split_serves_more(rate: float) -> None:
    for n_p in range(8):
        at = situation(n_p, 8 - n_p, rate, 1000.0, waiting_s=100.0, waiting_decode_s=100.0)
        found = adaptive.plan(SPEC, at, COSTS)
        if found.worth - found.stay > SPEC.gain:
            assert adaptive.step(SPEC, at, COSTS, 0.0, History(SPEC.hold_s)) != 0


def test_a_calm_system_is_left_alone() -> None:
    assert adaptive.step(SPEC, situation(3, 5, 0.3, 100.0), COSTS, 0.0, History(SPEC.hold_s)) == 0


def test_no_node_turns_while_others_go_the_other_way() -> None:
    loaded = situation(1, 7, 2.0, 100.0, waiting_s=60.0)
    assert adaptive.step(SPEC, loaded._replace(turning=-1), COSTS, 0.0, History(SPEC.hold_s)) == 0
    assert adaptive.step(SPEC, loaded._replace(turning=1), COSTS, 0.0, History(SPEC.hold_s)) == 1


def test_taking_a_move_back_must_gain_twice_as_much_and_as_ever_once_that_is_long_ago() -> None:
    history = History(100.0)
    assert history.needed(0.0, 1, 0.02) == 0.02
    history.moved(0.0, 1, 5)
    assert history.needed(0.0, 1, 0.02) == 0.02
    assert history.needed(0.0, -1, 0.02) == pytest.approx(0.04)
    history.moved(0.0, -1, 5)
    assert history.needed(0.0, 1, 0.02) == pytest.approx(0.08)
    assert history.needed(1e4, 1, 0.02) == pytest.approx(0.02)
    for turn in range(50):
        history.moved(0.0, 1 if turn % 2 else -1, 5)
    assert history.needed(0.0, 1, 0.02) <= 0.02 * 2**4


def test_a_node_that_took_long_to_drain_makes_the_next_one_dearer() -> None:
    history = History(100.0)
    history.moved(10.0, 1, 4)
    history.came(210.0, 4, "prefill")
    assert history.from_decode_s == 200.0
    loaded = situation(2, 6, 1.0, 100.0, waiting_s=20.0)
    assert adaptive.plan(SPEC, loaded, COSTS, 600.0).worth <= adaptive.plan(SPEC, loaded, COSTS, 0.0).worth


def test_two_loops_for_the_same_nodes_are_refused() -> None:
    with pytest.raises(UserError, match=r"policy\.adaptive\.enabled: policy\.long_term\.enabled"):
        PolicySpec("both", long_term=LongTermSpec(enabled=True), adaptive=SPEC)
    with pytest.raises(UserError, match=r"policy\.adaptive\.hold_s: 0"):
        AdaptiveSpec(hold_s=0)
