"""Every experiment and benchmark at the smallest size that still has a result: what the tests of the configuration run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import fake_engine

from repro.experiments import base
from repro.presets import runs, typed

_STUDY = ["options.seeds=2", "options.duration_s=60", "options.warmup_s=10"]
_BRIEFLY = [
    "options.only=[tcp]", "options.connections=[1]", "options.seconds=0.2", "options.warm_s=0.1", "options.repeats=1",
    "options.piece_bytes=1048576",
]  # fmt: skip
_LIVE = [
    "options.duration_s=30",
    "options.warmup_s=2",
    "cluster.pd.instances=3",
    "cluster.prfaas.instances=1",
    "link.backend=relay",
    "options.load=0.5",
]
_UNTRAINED = ["options.training.steps=1", "options.training.batch=1", "options.training.window_tokens=32"]
#: (experiment, tier) → what makes it small.
SMALL: Mapping[tuple[str, str], list[str]] = {
    ("case_study", "model"): ["options.parts=[table5]"],
    ("case_study", "simulate"): ["options.parts=[table5]"],
    ("case_study", "emulate"): ["options.parts=[table5]"],
    ("table6", "model"): ["options.draws=0"],
    ("distance", "model"): [
        "options.rates_bps=[1e10]", "options.rtts_s=[0.0,0.05]", "options.losses=[0.0,0.001]", "options.connections=[1]",
    ],
    ("many_clusters", "model"): ["options.tenants=[2]", "options.spreads_h=[12]"],
    ("edge_decode", "model"): ["options.tokens=[2048]", "options.compared_tokens=2048", "options.links=[home_fibre]"],
    ("edge_decode", "execute"): [
        "model=bytes", "options.measured.bits=[4]", "options.measured.prompts=1", "options.measured.prompt_tokens=32",
        "options.measured.following_tokens=4", "options.measured.throttle=[3]",
        *(word.replace("options.", "options.measured.") for word in _UNTRAINED),
    ],
    ("tenants", "simulate"): [
        "options.tenants=2", "options.duration_s=60", "options.at_s=20", "options.for_s=20", "options.seeds=2",
    ],
    ("batch_efficiency", "execute"): [
        "model=qwen3_235b", "options.prompt_tokens=32", "options.batches=[1,2]", "options.chunks_tokens=[16]", "options.repeats=2",
        "options.requests=100", "policy.threshold_step_tokens=2000",
    ],
    ("kv_diet", "execute"): [
        "options.prompts=1", "options.prompt_tokens=48", "options.following_tokens=4", *_UNTRAINED, "options.repeats=1",
    ],
    ("privacy", "execute"): [
        "options.prompts=1", "options.tokens=3", *_UNTRAINED, "options.tls_bytes=2000000",
    ],
    ("decoupling", "execute"): [
        "model=qwen3_235b", "options.input_tokens=40", "options.chunk_tokens=16", "options.repeats=2", "options.output_tokens=2",
        "options.links=[loopback]",
    ],
    ("peak_hours", "simulate"): ["options.day_s=120"],
    ("long_contexts", "model"): ["options.medians_tokens=[2e4]", "options.outputs_tokens=[512,8192]"],
    ("cost_map", "model"): ["policy.threshold_step_tokens=2000"],
    ("sensitivity", "model"): ["options.draws=12"],
    ("models", "model"): ["model=[kimi_linear,qwen3_235b]"],
    ("silicon", "model"): ["model=[minimax_m2_5,qwen3_235b]"],
    ("public_hardware", "model"): [
        "options.models=[qwen3_5_397b]", "options.prefill=[b200]", "options.decode=[h100]", "policy.threshold_step_tokens=2000",
    ],
    ("table6", "simulate"): ["options.requests=1000", "options.seeds=2"],
    ("table6", "emulate"): [
        "options.emulate.requests=100", "options.emulate.search_requests=100", "options.emulate.search_width=0.2",
        "options.emulate.time_scale=100", "options.emulate.cases=[prfaas_pd]", "cluster.pd.instances=2", "cluster.prfaas.instances=1",
    ],
    ("ablation", "simulate"): _STUDY,
    ("agentic", "simulate"): [*_STUDY, "options.static_thresholds=[2000,12000]"],
    ("bandwidth_drop", "simulate"): [
        *_STUDY, "options.at_s=30", "options.for_s=20", "options.recovery_s=10", "options.loads=[0.7]", "options.dropped_bps=[4e9]",
    ],
    ("burst", "simulate"): _STUDY,
    ("colocation", "simulate"): [*_STUDY, "options.loads=[0.5]", "options.chunks_tokens=[1024]"],
    ("link_flap", "simulate"): [*_STUDY, "options.every_s=25"],
    ("output_length", "simulate"): [*_STUDY, "options.means=[256]"],
    ("scale", "simulate"): ["options.factors=[1,2]", "options.minimum_requests=300"],
    ("scenarios", "simulate"): [
        "options.seeds=2", "options.hours=3", "options.hour_s=150", "options.warmup_s=10", "options.scenarios=[longer_outputs]",
    ],
    ("shift", "simulate"): ["options.seeds=2", "options.duration_s=70", "options.at_s=30"],
    ("simulation", "simulate"): _STUDY,
    ("trace", "simulate"): ["options.trace=TRACE"],
    ("split", "execute"): [
        "model=[kimi_linear,qwen3_235b]", "options.input_tokens=[40]", "options.chunk_tokens=16", "options.repeats=2",
        "options.output_tokens=3",
    ],
    ("overlap", "execute"): [
        "model=kimi_linear", "options.input_tokens=[70]", "options.chunk_tokens=32", "options.repeats=2", "options.link_to_phi=[2.0]",
    ],
    ("tiers", "execute"): [
        "model=qwen3_235b",
        "options.requests=20", "options.compared=4", "workload.lengths.mu=3.3", "workload.lengths.minimum_tokens=16",
        "workload.lengths.maximum_tokens=64", "workload.output_tokens=3",
    ],
    ("codecs", "execute"): ["options.prompts=1", "options.prompt_tokens=48", "options.following_tokens=4"],
    ("profile", "execute"): [
        "model=qwen3_235b",
        "options.first_tokens=16", "options.last_tokens=64", "options.repeats=3", "options.batches=[1]", "options.contexts=[16]",
        "options.decode_steps=2",
    ],
    ("live_table6", "execute"): [
        "model=qwen3_235b", "options.prfaas_slowdown=1.5", "options.pd_slowdown=2", "options.cases=[prfaas_pd,homogeneous_pd]",
        "options.requests=20", "options.search_requests=20", "options.search_width=1", "options.compared=4", "options.repeats=3",
        "cluster.pd.instances=2", "cluster.homogeneous_instances=2",
        "workload.lengths.mu=3.3", "workload.lengths.minimum_tokens=16", "workload.lengths.maximum_tokens=64", "workload.output_tokens=3",
    ],
    ("live_wall", "execute"): [
        "options.rates_bps=[2e7]", "options.prfaas_slowdown=1", "options.pd_slowdown=1.5", "options.search_requests=20",
        "options.search_width=1", "options.compared=2", "options.repeats=3", "cluster.pd.instances=2",
        "workload.lengths.mu=3.3", "workload.lengths.minimum_tokens=16", "workload.lengths.maximum_tokens=64", "workload.output_tokens=3",
    ],
    ("live_stress", "execute"): [
        "model=qwen3_235b", "profile=paper_1t_h200", "options.requests=20", "options.rate_per_s=4", "options.every_s=2.5",
        "options.for_s=1", "options.kinds=[slow]",
        "link.schedule=[{at_s: 1, for_s: 1, rate_bps: 0}]", "cluster.pd.instances=2", "cluster.prfaas.instances=1",
        "workload.lengths.mu=3.3", "workload.lengths.minimum_tokens=16", "workload.lengths.maximum_tokens=64", "workload.output_tokens=3",
        "policy.threshold_tokens=null",
    ],
    ("engines", "execute"): [
        "options.environment=ENGINES", "link.backend=none", "options.checkpoints=[dense]", "options.input_tokens=[40]",
        "options.output_tokens=3", "options.repeats=2", "options.modes=[layerwise]",
    ],
    ("live_engines", "execute"): [
        "options.environment=ENGINES", "link.backend=none", "link.rate_bps=null", "link.rtt_s=0", "options.checkpoints=[dense]",
        "options.requests=4", "options.rate_per_s=8", "options.input_tokens=[40,400]", "options.output_tokens=3", "options.killed=null",
    ],
    ("table2", "execute"): ["options.lengths=[16,32]"],
    ("live_faults", "emulate"): [
        *_LIVE, "options.every_s=15", "options.for_s=15", "options.kinds=[kill]", "link.schedule=[{at_s: 5, for_s: 4, rate_bps: 0}]",
    ],
    ("live_bandwidth_drop", "emulate"): [
        *_LIVE, "link.schedule=[{at_s: 5, for_s: 10, rate_bps: 2e9}]", "options.cases=[two_timescale]",
    ],
    ("live_burst", "emulate"): [*_LIVE, "options.cases=[two_timescale]"],
    ("live_reuse", "execute"): [
        "model=qwen3_235b", "profile=paper_1t_h200", "options.duration_s=12", "options.compared=6", "cluster.prfaas.instances=1",
        "cluster.pd.instances=2", "policy.n_p=1", "policy.threshold_tokens=null",
    ],
    ("live_sessions", "emulate"): [
        *(word for word in _LIVE if not word.startswith("options.load")), "policy.n_p=1", "policy.threshold_tokens=null",
        "workload.sessions.mean_gap_s=5", "workload.sessions.primed=true", "options.cases=[best_cache,policy]",
    ],
    ("bandwidth_wall", "emulate"): [
        "options.rates_bps=[5e9]", "options.live_rates_bps=[5e9]", "options.requests=1000", "options.search_requests=100",
        "options.search_width=0.5", "options.time_scale=100", "cluster.pd.instances=2", "cluster.prfaas.instances=1", "link.backend=relay",
        "policy.threshold_step_tokens=2000",
    ],
    ("link_law", "emulate"): [
        "options.fitted=[{rtt_s: 0.01, loss: 0.02, congestion_control: cubic, connections: 4}]",
        "options.held_out=[{rtt_s: 0.01, loss: 0.03, congestion_control: cubic, connections: 4}]",
        "options.limit_s=2", "options.opening_rtts_s=[0.02]", "options.opening_bytes=[100000]", "options.opening_repeats=1",
    ],
    ("validate", "emulate"): [
        "options.deployments=1", "options.requests=100", "options.time_scale=100", "options.prfaas_instances=[1,1]",
        "options.pd_instances=[2,2]", "options.loads=[0.5,0.5]", "link.backend=relay",
    ],
    ("link_fidelity", "emulate"): [
        "options.backends=[relay]", "options.rates_bps=[1e8]", "options.rtts_s=[0.02]", "options.losses=[0.0]", "options.connections=[1]",
        "options.congestion_controls=[cubic]", "options.rate_s=0.3", "options.iperf3_s=1.0",
    ],
    ("bench_capture", "execute"): ["model=qwen3_235b", "options.tokens=64", "options.pairs=2"],
    ("bench_codecs", "execute"): ["options.tokens=64", "options.repeats=1"],
    ("bench_link", "emulate"): ["options.backends=[relay]", "options.rates_bps=[1e8]", "options.seconds=0.3", "options.cycles=2"],
    ("bench_router", "emulate"): ["options.requests=1000", "options.open_loop_s=0.5", "options.repeats=1"],
    ("bench_search", "model"): ["options.repeats=10"],
    ("bench_simulate", "simulate"): ["options.requests=[2000]", "options.compiled=false"],
    ("bench_soak", "execute"): ["options.transfers=60", "options.largest_bytes=1000000"],
    ("bench_transport", "execute"): _BRIEFLY,
    ("bench_transport", "emulate"): [*_BRIEFLY, "link.rate_bps=1e9", "link.backend=relay"],
}  # fmt: skip


def every() -> list[tuple[str, str]]:
    """All experiments and benchmarks on all tiers that they offer."""
    return [(name, tier) for name in runs() for tier in base.load(name).tiers]


def words(name: str, tier: str, folder: Path) -> list[str]:
    """The words of the command line for a small run below `folder`."""
    trace = folder / "trace.jsonl"
    if not trace.exists():
        lines = [
            f'{{"timestamp": {1500 * i}, "input_length": {3000 + 700 * (i % 5)}, "output_length": 40, "hash_ids": [1, 2, {i // 3}]}}\n'
            for i in range(60)
        ]
        trace.write_text("".join(lines))
    small = [word.replace("TRACE", str(trace)) for word in SMALL.get((name, tier), [])]
    if "ENGINES" in "".join(small):
        small = [word.replace("ENGINES", str(fake_engine.environment(folder / "engines"))) for word in small]
    return [
        typed(name), f"tier={tier}", *small, "tracking=disabled", "processes=1", f"results={folder / 'results'}",
    ]  # fmt: skip
