"""Words for code names: what figures, tables and reports call a key, a metric, a case and their values."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_NAMES: Mapping[str, str] = MappingProxyType({
    # keys
    "link.rate_bps": "link rate", "link.rtt_s": "round trip", "link.loss": "loss", "transport.connections": "connections",
    "policy.n_p": "PD-P instances", "policy.threshold_tokens": "threshold t", "options.load": "load", "policy": "policy",
    "workload": "workload", "model": "model", "profile": "profile", "workload.output_tokens": "output length",
    "cluster.prfaas.instances": "PrfaaS instances", "cluster.pd.instances": "PD instances", "experiment": "experiment", "tier": "tier",
    "cost.usd_per_gpu_hour.H200": "price of an H200-hour", "cost.usd_per_egress_gb": "price of egress per GB",
    # metrics
    "lambda_max": "Λ_max", "goodput": "goodput", "ttft_mean_s": "mean TTFT", "ttft_p50_s": "median TTFT", "ttft_p90_s": "P90 of TTFT",
    "ttft_p99_s": "P99 of TTFT", "tpot_mean_s": "mean TPOT", "tpot_p99_s": "P99 of TPOT", "egress_bps": "egress",
    "link_egress_bps": "egress over the link", "link_utilisation": "link utilisation", "offload_fraction": "share offloaded",
    "good_fraction": "share within the SLO", "completed_fraction": "share answered", "phi_kv_bps": "KV throughput Φ_kv",
    "kv_bytes": "KVCache size", "prefill_s": "T_prefill", "ttft_bound_ratio": "TTFT ÷ its bound",
    "equal_cost_gain": "gain at equal cost", "cost_per_mtok_usd": "cost per million output tokens", "ratio": "Λ_max ÷ homogeneous PD's",
    "theta_prfaas": "Θ_prfaas", "theta_pd_p": "Θ_pd-p", "theta_pd_d": "Θ_pd-d", "threshold_tokens": "threshold t",
    "n_prfaas": "PrfaaS instances", "n_p": "PD-P instances", "n_d": "PD-D instances", "l_long_tokens": "mean offloaded length",
    "l_short_tokens": "mean local length", "break_even_egress_usd_per_gb": "egress price that eats the gain",
    "instances_per_link": "prefill instances per link",
    # models
    "kimi_linear": "Kimi Linear", "mimo_v2_flash": "MiMo-V2-Flash", "minimax_m2_5": "MiniMax-M2.5", "qwen3_235b": "Qwen3-235B",
    "qwen3_5_397b": "Qwen3.5-397B", "qwen3_6_27b": "Qwen3.6-27B", "qwen3_6_35b": "Qwen3.6-35B",
    "ring_2_5_1t": "Ring-2.5-1T", "paper_1t": "the paper's 1T model",
    # cases
    "32K, this link": "32K tokens", "128K, this link": "128K tokens",
    "prfaas_pd": "PrfaaS-PD", "homogeneous_pd": "homogeneous PD", "naive_heterogeneous_pd": "naive heterogeneous PD",
    "static": "static t", "short_term": "short-term loop only", "two_timescale": "both loops", "random_split": "random split",
    "naive": "naive heterogeneous", "deployment": "deployment",
})  # fmt: skip

_READINGS = {"representative": "at representative lengths", "true_mean": "by true means",
    "model_true_mean": "by the model's true means", "model_representative": "by the model at representative lengths",
}  # fmt: skip


def label(name: str) -> str:
    """What a person calls a key, a metric or a case."""
    if name in _NAMES:
        return _NAMES[name]
    base, _, reading = name.partition(".")
    if base in _NAMES and reading in _READINGS:
        return f"{_NAMES[base]} {_READINGS[reading]}"
    return name.removeprefix("options.").rpartition(".")[2].replace("_", " ") if "." in name else name.replace("_", " ")


def value_label(key: str, value: object) -> str:
    """A value of a key as a tick or a legend says it: with its unit where the key names one."""
    if isinstance(value, float):
        last = key.rpartition(".")[2]
        if last.endswith("_bps"):
            return _scaled(value, ((1e12, "Tbps"), (1e9, "Gbps"), (1e6, "Mbps"), (1e3, "kbps")), "bit/s")
        if last.endswith("_s"):
            return _scaled(value, ((1, "s"), (1e-3, "ms"), (1e-6, "µs")), "s")
        if last.endswith("_tokens"):
            return f"{value / 1000:.4g}K" if value >= 1000 else f"{value:g}"
        return f"{value:g}"
    return label(str(value))


def _scaled(value: float, scales: tuple[tuple[float, str], ...], unit: str) -> str:
    for factor, name in scales:
        if abs(value) >= factor:
            return f"{value / factor:.4g} {name}"
    return f"{value:g} {unit}"
