"""An instance's connections: whoever is away is dialled again, until it answers or its successor is named; a refusal is an error."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any, cast

import pytest

from repro.errors import UserError
from repro.serving.dialling import Dialling
from repro.serving.messages import Connect
from repro.transport import ReceiverAwayError, Sender


class Ring:
    """Stands for open senders: who is away by port, what was dialled, and what came of it."""

    def __init__(self, *away: int) -> None:
        self.away = set(away)
        self.dialled = Counter[int]()
        self.open = list[tuple[str, int]]()
        self.closed = list[int]()
        self.changed = threading.Condition()

    def dial(self, address: tuple[str, int]) -> Sender:
        with self.changed:
            self.dialled[address[1]] += 1
            self.changed.notify_all()
            if address[1] in self.away:
                self.changed.wait(0.01)
                raise ReceiverAwayError("nobody")
            return cast(Sender, _Line(self, address[1]))

    def connected(self, name: str, sender: Any) -> None:
        with self.changed:
            self.open.append((name, sender.port))
            self.changed.notify_all()

    def until(self, done: Any) -> bool:
        with self.changed:
            return self.changed.wait_for(done, 10)


class _Line:
    def __init__(self, ring: Ring, port: int) -> None:
        self.ring, self.port = ring, port

    def close(self) -> None:
        with self.ring.changed:
            self.ring.closed.append(self.port)
            self.ring.changed.notify_all()


def test_one_that_is_away_is_dialled_again_until_it_answers() -> None:
    ring = Ring(1)
    Dialling(ring.dial, ring.connected).to(Connect("pd0.0", "here", 1))
    assert ring.until(lambda: ring.dialled[1] > 3)
    with ring.changed:
        ring.away.clear()
    assert ring.until(lambda: ring.open == [("pd0.0", 1)])


def test_a_successor_ends_the_calls_to_the_one_before() -> None:
    ring = Ring(1)
    dialling = Dialling(ring.dial, ring.connected)
    dialling.to(Connect("pd0.0", "here", 1))
    assert ring.until(lambda: ring.dialled[1] > 1)
    dialling.to(Connect("pd0.0", "here", 2))
    assert ring.until(lambda: ring.open == [("pd0.0", 2)])
    for thread in threading.enumerate():
        if thread.name == "connect pd0.0":
            thread.join(10)
            assert not thread.is_alive(), "nobody dials the old address any more"
    assert ring.open == [("pd0.0", 2)]


def test_what_answers_after_its_successor_was_named_is_closed() -> None:
    ring, answers = Ring(), threading.Event()

    def dial(address: tuple[str, int]) -> Sender:
        if address[1] == 1:
            assert answers.wait(10)
        return ring.dial(address)

    dialling = Dialling(dial, ring.connected)
    dialling.to(Connect("pd0.0", "here", 1))
    dialling.to(Connect("pd0.0", "here", 2))
    assert ring.until(lambda: ring.open == [("pd0.0", 2)])
    answers.set()
    assert ring.until(lambda: ring.closed == [1])
    assert ring.open == [("pd0.0", 2)]


def test_who_refuses_is_not_dialled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    failures, seen = list[Any](), threading.Event()

    def take(failure: Any) -> None:
        failures.append(failure.exc_value)
        seen.set()

    def refuse(address: tuple[str, int]) -> Sender:
        raise UserError("the receiver wants a secret")

    monkeypatch.setattr(threading, "excepthook", take)
    Dialling(refuse, lambda name, sender: None).to(Connect("pd0.0", "here", 1))
    assert seen.wait(10)
    assert [str(one) for one in failures] == ["the receiver wants a secret"]
