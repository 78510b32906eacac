"""The router through faults of its own and of memory, and through conversions: every request is answered, and once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import pandas as pd
import pytest
from test_live_router import PROFILE

from repro.errors import UserError
from repro.processes import Ended
from repro.scheduling.decisions import Conversion
from repro.scheduling.long_term import LongTermSpec
from repro.scheduling.placement import FewestHeld
from repro.scheduling.policies import Threshold
from repro.scheduling.short_term import ShortTermSpec
from repro.scheduling.spec import SchedulerSpec
from repro.serving import messages as say
from repro.serving.cluster_caches import Caches
from repro.serving.faults import LiveFault
from repro.serving.router import Router
from repro.serving.scale import Scale
from repro.simulate.link_spec import SharedLinkSpec
from repro.simulate.spec import PdCluster, PrfaasCluster

NAMES = ["prfaas0.0", "prfaas0.1", "pd0.0", "pd0.1", "pd0.2", "pd0.3"]
LONG, SHORT = 4000, 500


class Instances:
    """Instances that answer after some milliseconds, whatever they are told to forget: a late answer must not count."""

    def __init__(self, router: Router, prefill_s: float = 0.01, decode_s: float = 0.02) -> None:
        self.names = NAMES
        self.told: list[tuple[float, str, say.ToInstance]] = []
        self.full = set[str]()
        self.copies = True
        #: So much later than it ended a prefill that was handed over is told; None: never.
        self.telling_s: float | None = 0.0
        self.refused = 0
        self._router = router
        self._prefill_s, self._decode_s = prefill_s, decode_s

    def tell(self, name: str, said: say.ToInstance) -> None:
        now_s = time.monotonic()
        self.told.append((now_s, name, said))
        at = self._router.clock.at
        match said:
            case say.Prefill(request, attempt, _, _, _, _, to):
                end_s = now_s + self._prefill_s
                later_s = self.telling_s if to is not None else 0.0
                if later_s is not None:
                    at(end_s + later_s, self._say, name, say.Prefilled(request, attempt, now_s, end_s))
                if to is not None:
                    at(now_s + self._prefill_s, self._decode, to, request, attempt)
            case say.Copy(request, attempt, _, _, to):
                if self.copies:
                    at(now_s + self._prefill_s, self._say, to, say.Copied(request, attempt, 10))
            case say.Decode(request, attempt):
                self._decode(name, request, attempt)

    def orders(self, name: str) -> list[float]:
        """When an instance was given work."""
        return [at_s for at_s, one, said in self.told if one == name and isinstance(said, say.Prefill | say.Decode)]

    def _decode(self, name: str, request: int, attempt: int) -> None:
        if name in self.full:
            self.refused += 1
            self._say(name, say.Undelivered(request, attempt, "no memory for its KVCache", full=True))
            return
        at_s = time.monotonic()
        self._say(name, say.Delivered(request, attempt, at_s, 10))
        self._say(name, say.Decoding(request, attempt, at_s, at_s))
        self._router.clock.at(
            at_s + self._decode_s, self._say, name, say.Finished(request, attempt, at_s + self._decode_s)
        )

    def _say(self, name: str, said: say.FromInstance) -> None:
        self._router.heard(name, said)


@contextmanager
def running(
    spec: SchedulerSpec | None = None, caches: Callable[[], Caches] = Caches
) -> Iterator[tuple[Router, Instances]]:
    """A router over instances that cost a few milliseconds, time ten times as fast."""
    plan = PdCluster(PROFILE, 1, 3)
    router = Router(
        spec or SchedulerSpec(Threshold(), threshold_tokens=2000.0), plan, PrfaasCluster(PROFILE, 2, SharedLinkSpec(1e10, 0.0)),
        Scale(), link_bps=1e10, caches=caches,
    )  # fmt: skip
    instances = Instances(router)
    router.start(instances, Scale(10.0, 1.0, time.monotonic()))  # type: ignore[arg-type]
    try:
        yield router, instances
    finally:
        router.close()


def served(router: Router, requests: int, between: dict[int, Callable[[], Any]] | None = None) -> pd.DataFrame:
    """Submit so many requests, every other long, 5 ms apart, doing something before some of them; what became of them."""
    for number in range(requests):
        if between and number in between:
            between[number]()
        router.submit(number, router.scale.virtual_s(time.monotonic()), LONG if number % 2 else SHORT, 8)
        time.sleep(0.005)
    assert router.drain(requests, 20.0)
    return router.requests()


def test_a_router_that_is_started_anew_has_every_request_answered_once() -> None:
    with running() as (router, instances):
        found = served(router, 60, {20: router.go_down, 40: router.come_up})
        words = [words for _, words in router.events]
    assert list(found["id"]) == list(range(60))
    assert set(found["outcome"]) == {"ok"}
    assert found.loc[:5, "attempts"].max() == 1  # answered before
    assert found["attempts"].max() == 2  # in flight as it ended
    waited = found.loc[20:39]
    assert (waited["attempts"] == 1).all()  # first asked of the new one
    assert waited["ttft_s"].iloc[0] > 0.9 > waited["ttft_s"].iloc[-1]  # each from when it was due
    assert words[0].startswith("the router is down, with ")
    assert words[1].endswith("20 for the first time")
    forgotten = {said.request for _, _, said in instances.told if isinstance(said, say.Forget)}
    assert forgotten == set(found.loc[found["attempts"] == 2, "id"])


def test_an_answer_that_ends_before_its_prefill_is_told_keeps_the_times_of_both() -> None:
    with running() as (router, instances):
        instances.telling_s = 0.1  # decode takes 20 ms
        found = served(router, 10)
    assert set(found["outcome"]) == {"ok"}
    assert found["attempts"].max() == 1
    assert not found[["queue_s", "prefill_s", "ttft_s"]].isna().any().any()
    remote = found[found["route"] == "prfaas"]
    assert remote["prefill_s"].between(0.09, 0.11).all()


def test_an_answer_that_ended_is_not_asked_for_again_where_its_prefill_instance_dies_untold() -> None:
    how = Ended("instance prfaas0.0", 1, "was killed by SIGKILL", 0)
    with running() as (router, instances):
        instances.telling_s = None
        router.submit(0, router.scale.virtual_s(time.monotonic()), LONG, 8)
        assert not router.drain(1, 0.3)
        (name,) = {name for _, name, said in instances.told if isinstance(said, say.Prefill)}
        router.ended(name, replace(how, role=f"instance {name}"))
        assert router.drain(1, 5.0)
        (row,) = router.requests().to_dict("records")
    assert (row["outcome"], row["attempts"]) == ("ok", 1)
    assert row["ttft_s"] > 0


def test_an_instance_that_dies_while_the_router_is_down_gets_nothing_from_the_new_one() -> None:
    how = Ended("instance prfaas0.0", 1, "was killed by SIGKILL", 0)
    with running() as (router, instances):
        steps = {10: router.go_down, 12: lambda: router.ended("prfaas0.0", how), 20: router.come_up}
        found = served(router, 40, steps)
        before = len(instances.orders("prfaas0.0"))
        assert set(found["outcome"]) == {"ok"}
        assert (found.loc[21:, "prefill_worker"] != "prfaas0.0").all()
        router.heard("prfaas0.0", say.Ready(0))
        for number in range(40, 50):
            router.submit(number, router.scale.virtual_s(time.monotonic()), LONG, 8)
        assert router.drain(50, 20.0)
        assert len(instances.orders("prfaas0.0")) > before


def test_a_run_that_ends_while_the_router_is_down_records_who_was_not_heard() -> None:
    with running() as (router, _):
        router.go_down()
        for number in range(3):
            router.submit(number, 0.0, SHORT, 8)
        assert not router.drain(3, 0.1)
        assert router.close() == 3
        assert set(router.requests()["outcome"]) == {"timed_out"}


def test_a_decode_instance_without_memory_is_passed_over_until_it_has_some() -> None:
    with running() as (router, instances):
        instances.full.add("pd0.1")
        found = served(router, 60)
        assert set(found["outcome"]) == {"ok", "fell_back"}
        assert (found["decode_worker"] != "pd0.1").all()
        # It holds fewest of all, so it would be given every request that comes.
        assert 1 <= instances.refused < 20
        assert found["attempts"].max() == 2
        assert sum("no memory" in words for _, words in router.events) == instances.refused
        instances.full.clear()
        time.sleep(0.6)
        for number in range(60, 70):
            router.submit(number, router.scale.virtual_s(time.monotonic()), SHORT, 8)
        assert router.drain(70, 20.0)
        assert "pd0.1" in set(router.requests().loc[60:, "decode_worker"])


def test_requests_fail_where_no_decode_instance_ever_has_memory() -> None:
    with running() as (router, instances):
        instances.full.update(NAMES)
        router.submit(0, 0.0, SHORT, 8)
        assert router.drain(1, 20.0)
        found = router.requests()
    assert list(found["outcome"]) == ["failed"]


def test_a_paused_instance_is_taken_where_all_are() -> None:
    decoders = FewestHeld()
    decoders.add(0)
    decoders.add(1)
    decoders.pause(0)
    assert [decoders.take(), decoders.take()] == [1, 1]
    decoders.pause(1)
    assert decoders.take() == 0
    decoders.resume(1)
    assert decoders.take() == 1


def converting(*way: Conversion) -> SchedulerSpec:
    """A scheduler whose slow loop looks every 0.3 s; what it decides is scripted by the test."""
    assert way
    return SchedulerSpec(
        Threshold(), threshold_tokens=2000.0, short_term=ShortTermSpec(True, period_s=0.5),
        long_term=LongTermSpec(True, period_s=0.3, restart_s=0.5),
    )  # fmt: skip


def scripted(router: Router, *conversions: Conversion) -> None:
    """The slow loop decides these one after the other, as `loops` does: the node is out of its role at once."""
    left, looks = list(conversions), count()

    def long_term(*_: object) -> Conversion | None:
        # Back only when it has served for a while.
        if not left or (left[0].to == "decode" and next(looks) < 5):
            return None
        home, one = router.scheduler.pd[0], left.pop(0)
        if one.to == "prefill":
            home.decoding.remove(one.instance)
        else:
            home.placement.remove(one.instance)
        home.conversions.append(one)
        return one

    router.scheduler.long_term = long_term  # type: ignore[method-assign, assignment]


def test_nodes_change_roles_two_at_a_time_and_no_request_is_lost() -> None:
    ways = [Conversion(0, 2, "prefill"), Conversion(0, 3, "prefill"), Conversion(0, 2, "decode")]
    with running(converting(*ways)) as (router, instances):
        router.clock.ask(scripted, router, *ways)
        found = served(router, 120)
        events, orders = list(router.events), {name: instances.orders(name) for name in NAMES}
        scale = router.scale
    assert list(found["id"]) == list(range(120))
    assert set(found["outcome"]) == {"ok"}
    assert found["attempts"].max() == 1  # what a node has it finishes
    at_s = {words: scale.wall_s(at) for at, words in events}
    for name, role in (("pd0.2", "prefill"), ("pd0.3", "prefill"), ("pd0.2", "decode")):
        turned, serves = at_s[f"{name} turns to {role}"], at_s[f"{name} serves as {role}"]
        assert turned < serves
        # Of a request that was prefilled for it before, the KVCache may still come; work is not given to it.
        assert not [one for one in orders[name] if turned < one < serves]
    assert {"pd0.2", "pd0.3"} <= set(found["prefill_worker"])


def test_a_node_that_dies_as_it_changes_its_role_is_given_nothing() -> None:
    way = Conversion(0, 3, "prefill")
    with running(converting(way)) as (router, instances):
        router.clock.ask(scripted, router, way)
        served(router, 12)
        assert any("pd0.3 turns to prefill" in words for _, words in router.events)
        router.ended("pd0.3", Ended("instance pd0.3", 1, "was killed by SIGKILL", 0))
        died_s = time.monotonic()
        for number in range(12, 60):
            router.submit(number, router.scale.virtual_s(time.monotonic()), SHORT, 8)
            time.sleep(0.005)
        assert router.drain(60, 20.0)
        assert set(router.requests()["outcome"]) <= {"ok", "fell_back"}
        assert not [one for one in instances.orders("pd0.3") if one > died_s + 0.01]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("pd0.1", 0.0, 1.0, "nap"), "faults.kind: 'nap' is unknown; accepted: kill, stop, slow, out_of_memory"),
        (("pd0.1", 0.0, 1.0, "restart"), "faults.instance: 'pd0.1' for restart; accepted: restart of the router alone"),
        (("router", 0.0, 1.0, "kill"), "faults.instance: 'router' for kill; accepted: restart of the router alone"),
        (
            ("prfaas0.0", 0.0, 1.0, "out_of_memory"),
            "faults.instance: 'prfaas0.0' decodes nothing; accepted for out_of_memory",
        ),
        (("pd0.1", -1.0, 1.0, "kill"), "faults: at_s must not be negative"),
    ],
)
def test_a_fault_that_means_nothing_is_refused(fault: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        LiveFault(*fault)
