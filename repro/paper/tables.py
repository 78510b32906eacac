"""Tables 1–6 of arXiv:2604.15039 (v2).

Lengths are keyed by the paper's own labels ("1K" … "128K"); what a label stands for in tokens is a question of its own: see `TOKENS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from repro.paper.quantity import Quantity, printed

LENGTHS = ("1K", "8K", "32K", "128K")

#: Token counts behind the labels. Table 5's sizes are a straight line through four points to 0.06 MiB with these (derived); with 32,768
#: and 131,072 the residual is 6 MiB. `experiment=table5` shows both.
TOKENS = MappingProxyType({"1K": 1_024, "8K": 8_192, "32K": 32_000, "128K": 130_000})
TOKENS_BINARY = MappingProxyType({"1K": 1_024, "8K": 8_192, "32K": 32_768, "128K": 131_072})


@dataclass(frozen=True)
class Model:
    """A row of Table 1; `model` names it in conf/model."""

    name: str
    model: str
    linear: str | None
    full: str
    ratio: str
    parameters_billion: Quantity


TABLE_1 = (
    Model("Kimi Linear", "kimi_linear", "KDA", "MLA", "3:1", printed("48", "10^9", "Table 1")),
    Model("MiMo-V2-Flash", "mimo_v2_flash", "SWA", "GQA", "5:1", printed("309", "10^9", "Table 1")),
    Model("Qwen3.5-397B", "qwen3_5_397b", "GDN", "GQA", "3:1", printed("397", "10^9", "Table 1")),
    Model("Ring-2.5-1T", "ring_2_5_1t", "Lightning", "MLA", "7:1", printed("1000", "10^9", "Table 1")),
    Model("MiniMax-M2.5", "minimax_m2_5", None, "GQA", "dense", printed("229", "10^9", "Table 1")),
    Model("Qwen3-235B", "qwen3_235b", None, "GQA", "dense", printed("235", "10^9", "Table 1")),
)

#: Mechanism → (prefill latency, KV throughput).
TABLE_2 = MappingProxyType(
    {
        "GQA": ("high", "high"),
        "MLA": ("high", "low"),
        "sparse attention": ("low", "high"),
        "SWA": ("low", "low"),
        "linear attention": ("low", "low"),
    }
)

_TABLE_3 = {
    "kimi_linear": ("1.19", "2.29", "3.87", "4.88"),
    "mimo_v2_flash": ("0.82", "2.85", "4.66", "4.71"),
    "qwen3_5_397b": ("4.13", "6.28", "8.25", "7.47"),
    "ring_2_5_1t": ("7.27", "4.47", "2.59", "1.46"),
    "minimax_m2_5": ("4.94", "32.87", "59.93", "47.82"),
    "qwen3_235b": ("4.12", "22.42", "33.35", "21.50"),
}

#: Φ_kv in Gbps on 8×H200 with SGLang v0.5.9, by model and length.
TABLE_3: MappingProxyType[str, MappingProxyType[str, Quantity]] = MappingProxyType(
    {
        model: MappingProxyType(
            {length: printed(text, "Gbps", "Table 3") for length, text in zip(LENGTHS, row, strict=True)}
        )
        for model, row in _TABLE_3.items()
    }
)

#: Symbol → (meaning, unit).
TABLE_4 = MappingProxyType(
    {
        "Λ": ("request arrival rate, and the throughput that is sustained", "req/s"),
        "L": ("uncached input length", "tokens"),
        "t": ("routing threshold", "tokens"),
        "p": ("P(L > t), the fraction sent to PrfaaS", ""),
        "l_long": ("E[L given L > t]", "tokens"),
        "l_short": ("E[L given L ≤ t]", "tokens"),
        "L_out": ("mean output length", "tokens"),
        "S_kv(l)": ("KVCache size of a request of l tokens", "bytes"),
        "T_prefill(l)": ("prefill time of l tokens on one instance", "s"),
        "T_decode": ("time of one decode step at batch size BS_max", "s"),
        "N_prfaas": ("PrfaaS prefill instances", ""),
        "N_p": ("PD-P (local prefill) instances", ""),
        "N_d": ("PD-D (local decode) instances", ""),
        "B_out": ("egress bandwidth of the PrfaaS cluster", "bit/s"),
        "Φ_kv(l)": ("KV throughput of one instance", "bit/s"),
        "Θ_prfaas, Θ_pd-p, Θ_pd-d": ("capacity of each stage", "req/s"),
    }
)


@dataclass(frozen=True)
class ProfileRow:
    """A row of Table 5: the internal 1T hybrid model on 8×H200, in-house vLLM."""

    kv_size: Quantity
    prefill: Quantity
    kv_throughput: Quantity


def _profile(size: str, latency: str, throughput: str) -> ProfileRow:
    return ProfileRow(
        printed(size, "MiB", "Table 5"), printed(latency, "s", "Table 5"), printed(throughput, "Gbps", "Table 5")
    )


TABLE_5: MappingProxyType[str, ProfileRow] = MappingProxyType(
    {
        "1K": _profile("190.8", "0.44", "3.61"),
        "8K": _profile("308.9", "0.72", "3.59"),
        "32K": _profile("701.3", "1.84", "3.19"),
        "128K": _profile("2316.3", "7.40", "2.62"),
    }
)

CASES = ("prfaas_pd", "homogeneous_pd", "naive_heterogeneous_pd")


def _table_6() -> dict[str, dict[str, Quantity]]:
    rows = {
        "threshold_tokens": (("19.4", None, None), "tokens", 1e3),
        "n_prfaas": (("4", None, "4"), "", 1),
        "n_p": (("3", "9", None), "", 1),
        "n_d": (("5", "3", "8"), "", 1),
        "ttft_mean_s": (("2.22", "4.44", "1.74"), "s", 1),
        "ttft_p90_s": (("3.51", "9.73", "3.51"), "s", 1),
        "theta_prfaas": (("1.61", None, "2.45"), "req/s", 1),
        "theta_pd_p": (("1.64", "2.11", None), "req/s", 1),
        "theta_pd_d": (("3.91", "2.35", "6.25"), "req/s", 1),
        "lambda_max": (("3.24", "2.11", "2.45"), "req/s", 1),
        "ratio": (("1.54", "1.00", "1.16"), "", 1),
    }
    table: dict[str, dict[str, Quantity]] = {case: {} for case in CASES}
    for metric, (values, unit, scale) in rows.items():
        for case, text in zip(CASES, values, strict=True):
            if text is not None:
                number = printed(text, unit, "Table 6")
                table[case][metric] = Quantity(number.value * scale, unit, "Table 6", number.precision * scale)
    return table


#: The case study by case and metric, named as in metrics.csv.
TABLE_6: MappingProxyType[str, MappingProxyType[str, Quantity]] = MappingProxyType(
    {case: MappingProxyType(values) for case, values in _table_6().items()}
)
