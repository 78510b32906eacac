"""Studies of decode at home and of bursting tenants: their arithmetic, and findings that follow from records."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from repro.composition import compose
from repro.configuration import build
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
from repro.link.spec import LinkSpec
from repro.models import spec
from repro.models.architectures import layout_of
from repro.presets import preset
from repro.record.directory import Record
from repro.record.metrics import value
from repro.runner import run


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
    device, link = Device("slow", 10e12, 300e9, 512e9), build(LinkSpec, preset("link", "home_fibre"), "link")
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
