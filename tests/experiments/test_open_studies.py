"""Studies of batches, codecs, privacy, decoupling, decode at home and bursts: their arithmetic, and findings that follow from records."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from repro.composition import compose
from repro.configuration import build
from repro.experiments.batch_efficiency import PassCost, served
from repro.experiments.deployment import deployment
from repro.experiments.edge_decode import (
    MODELS,
    SERVICE,
    Costs,
    Device,
    Options,
    attention_flops,
    smallest_link_bps,
    split,
)
from repro.experiments.kv_diet import kind_shares
from repro.experiments.privacy import reverse_split, tls_bps
from repro.link.spec import LinkSpec
from repro.models import spec
from repro.models.architectures import layout_of
from repro.presets import preset
from repro.profiles.base import PrefillCurve
from repro.record.directory import Record
from repro.record.metrics import value
from repro.runner import run

#: A checkpoint that has hardly been trained.
QUICK = ("options.training.steps=1", "options.training.batch=1", "options.training.window_tokens=32")


def study(folder: Path, *words: str) -> Record:
    return run(
        compose([*words, f"results={folder}", "tracking=disabled", "processes=1"]), ["repro", *words], lambda line: None
    )


def costs(name: str = "qwen3_235b") -> Costs:
    (asked,) = (model for model in MODELS if model.name == name)
    return Costs(spec.load(name, "full"), layout_of(name), asked.active_parameters, Options())


def test_attention_takes_two_operations_for_each_pair_of_tokens_and_element() -> None:
    dense = {"num_attention_heads": 2, "head_dim": 8, "num_hidden_layers": 3}
    assert attention_flops(dense, 100) == 3 * 2 * (8 + 8) * 100**2
    sliding = dense | {"layer_types": ["sliding_attention"], "sliding_window": 10}
    assert attention_flops(sliding, 100) == 2 * 2 * (8 + 8) * 100 * 10
    assert attention_flops(dense | {"layer_types": ["linear_attention"]}, 100) == 0


def test_over_the_smallest_link_the_split_is_as_soon_as_the_device_alone() -> None:
    device, link = (
        Device("slow", 10e12, 300e9, memory_bytes=512e9),
        build(LinkSpec, preset("link", "home_fibre"), "link"),
    )
    own = costs()
    least = smallest_link_bps(own, device, link, 32_768)
    at_it = split(own, device, replace(link, rate_bps=least), 32_768, 100)
    assert at_it["edge_ttft_s"] == pytest.approx(at_it["local_ttft_s"])
    assert split(own, device, replace(link, rate_bps=2 * least), 32_768, 100)["edge_ttft_s"] < at_it["local_ttft_s"]
    assert smallest_link_bps(own, SERVICE, link, 32_768) == math.inf, "no link helps a device as fast as the service"


def test_decode_at_home_says_which_link_it_takes_and_a_codec_halves_it(tmp_path: Path) -> None:
    small = ["options.tokens=[8192]", "options.compared_tokens=8192", "options.links=[home_fibre,starlink]"]
    record = study(tmp_path, "experiment=edge_decode", *small)
    table = record.metrics
    least = table[table["metric"] == "smallest_link_bps"]["value"] / 1e6
    assert f"from {least.min():.0f} Mbps" in record.provenance["finding"]
    assert f"to {least.max():,.0f} Mbps" in record.provenance["finding"]
    case = "qwen3_5_397b on M3 Ultra over starlink"
    halved = study(tmp_path, "experiment=edge_decode", *small, "options.kv_ratio=0.5").metrics
    assert value(halved, "smallest_link_bps", case) == pytest.approx(value(table, "smallest_link_bps", case) / 2)
    hybrid, dense = (
        value(table, "smallest_link_bps", f"{model} on M3 Ultra over starlink")
        for model in ("qwen3_5_397b", "qwen3_235b")
    )
    assert dense > 2 * hybrid, "a dense model's state takes a wider link"


def test_the_parts_of_a_prefill_curve_are_found_again() -> None:
    cost = PassCost.of(PrefillCurve("quadratic", coefficients=(0.4, 0.3, 2.0)), 512, 131_072)
    assert cost.fixed_s == pytest.approx(0.4, rel=1e-6)
    assert cost.fixed_s + cost.work_s(0, 20_000) == pytest.approx(0.4 + 0.6 + 2.0 * 0.04)
    assert cost.work_s(0, 10_000) + cost.work_s(10_000, 30_000) == pytest.approx(cost.work_s(0, 30_000))
    assert float(cost.shared_by(4)(20_000)) == pytest.approx(0.1 + 0.6 + 2.0 * 0.04)


def test_a_batch_pays_the_fixed_part_once_and_a_budget_cuts_a_prompt() -> None:
    cost, lengths, now = PassCost(1.0, 0.001, 0.0), np.array([1000.0, 1000.0, 1000.0]), np.zeros(3)
    assert served(now, lengths, cost, 1, np.inf).tolist() == pytest.approx([2.0, 4.0, 6.0])
    assert served(now, lengths, cost, 2, np.inf).tolist() == pytest.approx([3.0, 3.0, 5.0])
    assert served(now, lengths, cost, 3, 1500.0).tolist() == pytest.approx([2.5, 5.0, 5.0])
    assert served(np.array([0.0, 10.0, 10.0]), lengths, cost, 3, np.inf).tolist() == pytest.approx([2.0, 13.0, 13.0])


def test_one_request_at_a_time_waits_as_the_pollaczek_khinchine_formula_says() -> None:
    rng, count, load = np.random.default_rng(1), 100_000, 0.7
    cost = PassCost(0.0, 0.001, 0.0)
    lengths = rng.exponential(1000.0, count)
    arrivals = np.cumsum(np.random.default_rng(2).exponential(1 / load, count))
    waited = served(arrivals, lengths, cost, 1, np.inf) - arrivals
    assert waited.mean() == pytest.approx(1 / (1 - load), rel=0.05)


def test_the_models_kinds_of_state_are_mapped_to_measured_ones_and_add_up() -> None:
    for model in ("paper_1t", "qwen3_235b", "gemma_4_26b", "unknown"):
        shares = kind_shares(model, 32_768)
        assert sum(shares.values()) == pytest.approx(1.0)
        assert set(shares) <= {"key", "value", "recurrent", "convolution"}
    assert kind_shares("paper_1t", 1024)["recurrent"] > kind_shares("paper_1t", 131_072)["recurrent"]


def test_the_reverse_split_is_bound_by_the_trusted_sides_prefill() -> None:
    base = deployment(compose(["experiment=table6"]).settings)
    found = reverse_split(base, True)
    prefill = base.n_pd / float(base.pd.prefill_s(base.lengths.mean_tokens))
    assert found["lambda_max"] <= prefill + 1e-9
    assert reverse_split(replace(base, n_prfaas=8), True)["lambda_max"] >= found["lambda_max"]
    choked = reverse_split(replace(base, egress_bps=1e8), True)
    assert choked["lambda_max"] < found["lambda_max"]
    assert 0 <= choked["link_utilisation"] <= 1 + 1e-9
    assert found["link_utilisation"] > 0, "what is decoded remotely crosses the link"


def test_tls_is_timed_both_ways() -> None:
    assert all(1e7 < bps < 1e12 for bps in tls_bps(1 << 21))


def test_a_burst_touches_nobody_else_where_each_has_its_own_part(tmp_path: Path) -> None:
    words = [
        "experiment=tenants",
        "options.tenants=2",
        "options.duration_s=200",
        "options.at_s=60",
        "options.for_s=80",
        "options.seeds=2",
    ]
    burst = study(tmp_path, *words, "options.factor=4")
    calm = study(tmp_path, *words, "options.factor=1.0001")
    table = burst.metrics
    others = {
        name: value(record.metrics, "ttft_mean_s", "own, others") for name, record in (("burst", burst), ("calm", calm))
    }
    assert others["burst"] == others["calm"], "a part of one's own hears nothing of the burst"
    assert value(table, "ttft_mean_s", "own, bursting") > value(calm.metrics, "ttft_mean_s", "own, bursting")
    assert value(table, "ttft_mean_s", "shared, others") > others["burst"], "in one queue the others wait too"
    assert (
        f"{others['burst']:.2f} to {value(table, 'ttft_mean_s', 'shared, others'):.2f} s" in burst.provenance["finding"]
    )


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_prompt_is_read_back_from_its_keys(tmp_path: Path) -> None:
    record = study(
        tmp_path,
        "experiment=privacy",
        "options.prompts=1",
        "options.tokens=4",
        *QUICK,
        "options.tls_bytes=2000000",
    )
    table = record.metrics
    assert value(table, "tokens_recovered", "exact") == 1.0
    assert value(table, "tokens_recovered", "guess") < 0.5
    assert f"reads {100 * value(table, 'tokens_recovered', 'exact'):.0f} %" in record.provenance["finding"]
    assert f"serves {value(table, 'lambda_max', 'reverse_split'):.2f} req/s" in record.provenance["finding"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_codecs_are_put_to_the_link_with_the_ratios_that_were_measured(tmp_path: Path) -> None:
    small = [
        "options.prompts=1",
        "options.prompt_tokens=24",
        "options.following_tokens=2",
        *QUICK,
        "options.repeats=1",
    ]
    record = study(tmp_path, "experiment=kv_diet", *small)
    table, links = record.metrics, record.table("links")
    plain, coded = (value(table, "egress_bps", f"deployment, {codec}") for codec in ("none", "int8"))
    assert plain / coded == pytest.approx(value(table, "ratio", "deployment, int8"))
    assert links[links["link_bps"] > links["phi_kv_bps"]]["ttft_gain"].max() <= 1 + 1e-9, (
        "a link faster than Φ_kv has nothing to gain"
    )
    assert value(table, "ratio", "deployment, none") == 1.0
    assert f"int8 {value(table, 'ratio', 'deployment, int8'):.2f} times" in record.provenance["finding"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_parts_of_ttft_add_up_to_it(tmp_path: Path) -> None:
    small = [
        "model=qwen3_235b",
        "options.input_tokens=40",
        "options.chunk_tokens=16",
        "options.repeats=2",
        "options.links=[loopback]",
    ]
    record = study(tmp_path, "experiment=decoupling", *small)
    table = record.metrics
    parts = table[table["metric"] == "ttft_part_s"]
    for mode in ("layerwise", "bulk"):
        case = f"qwen3_235b/loopback/{mode}"
        own = parts[parts["case"].str.startswith(f"{case}/")]["value"]
        assert own.sum() == pytest.approx(value(table, "ttft_mean_s", case), rel=1e-6)
        assert value(table, "tokens_match", case) == 1.0
    over = value(table, "ttft_to_unsplit", "qwen3_235b/loopback/layerwise")
    assert f"takes {over:.2f} to {over:.2f} times" in record.provenance["finding"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_batches_finding_is_that_of_its_record(tmp_path: Path) -> None:
    small = [
        "model=qwen3_235b",
        "options.prompt_tokens=32",
        "options.batches=[1,2]",
        "options.chunks_tokens=[16]",
        "options.requests=200",
    ]
    record = study(tmp_path, "experiment=batch_efficiency", *small, "policy.threshold_step_tokens=2000")
    table = record.metrics
    ratio = value(table, "throughput_ratio", "fixed part shared by 8")
    assert f"PrfaaS-PD serves {ratio:.2f} times" in record.provenance["finding"]
    assert value(table, "batch_gain", "qwen3_235b, batch of 1") == 1.0
    assert (
        value(table, "prefill_capacity_ratio", "prfaas, batches of 8")
        > value(table, "prefill_capacity_ratio", "prfaas, batches of 2")
        > 1
    )
