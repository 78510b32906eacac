"""A decode side that is slowed down: how much it rests, and what is measured of it."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from repro.experiments.edge_decode_throttled import throttled


def test_every_forward_pass_is_followed_by_a_rest_of_the_factor() -> None:
    model, ticks, rests = torch.nn.Linear(2, 2), count(), list[float]()
    with throttled(model, 5.0, clock=lambda: float(next(ticks)), rest=rests.append):
        model(torch.zeros(2))
        model(torch.zeros(2))
    assert rests == [4.0, 4.0], "each pass took one tick"
    model(torch.zeros(2))
    assert len(rests) == 2, "and at full speed again behind it"


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
