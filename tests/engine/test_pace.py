"""A model that is slowed down: how much it rests, whoever else wants its core."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from repro.engine.pace import throttled


def test_every_forward_pass_is_followed_by_a_rest_of_the_factor() -> None:
    model, ticks, rests = torch.nn.Linear(2, 2), count(), list[float]()
    with throttled(model, 5.0, clock=lambda: float(next(ticks)), rest=rests.append):
        model(torch.zeros(2))
        model(torch.zeros(2))
    assert rests == [4.0, 4.0], "each pass took one tick"
    model(torch.zeros(2))
    assert len(rests) == 2, "and at full speed again behind it"


@pytest.mark.parametrize(
    ("wall_s", "busy_s", "rest_s"),
    [(2.0, 2.0, 4.0), (5.0, 2.0, 1.0), (9.0, 2.0, None)],
    ids=["alone", "waited", "waited longer"],
)
def test_a_pass_that_waited_for_a_core_rests_so_much_the_less(
    wall_s: float, busy_s: float, rest_s: float | None
) -> None:
    model, rests = torch.nn.Linear(2, 2), list[float]()
    walls, busies = iter((0.0, wall_s)), iter((0.0, busy_s))
    with throttled(model, 3.0, clock=lambda: next(walls), rest=rests.append, busy=lambda: next(busies)):
        model(torch.zeros(2))
    assert rests == ([] if rest_s is None else [rest_s]), "six seconds in all, or what it took"


def test_a_factor_of_one_never_rests() -> None:
    model, rests = torch.nn.Linear(2, 2), list[float]()
    with throttled(model, 1.0, rest=rests.append):
        model(torch.zeros(2))
    assert rests == []


def test_hooks_are_gone_after_an_error() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError), throttled(model, 2.0, rest=lambda seconds: None):
        model(torch.zeros(3))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
