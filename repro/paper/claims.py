"""What the paper says, where, how this kit tests it, and how near is near enough.

A tolerance is set by what the paper prints (its rounding, its "about"), before anything is run: 2 % for throughputs that rest on two or
three digits of input, the word "about" as 10 %, an order of magnitude as a factor. A claim whose value went into a calibration is not
confirmed by agreeing with itself; its verdict says `input`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from repro.paper import tables, text
from repro.paper.quantity import Quantity

Verdict = Literal["reproduced", "deviates", "input", "other configuration", "not run"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Tolerance:
    """How far a value may lie from the paper's: a share of it, an amount, or on one side of it."""

    relative: float = 0.0
    absolute: float = 0.0
    side: Literal["either", "below", "above"] = "either"

    def holds(self, value: float, paper: float) -> bool:
        """Whether `value` agrees with `paper`."""
        if not math.isfinite(value):
            return False
        if self.side == "below":
            return value < paper
        if self.side == "above":
            return value > paper
        return abs(value - paper) <= max(self.absolute, self.relative * abs(paper)) + 1e-12

    def describe(self) -> str:
        """In words, for the report."""
        if self.side != "either":
            return self.side
        if self.relative:
            return f"±{100 * self.relative:g} %"
        return f"±{self.absolute:g}" if self.absolute else "exact"


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper as one row of metrics.csv: `experiment`, `tier`, `case` and `metric` say which."""

    name: str
    statement: str
    where: str
    experiment: str
    tier: str
    case: str
    metric: str
    paper: float
    unit: str
    tolerance: Tolerance

    def verdict(self, value: float, source: str) -> Verdict:
        """What our value says of the claim."""
        if source in ("calibrated", "published"):
            return "input"
        return "reproduced" if self.tolerance.holds(value, self.paper) else "deviates"


_CASE_NAMES = {
    "prfaas_pd": "PrfaaS-PD",
    "homogeneous_pd": "homogeneous PD",
    "naive_heterogeneous_pd": "naive heterogeneous PD",
}
_TABLE_6 = {
    "lambda_max": ("sustains {value:g} req/s", Tolerance(relative=0.02)),
    "ratio": ("sustains {value:g} times the baseline", Tolerance(absolute=0.03)),
    "threshold_tokens": ("is best at a threshold of {value:g} tokens", Tolerance(absolute=500)),
    "n_p": ("is best with {value:g} PD-P instances", Tolerance()),
    "n_d": ("is best with {value:g} PD-D instances", Tolerance()),
    "theta_prfaas": ("prefills {value:g} req/s on PrfaaS", Tolerance(relative=0.02)),
    "theta_pd_p": ("prefills {value:g} req/s on PD-P", Tolerance(relative=0.02)),
    "theta_pd_d": ("decodes {value:g} req/s", Tolerance(relative=0.02)),
    "ttft_mean_s": ("has a mean TTFT of {value:g} s", Tolerance(relative=0.05)),
    "ttft_p90_s": ("has a P90 TTFT of {value:g} s", Tolerance(relative=0.05)),
}


def _table_6() -> list[Claim]:
    found = []
    for case in tables.CASES:
        for metric, (words, tolerance) in _TABLE_6.items():
            quantity = tables.TABLE_6[case].get(metric)
            if (
                quantity is None
                or (case == "homogeneous_pd" and metric == "ratio")
                or (case == "naive_heterogeneous_pd" and metric == "n_d")
            ):
                continue
            found.append(
                Claim(
                    f"{case}/{metric}", f"{_CASE_NAMES[case]} {words.format(value=quantity.value)}.", quantity.where,
                    "table6", "model", case, metric, quantity.value, quantity.unit, tolerance,
                )
            )  # fmt: skip
    return found


def _in_text(
    name: str,
    statement: str,
    quantity: Quantity,
    experiment: str,
    case: str,
    metric: str,
    tolerance: Tolerance,
    scale: float = 1,
    unit: str = "",
) -> Claim:
    return Claim(
        name,
        statement,
        quantity.where,
        experiment,
        "model",
        case,
        metric,
        quantity.value * scale,
        unit or quantity.unit,
        tolerance,
    )


def _table_5() -> list[Claim]:
    found = []
    for label, row in tables.TABLE_5.items():
        found.append(
            Claim(
                f"table5/kv_bytes/{label}", f"A request of {label} tokens leaves {row.kv_size.value:g} MiB of KVCache.", "Table 5",
                "table5", "model", label, "kv_bytes", row.kv_size.value * 2**20, "bytes", Tolerance(relative=0.001),
            )
        )  # fmt: skip
        found.append(
            Claim(
                f"table5/phi_kv/{label}", f"Φ_kv at {label} tokens is {row.kv_throughput.value:g} Gbps.", "Table 5",
                "table5", "model", label, "phi_kv_bps", row.kv_throughput.value * 1e9, "bit/s", Tolerance(relative=0.02),
            )
        )  # fmt: skip
    return found


def _executed() -> list[Claim]:
    """What the paper's mechanism presupposes, on real tensors: nothing is lost on the way, and every byte is accounted for."""
    found = []
    for model, title in (("kimi_linear", "a hybrid model"), ("qwen3_235b", "a dense model")):
        for metric, words in (
            (
                "tokens_match",
                "Prefill and decode of {title}, split across the link, give the tokens of the model's own generate.",
            ),
            ("kv_bytes_match", "The state that {title} ships is S_kv(l), to the byte."),
        ):
            found.append(
                Claim(
                    f"split/{metric}/{model}", words.format(title=title), "§3.3", "split", "execute", f"{model}/layerwise", metric, 1.0, "",
                    Tolerance(),
                )
            )  # fmt: skip
    return found


ABOUT = Tolerance(relative=0.1)

CLAIMS: tuple[Claim, ...] = (
    *_table_6(),
    _in_text("offload", "49.6 % of requests are offloaded.", text.OFFLOAD_FRACTION, "table6", "prfaas_pd", "offload_fraction", Tolerance(absolute=0.01)),
    _in_text("l_long", "Offloaded requests are about 44K tokens long.", text.L_LONG, "table6", "prfaas_pd", "l_long_tokens", ABOUT),
    _in_text("egress", "PrfaaS sends about 13 Gbps.", text.EGRESS, "table6", "prfaas_pd", "egress_bps", ABOUT, 1e9, "bit/s"),
    _in_text("utilisation", "That is 13 % of the link.", text.LINK_UTILISATION, "table6", "prfaas_pd", "link_utilisation", ABOUT),
    _in_text("ttft_mean", "Mean TTFT is 50 % below homogeneous PD.", text.TTFT_MEAN_REDUCTION, "table6", "prfaas_pd", "ttft_mean_reduction", Tolerance(absolute=2)),
    _in_text("ttft_p90", "P90 TTFT is 64 % below homogeneous PD.", text.TTFT_P90_REDUCTION, "table6", "prfaas_pd", "ttft_p90_reduction", Tolerance(absolute=2)),
    _in_text("equal_cost", "At equal cost the gain is about 15 %.", text.EQUAL_COST_GAIN, "cost", "price ratio 2", "equal_cost_gain", Tolerance(absolute=0.02), 0.01, "share"),
    *_table_5(),
    _in_text("mimo", "At 32K MiMo-V2-Flash's Φ_kv is 13× below MiniMax-M2.5's.", text.MIMO_BELOW_MINIMAX_32K, "table3", "minimax_m2_5 / mimo_v2_flash at 32K", "phi_kv_ratio", Tolerance(absolute=0.5)),
    _in_text("qwen", "At 32K Qwen3.5-397B's Φ_kv is 4× below Qwen3-235B's.", text.QWEN35_BELOW_QWEN3_32K, "table3", "qwen3_235b / qwen3_5_397b at 32K", "phi_kv_ratio", Tolerance(absolute=0.5)),
    _in_text("ring", "Ring-2.5-1T saves about 36× of KV memory.", text.RING_MEMORY_SAVING, "table3", "Ring-2.5-1T, per token", "kv_bytes_ratio", Tolerance(absolute=1)),
    _in_text("ring_mla", "4.5× of that is MLA over GQA.", text.RING_SAVING_BY_MLA, "table3", "Ring-2.5-1T", "mla_saving", Tolerance(absolute=0.1)),
    _in_text("ring_ratio", "8× of that is the 7:1 ratio.", text.RING_SAVING_BY_RATIO, "table3", "Ring-2.5-1T", "layer_saving", Tolerance()),
    _in_text("fleet_minimax", "512 GPUs of MiniMax-M2.5 emit 3.8 Tbps at 32K.", text.EGRESS_MINIMAX_32K, "egress", "minimax_m2_5 32K, 512 GPUs", "egress_bps", Tolerance(relative=0.02), 1e12, "bit/s"),
    _in_text("fleet_qwen", "512 GPUs of Qwen3-235B emit 2.1 Tbps at 32K.", text.EGRESS_QWEN3_32K, "egress", "qwen3_235b 32K, 512 GPUs", "egress_bps", Tolerance(relative=0.02), 1e12, "bit/s"),
    _in_text("fleet_ring", "512 GPUs of Ring-2.5-1T emit about 170 Gbps at 32K.", text.EGRESS_RING_32K, "egress", "ring_2_5_1t 32K, 512 GPUs", "egress_bps", ABOUT, 1e9, "bit/s"),
    _in_text("fleet_ring_128k", "They emit under 100 Gbps at 128K.", text.EGRESS_RING_128K_BELOW, "egress", "ring_2_5_1t 128K, 512 GPUs", "egress_bps", Tolerance(side="below"), 1e9, "bit/s"),
    _in_text("datacenter", "A 10,000-GPU datacenter emits about 1.8 Tbps.", text.DATACENTER_EGRESS, "egress", "ring_2_5_1t 128K, 10,000 GPUs", "egress_bps", ABOUT, 1e12, "bit/s"),
    Claim("idc", "Thousands of PrfaaS GPUs need on the order of 1 Tbps.", "§4.3.1", "egress", "model", "case study", "gpus_per_tbps", 3000, "GPUs", Tolerance(absolute=2000)),
    _in_text("figure5a", "Λ_max over the split peaks at N_p = 3.", tables.TABLE_6["prfaas_pd"]["n_p"], "figure5", "figure5a", "n_p", Tolerance()),
    _in_text("figure5b", "The PD-P and PrfaaS bounds cross at t = 19.4K.", tables.TABLE_6["prfaas_pd"]["threshold_tokens"], "figure5", "figure5b", "crossing_tokens", Tolerance(absolute=500)),
    *_executed(),
)  # fmt: skip
