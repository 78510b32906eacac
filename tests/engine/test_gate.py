"""Every model goes through one gate: exact against its own `generate`, in one chunk only, or refused with the true reason."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from repro.engine.base import Handover, Request
from repro.engine.gate import admit
from repro.engine.reference import compare, generate
from repro.engine.spans import SpanLog
from repro.engine.torch_engine import EngineSpec, TorchEngine
from repro.errors import UserError
from repro.kvcache.frames import StateKind
from repro.kvcache.prefix import PrefixCacheSpec
from repro.models import spec as models
from repro.models.build import build
from repro.models.prefill import chunked_prefill
from repro.models.spec import ModelSpec

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
JAMBA = {
    **SMALL, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8, "mamba_dt_rank": 8, "attn_layer_period": 2,
    "attn_layer_offset": 1, "use_mamba_kernels": False,
}  # fmt: skip
BAMBA = {
    **SMALL, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
}  # fmt: skip
OUTPUT_TOKENS = 6


def checkpoint(folder, family: str, config: dict[str, object]) -> ModelSpec:
    model = build(ModelSpec(family, family, dtype="float32", config=config))
    model.save_pretrained(folder)
    return ModelSpec("pretrained", "auto", dtype="float32", pretrained=str(folder))


def request(tokens: int, vocabulary: int) -> Request:
    ids = torch.randint(3, vocabulary, (tokens,), generator=torch.Generator().manual_seed(tokens))
    return Request(1, tuple(ids.tolist()), OUTPUT_TOKENS)


def answer(engine: TorchEngine) -> list[int]:
    tokens = [engine.step()[0][1] for _ in range(OUTPUT_TOKENS)]
    engine.leave(1)
    return tokens


def split_through(engine: TorchEngine, asked: Request, change=lambda state: state):
    pieces = []
    engine.prefill(asked, pieces.append, SpanLog())
    engine.join(Handover.of(asked), [change(state) for state in engine.fetch(pieces)])
    return answer(engine), engine.agreement(1)


@pytest.mark.parametrize(("family", "config", "chunked"), [("bamba", BAMBA, True), ("jamba", JAMBA, False)])
def test_a_checkpoint_on_disk_gives_the_tokens_of_its_own_generate_beyond_a_chunk(tmp_path, family, config, chunked):
    spec = checkpoint(tmp_path, family, config)
    engine, asked = TorchEngine(EngineSpec(spec, chunk_tokens=256)), request(259, 64)
    assert engine.admission.chunked == chunked
    engine.reference(asked)
    tokens, agreement = split_through(engine, asked)
    assert tokens == list(generate(build(spec), torch.tensor([asked.prompt]), OUTPUT_TOKENS).tokens)
    assert agreement.matches
    assert agreement.compared_steps == OUTPUT_TOKENS


def test_a_model_that_is_exact_in_one_chunk_only_says_so_in_the_record_and_has_no_prefix_cache():
    spec = ModelSpec("jamba", "jamba", dtype="float32", config=JAMBA)
    record = TorchEngine(EngineSpec(spec, chunk_tokens=16)).admission.record()
    assert not record["chunked"]
    assert "single tokens only" in json.dumps(record)
    with pytest.raises(UserError, match=r"prefix_cache\.capacity_bytes.*single tokens only"):
        TorchEngine(
            EngineSpec(spec, chunk_tokens=16, prefix_cache=PrefixCacheSpec(capacity_bytes=1 << 20, block_tokens=16))
        )


@pytest.mark.parametrize("name", models.names())
def test_every_model_of_the_configuration_is_exact_in_chunks(name):
    found = admit(build(models.load(name, "tiny")))
    assert found.chunked
    assert found.dtype == "float32"  # small enough to be looked at without rounding
    assert max(found.logits_error, found.state_error) <= found.tolerance


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
        ("gpt_neo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
        ("mamba2", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1}),
    ],
)  # fmt: skip
def test_layers_without_a_norm_of_that_name_and_caches_of_another_argument_are_served(family, config):
    spec = ModelSpec(family, family, dtype="float32", config={"vocab_size": 64, **config})
    assert admit(build(spec)).chunked


class PositionsOfItsOwn(LlamaForCausalLM):
    """Counts positions from 0 in every pass of several tokens, whatever it is told."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, **kwargs):
        if input_ids.shape[1] > 1:
            position_ids = torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs)


class StateOutside(LlamaForCausalLM):
    """Keeps the sum of all tokens on itself, not in the cache, and answers with it."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, **kwargs):
        output = super().forward(input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs)
        before = self.kept if getattr(self, "kept_for", None) is past_key_values else 0
        self.kept, self.kept_for = before + int(input_ids.sum()), past_key_values
        return replace(output, logits=output.logits * (1 + self.kept % 7))


class NotCausal(LlamaForCausalLM):
    """Lets every token of a pass see those after it."""

    def forward(self, input_ids=None, position_ids=None, past_key_values=None, **kwargs):
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask = torch.zeros(1, 1, input_ids.shape[1], seen + input_ids.shape[1])
        kwargs["attention_mask"] = mask
        return super().forward(input_ids, position_ids=position_ids, past_key_values=past_key_values, **kwargs)


def unheard_of(kind: type[LlamaForCausalLM]) -> torch.nn.Module:
    torch.manual_seed(0)
    config = build(ModelSpec("x", "llama", config=SMALL), "meta").config
    return kind(config).eval().requires_grad_(False)


def test_a_family_that_miscounts_positions_in_chunks_is_served_in_one_chunk():
    assert admit(unheard_of(LlamaForCausalLM)).chunked
    assert not admit(unheard_of(PositionsOfItsOwn)).chunked


@pytest.mark.parametrize(
    ("kind", "reason"), [(StateOutside, "keeps state outside its cache"), (NotCausal, "not causal|generate")]
)
def test_a_family_that_is_exact_in_no_way_is_refused_with_the_reason(kind, reason):
    with pytest.raises(UserError, match=rf"model {kind.__name__}: .*({reason})"):
        admit(unheard_of(kind))


def test_padding_is_refused():
    model = build(ModelSpec("x", "llama", dtype="float32", config=SMALL))
    ids = torch.ones((2, 8), dtype=torch.long)
    padded = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])
    with pytest.raises(UserError, match="attention_mask: hides tokens"):
        chunked_prefill(model, ids, attention_mask=padded)
    chunked_prefill(model, ids, attention_mask=torch.ones_like(ids))


MLA = {
    **SMALL, "num_hidden_layers": 8, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rope_part_of_a_latent_that_is_lost_in_transit_is_seen_in_every_layer(dtype):
    engine = TorchEngine(EngineSpec(ModelSpec("mla", "deepseek_v3", dtype=dtype, config=MLA), chunk_tokens=32))
    asked = request(100, 64)
    engine.reference(asked)
    engine.prefill_and_join(asked, SpanLog())
    answer(engine)
    assert engine.agreement(1).matches
    _, whole = split_through(engine, asked)
    assert whole.matches
    assert whole.unsplit_error == 0
    for layer in range(8):

        def lose(state, layer=layer):
            lost = state.kind is StateKind.LATENT_ROPE and state.layer == layer
            return replace(state, tensor=torch.zeros_like(state.tensor)) if lost else state

        _, agreement = split_through(engine, asked, lose)
        assert not agreement.matches
        assert dtype == "bfloat16" or agreement.logits_error > agreement.tolerance  # generate alone shows it there


def test_ties_are_told_from_errors():
    model = build(ModelSpec("x", "llama", dtype="float32", config=SMALL))
    reference = generate(model, torch.tensor([[5, 6, 7]]), 2)
    first, second = reference.logits
    other = int(first.argsort(descending=True)[1])
    tied, wrong = first.clone(), first.clone()
    near = 1e-6 * float(first.std())
    assert compare(reference, reference.tokens, [first + near, second], 1e-3).ties == 0
    tied[other] += near
    found = compare(reference, [other, 9], [tied, second + 100], 1e-3)
    assert (found.matches, found.ties, found.compared_steps) == (True, 1, 1)  # what follows a tie is another text
    wrong[other] += 1
    found = compare(reference, [other, 9], [wrong, second], 1e-3)
    assert (found.matches, found.ties) == (False, 0)
    assert not compare(reference, reference.tokens, [first * math.nan, second], 1e-3).matches
