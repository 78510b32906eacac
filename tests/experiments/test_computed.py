"""What a live deployment that computes must answer: the model unsplit, token for token, and none where that is not what the model says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from repro.composition import compose
from repro.engine.base import Request
from repro.engine.spans import SpanLog
from repro.engine.torch_engine import TorchEngine
from repro.experiments import computed
from repro.experiments.computed import Answers, Computing, drawn_lengths
from repro.experiments.split_model import engine_of, vocabulary_of
from repro.experiments.table3 import one_model
from repro.models.build import build
from repro.profiles.base import PrefillCurve
from repro.serving.torch_instance import TorchInstanceConfig, prompt_of
from repro.workload.lengths import TruncatedLogNormal

pytestmark = pytest.mark.slow
STEPS = 4
LENGTHS = {3: 40, 17: 33}


@pytest.fixture(scope="module")
def answers() -> Answers:
    settings = compose(["experiment=live_stress"]).settings
    model = one_model(settings)
    computing = Computing(engine_of(model, 32, 1), vocabulary_of(model), 16)
    config = computing.config("reference", settings.transport, None, 1, 0)
    assert isinstance(config, TorchInstanceConfig)
    return Answers(build(model, "cpu"), config, 1)


@pytest.fixture(scope="module")
def given(answers: Answers) -> dict[int, list[int]]:
    """What an engine of an instance's kind answers."""
    engine, found = TorchEngine(answers.config.engine), dict[int, list[int]]()
    for number, tokens in LENGTHS.items():
        prompt = tuple(prompt_of(answers.config, number, tokens))
        engine.prefill_and_join(Request(number, prompt, STEPS), SpanLog())
        found[number] = [engine.step()[0][1] for _ in range(STEPS)]
        engine.leave(number)
    return found


def played(tokens: dict[int, list[int]]) -> Any:
    requests = pd.DataFrame({"id": list(LENGTHS), "input_tokens": list(LENGTHS.values())})
    return SimpleNamespace(requests=requests, tokens=tokens)


def test_an_instances_own_answers_are_right_and_one_other_token_is_not(
    answers: Answers, given: dict[int, list[int]]
) -> None:
    assert answers.right(played(given)) == (2, 2)
    assert answers.right(played(given), most=1) == (1, 1)
    other = {**given, 17: [*given[17][:-1], given[17][-1] ^ 1]}
    assert answers.right(played(other)) == (1, 2)


def test_a_computation_that_is_not_what_the_model_says_has_no_right_answers(
    answers: Answers, given: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> Any:
        found = reference(model, ids, steps)
        return type(found)(found.tokens, found.logits + 1e-3 * torch.randn_like(found.logits))

    reference = computed.generate
    monkeypatch.setattr(computed, "generate", elsewhere)
    fresh = Answers(answers.model, answers.config, 1)
    assert fresh.right(played(given)) == (0, 2)


def test_the_lengths_that_are_timed_stand_for_the_law():
    law = TruncatedLogNormal(5.0, 0.6, 64, 512)
    lengths = drawn_lengths(law)
    assert (lengths[0], lengths[-1]) == (64, 512)
    parts = np.diff(law.fraction_above(np.array(lengths[1:-1])))
    np.testing.assert_allclose(-parts, 1 / 8, atol=0.01)
    # A kernel that computes whole blocks of 64 tokens: a curve through round lengths alone is far below what requests take.
    blocks = lambda tokens: np.ceil(np.asarray(tokens) / 64)  # noqa: E731
    drawn = law.sample(np.random.default_rng(0), 20_000)
    round_ones = np.array([64, 128, 256, 512])
    took = float(np.mean(blocks(drawn)))
    assert float(np.mean(PrefillCurve("linear", (64, 128, 256, 512), tuple(blocks(round_ones)))(drawn))) < 0.87 * took
    through = PrefillCurve(tokens=tuple(lengths), seconds=tuple(blocks(lengths)))
    assert float(np.mean(through(drawn))) == pytest.approx(took, rel=0.05)
