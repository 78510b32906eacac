"""At least forty families of transformers: exact against their own `generate`, or refused with the reason; none silently wrong."""

from pathlib import Path

import pytest
import torch

from repro.engine.base import Handover, Request
from repro.engine.families import FAMILIES, document, spec_of
from repro.engine.spans import SpanLog
from repro.engine.torch_engine import EngineSpec, TorchEngine
from repro.errors import UserError
from repro.models.build import build
from repro.models.spec import ModelSpec

DOC = Path(__file__).parents[2] / "docs" / "models.md"
REFUSED = {"bert": "not causal", "minimax": "cache of its own", "rwkv": "takes no cache"}
ONE_CHUNK = {"falcon_mamba", "jamba", "mamba"}
#: By chunk, tokens of state: the shortest, around the window (9) and the chunk, and several chunks with a rest.
LENGTHS = {16: (1, 2, 8, 9, 10, 15, 16, 17, 53), 256: (255, 257, 259)}
QUICK = ("deepseek_v3", "falcon_h1", "gemma3_text", "jamba", "lfm2", "qwen3_next")


def rest(families):
    return [family for family in families if family not in QUICK]


def errors(family: str) -> dict[tuple[int, int], float]:
    """By chunk and tokens, the greatest error of the logits of a request whose state was taken out and put back."""
    found = {}
    for chunk_tokens, lengths in LENGTHS.items():
        engine = TorchEngine(EngineSpec(spec_of(family), chunk_tokens, staging_bytes=4 << 20))
        assert engine.admission.chunked == (family not in ONE_CHUNK)
        for tokens in lengths:
            ids = torch.randint(3, 64, (tokens + 1,), generator=torch.Generator().manual_seed(tokens))
            asked, pieces = Request(tokens, tuple(ids.tolist()), 2), []
            engine.reference(asked)
            engine.prefill(asked, pieces.append, SpanLog())
            engine.join(Handover.of(asked), engine.fetch(pieces))
            engine.step(), engine.step()
            engine.leave(tokens)
            agreement = engine.agreement(tokens)
            assert agreement.matches, (family, chunk_tokens, tokens, agreement)
            found[chunk_tokens, tokens] = agreement.logits_error
    return found


@pytest.mark.parametrize("family", QUICK)
def test_a_family_gives_the_logits_of_its_own_generate_at_every_length_and_chunk(family):
    assert max(errors(family).values()) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in rest(FAMILIES) if family not in REFUSED])
def test_every_other_family_does_as_well(family):
    assert max(errors(family).values()) < 2e-5


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_split_exactly_is_refused_with_the_true_reason(family):
    with pytest.raises(UserError, match=REFUSED[family]):
        TorchEngine(EngineSpec(spec_of(family)))


def test_the_table_of_models_is_current_and_holds_forty_families():
    assert DOC.read_text(encoding="utf-8") == document(), (
        "write it anew: python -m repro.engine.families > docs/models.md"
    )
    assert len(FAMILIES) - len(REFUSED) >= 40


def test_a_configuration_that_contradicts_itself_is_one_line():
    with pytest.raises(UserError, match=r"model bamba: .*mamba_n_heads|model bamba: Class validation") as refused:
        build(ModelSpec("bamba", "bamba", config={"hidden_size": 33, "num_hidden_layers": 1}), "meta")
    assert "\n" not in str(refused.value)
