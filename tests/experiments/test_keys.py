"""No key is ignored: what is set is read and has an effect, or is refused by name before anything is written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from small import every, words

from repro import app, runner
from repro.composition import compose
from repro.configuration import build, plain
from repro.errors import UserError
from repro.experiments import base, study
from repro.experiments.base import Context
from repro.presets import CONF, typed
from repro.settings import Settings

CLOCKLESS = [
    (name, tier)
    for name, tier in every()
    if tier in ("model", "simulate") and not base.load(name).parts and not base.load(name).timed
]

#: Key or node → why a change of it shows in no number here, though it is read.
SILENT = {
    "policy.short_term": "shown on ablation, whose link drops and fails under bursts",
    "policy.long_term": "shown on ablation",
    "policy.adaptive": "shown in tests of adapting, whose outputs grow",
    "policy.fallback_s": "shown on ablation, whose link fails",
    "policy.admission": "shown on ablation, which is overloaded",
    "policy.router": "a static threshold and both rules agree where nothing is cached and no loop moves t",
    "policy.offload_share": "refused but for router=random_split",
    "policy.cache": "shown on agentic and trace, whose prompts share prefixes",
    "policy.rebalance": "shown in tests of rebalancing; a short run copies nothing",
    "workload.trace": "needs a file; shown in tests of traces",
    "workload.mixture": "shown on table6",
    "workload.sessions": "shown in tests of workloads",
    "workload.arrivals": "shown in tests of workloads",
    "workload.slo.ttft_s": "met or missed by the same few requests of a short run; shown on table6",
    "workload.slo.tokens_per_s": "shown on table6",
    "link": "an idle link of the paper's rate is far from binding in a short run; shown on table6",
    "cluster.prfaas.profile": "another name of the same curves changes nothing; shown on table6",
    "cluster.pd.profile": "shown on table6",
    "profile": "shown on table6",
    "options.trace": "a path",
    "options.format": "recognised by itself", "options.time_unit": "shown in tests of traces", "options.columns": "of CSV only",
    "options.requests": "shown in tests of traces", "options.duration_s": "shown in tests of traces",
    "model": "a list of models; shown below",
    "options.mu_change": "shown in tests of scenarios", "options.lost_instances": "shown in tests of scenarios",
    "options.link_factor": "shown in tests of scenarios", "options.link_headroom": "shown in tests of scenarios",
    "options.crowd_factor": "shown in tests of scenarios", "options.hit_rate": "shown in tests of scenarios",
    "options.at_s": "moved within the window of a short run", "options.mu_shift": "",
}  # fmt: skip
#: The same for one experiment.
SILENT_HERE = {
    ("table6", "model"): {"seed": "of options.draws, of which a small run has none"},
    ("agentic", "simulate"): {
        "options.sessions.maximum_tokens": "no session of a short run grows so long",
        "options.shared_context.maximum_tokens": "the same",
    },
}
#: Keys whose effect must show on these, whatever `SILENT` says: the richest deployment of each tier.
LOUD = {
    ("table6", "model"): ("workload.mixture", "cluster.prfaas.profile", "cluster.pd.profile", "profile", "link"),
    ("table6", "simulate"): (
        "workload.slo",
        "link.rtt_s",
        "link.rate_bps",
        "link.schedule",
        "link.loss",
        "link.congestion_control",
    ),
    ("burst", "simulate"): ("link.loss",),
    ("scale", "simulate"): ("link.loss",),
    ("trace", "simulate"): ("link.loss",),
}
#: Values to change a key to, where scaling a number or flipping a switch would be refused or mean nothing.
OTHER: dict[str, Any] = {
    "profile": "paper_1t_h200", "cluster.prfaas.profile": "paper_1t_h20", "cluster.pd.profile": "paper_1t_h200",
    "link.rate_bps": 4e9, "link.schedule": [{"at_s": 30.0, "rate_bps": 1e9}], "link.rtt_s": 0.5,
    "link.loss": 0.01, "link.congestion_control": "cubic",
    "policy.n_p": 2, "policy.threshold_tokens": 9000.0, "policy.threshold_step_tokens": 3000, "workload.mixture": [
        {"share": 0.5, "mu": 7.0, "sigma": 0.5, "minimum_tokens": 128.0, "maximum_tokens": 9000.0}
    ],
    "workload.lengths.maximum_tokens": 60_000.0, "workload.lengths.minimum_tokens": 6000.0, "workload.lengths.mu": 9.2,
    "workload.lengths.sigma": 0.6, "workload.slo.tokens_per_s": 80.0, "workload.slo.ttft_s": 0.5, "cluster.homogeneous_instances": 9,
    "cluster.prfaas.instances": 3, "cluster.pd.instances": 6,
    "cluster.decode.memory_bytes": 5e9, "options.loads": [0.4], "options.means": [600],
    "options.factors": [3], "options.dropped_bps": [1e9], "options.n_p": 4, "options.cv": 0.3, "options.load": 0.5,
    "options.burst_load": 2.5,
}  # fmt: skip


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}" if key else name)
    else:
        yield key, value


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {**values, first: changed(values[first], rest, value) if rest else value}


def other(key: str, value: Any) -> Any:
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.7
    return None


def outcome(values: dict[str, Any], folder: Path) -> str:
    """A digest of everything that a run yields."""
    settings = build(Settings, values)
    experiment = base.load(settings.name)
    options: Any = build(experiment.options, settings.options, "options")
    settings = replace(settings, options=plain(options))
    experiment.check(settings, options)
    (folder / "run").mkdir(parents=True, exist_ok=True)
    found = experiment.run(Context(settings, options, folder / "run", lambda line: None))
    digest = hashlib.sha256(repr(sorted(map(repr, found.metrics))).encode())
    for name in sorted(found.tables):
        digest.update(found.tables[name].to_csv().encode())
    return digest.hexdigest()


class EffectError(Exception):
    """A point of a study came out otherwise, so the key that was changed has an effect; the other points need not run."""


class Noticing:
    """Stands in for the study runner's call of a point: learns how each comes out in two runs, and then ends at the first other result.

    A point that the first runs did not have says nothing yet: its name may have changed and nothing else. Nor does one that did not
    repeat itself, as where a duration of this machine is beside its values.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._named = study._named
        self._usual: dict[str, set[str]] = {}
        self.learning = True
        monkeypatch.setattr(study, "_named", self)

    def __call__(self, work: Any, name: str, point: Any) -> Any:
        result = self._named(work, name, point)
        digest = hashlib.sha256(shown(result).encode()).hexdigest()
        if self.learning:
            self._usual.setdefault(name, set()).add(digest)
        elif self._usual.get(name) and len(self._usual[name]) == 1 and digest not in self._usual[name]:
            raise EffectError(name)
        return result


def shown(result: Any) -> str:
    """A result's values as text, the same for equal values."""
    if isinstance(result, pd.DataFrame):
        return str(result.to_csv())
    if is_dataclass(result):
        return repr([(item.name, shown(getattr(result, item.name))) for item in fields(result)])
    if isinstance(result, Mapping):
        return repr([(key, shown(value)) for key, value in result.items()])
    if isinstance(result, (list, tuple)):
        return repr([shown(value) for value in result])
    return repr(result)


def silenced(name: str, tier: str, key: str) -> bool:
    def below(node: str) -> bool:
        return key == node or key.startswith(f"{node}.")

    if any(map(below, SILENT_HERE.get((name, tier), ()))):
        return True
    return any(map(below, SILENT)) and not any(map(below, LOUD.get((name, tier), ())))


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize(("name", "tier"), CLOCKLESS, ids=str)
def test_every_accepted_key_changes_some_result(
    name: str, tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = base.load(name)
    prepared = runner.prepare(compose(words(name, tier, tmp_path)))
    values = plain(prepared.settings)
    changes = {}
    for key, value in leaves(prepared.configuration):
        last = key.rpartition(".")[2]
        if key.split(".")[0] in base._ALWAYS or last in base.DESCRIPTIONS or silenced(name, tier, key):
            continue
        new = other(key, value)
        if new is not None and new != value and experiment.reads_key(key, tier):
            changes[key] = new
    if not changes:
        return  # of models alone, which the next test changes
    noticing = Noticing(monkeypatch)
    usual = outcome(values, tmp_path)
    # In another folder, for a study finds finished points again beside its own.
    assert outcome(values, tmp_path / "again") == usual, "a run repeats itself"
    noticing.learning = False
    mute = []
    for key, new in changes.items():
        try:
            if outcome(changed(values, key, new), tmp_path) == usual:
                mute.append(key)
        except (UserError, EffectError):
            continue  # refused, which is not ignored, or seen before the run was at its end
    assert not mute, "accepted, and without any effect"


def test_measured_decode_steps_change_what_a_profile_that_has_them_gives(tmp_path: Path) -> None:
    small = [
        "options.duration_s=60",
        "options.warmup_s=10",
        "options.seeds=2",
        "processes=1",
        f"results={tmp_path}",
        "tracking=disabled",
    ]
    silicon = [
        "cluster.prfaas.profile=silicon:qwen3_5_397b@b200",
        "cluster.pd.profile=silicon:qwen3_5_397b@h200",
        "options.load=0.2",
    ]
    found = set()
    for steps in ("fitted", "rows"):
        composed = compose(["experiment=simulation", *silicon, *small, f"cluster.decode.steps={steps}"])
        found.add(outcome(plain(runner.prepare(composed).settings), tmp_path / steps))
    assert len(found) == 2


@pytest.mark.parametrize(
    ("name", "tier"), [one for one in CLOCKLESS if base.load(one[0]).reads_key("model", one[1])], ids=str
)
def test_another_model_changes_the_result_or_is_refused_by_name(name: str, tier: str, tmp_path: Path) -> None:
    found = set()
    for model in ("kimi_linear", "qwen3_235b"):
        small = [word for word in words(name, tier, tmp_path) if not word.startswith("model=")]
        try:
            found.add(outcome(plain(runner.prepare(compose([*small, f"model={model}"])).settings), tmp_path))
        except UserError as error:
            found.add(str(error))
    assert len(found) == 2
    assert not [said for said in found if " " in said and not said.startswith("model")]


#: Parts of scheduler and TCP, where they come to act: bursts on a link that drops and fails, outputs twice as long, a lossy link.
ACTING = {
    ("experiment=ablation", "options.duration_s=900"): (
        "policy.short_term.period_s=3", "policy.short_term.search_s=17", "policy.short_term.utilisation_high=0.99",
        "policy.short_term.queue_high_s=9", "policy.short_term.queue_low_s=0.01", "policy.short_term.horizon_s=4",
        "policy.short_term.patience_s=3", "policy.short_term.gain=0.4", "policy.short_term.window_requests=32", "policy.fallback_s=2",
        "policy.placement=round_robin",
    ),
    ("experiment=output_length", "options.means=[2048]", "options.duration_s=900"): (
        "policy.long_term.period_s=90", "policy.long_term.margin=0.6", "policy.long_term.busy=3", "policy.long_term.restart_s=90",
        "policy.long_term.memory_s=15", "policy.admission.ttft_limit_s=3",
    ),
    ("experiment=simulation", "link.loss=0.001", "options.duration_s=60", "options.warmup_s=10"): (
        "transport.connections=16", "link.congestion_control=bbr", "link.loss_burst_segments=4", "link.rtt_s=0.02",
    ),
    (
        "experiment=simulation", "options.duration_s=120", "options.warmup_s=10", "cluster.failures.mtbf_s=60",
        "cluster.failures.repair_s=20", "cluster.failures.crews=2",
    ): (
        "cluster.failures.mtbf_s=90", "cluster.failures.repair_s=10", "cluster.failures.crews=1", "cluster.failures.cold_start_s=9",
        "cluster.failures.schedule=[{pool: prfaas, instance: 0, at_s: 40, for_s: 30}]",
        "cluster.failures.schedule=[{pool: pd, instance: 7, at_s: 40, for_s: 30}]",
    ),
    (
        "experiment=simulation", "options.duration_s=60", "options.warmup_s=10",
        "cluster.also_prfaas=[{instances: 1, rate_bps: 1e10, rtt_s: 0.01}]",
    ): (
        "cluster.also_prfaas=[]", "cluster.also_prfaas=[{instances: 2, rate_bps: 1e10, rtt_s: 0.01}]",
        "cluster.also_prfaas=[{instances: 1, rate_bps: 2e9, rtt_s: 0.01}]",
        "cluster.also_prfaas=[{instances: 1, rate_bps: 1e10, rtt_s: 2}]",
        "cluster.also_prfaas=[{instances: 1, rate_bps: 1e10, rtt_s: 0.01, profile: paper_1t_h20}]",
    ),
    (
        "experiment=simulation", "workload=agentic", "policy.cache.enabled=true", "policy.cache.capacity_gb=5", "options.duration_s=200",
        "options.warmup_s=10", "policy.cache.lower=[{name: dram, capacity_gb: 60, load_bps: 1e10}]",
    ): (
        "policy.cache.lower=[]", "policy.cache.lower=[{name: dram, capacity_gb: 60, load_bps: 2e9}]",
        "policy.cache.lower=[{name: dram, capacity_gb: 1, load_bps: 1e10}]",
        "policy.cache.lower=[{name: dram, capacity_gb: 60, load_bps: 1e10, latency_s: 1}]",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("acting", ACTING, ids=lambda words: words[0])
def test_every_part_of_the_scheduler_that_can_be_set_has_an_effect(
    acting: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [*acting, "processes=1", "options.seeds=2", "tracking=disabled", f"results={tmp_path}"]

    def digest(*extra: str) -> str:
        try:
            return outcome(plain(runner.prepare(compose([*small, *extra])).settings), tmp_path)
        except EffectError as seen:
            return str(seen)

    noticing = Noticing(monkeypatch)
    usual = digest()
    noticing.learning = False
    assert not [word for word in ACTING[acting] if digest(word) == usual]


#: Keys that were ignored without a word, each with a run that looked like a result, and what the refusal must name.
REFUSED = [
    (["experiment=split", "pretrained=/nowhere/at/all", "model=mimo_v2_flash"], "pretrained: /nowhere/at/all does not exist"),
    (["experiment=split", "workload.output_tokens=9"], "workload.output_tokens: not read by experiment=split"),
    (["experiment=overlap", "link.rate_bps=1e9"], "link.rate_bps: not read by experiment=overlap"),
    (["experiment=figure2", "link.rtt_s=0.1"], "link.rtt_s: not read by experiment=figure2"),
    (["experiment=table3", "workload=diurnal"], "workload: not read by experiment=table3"),
    (["experiment=table5", "seed=3"], "seed: not read by experiment=table5"),
    (["experiment=figure5", "policy.n_p=4"], "policy.n_p: not read by experiment=figure5"),
    (["experiment=figure5", "cluster.homogeneous_instances=9"], "cluster.homogeneous_instances: not read by"),
    (["experiment=table6", "link.loss=0.05"], "link.loss: not read by experiment=table6 on tier=model"),
    (["experiment=table6", "tier=simulate", "link.jitter_s=0.05"], "link.jitter_s: not read by experiment=table6 on tier=simulate"),
    (["experiment=table6", "tier=simulate", "transport.tls=x"], "transport.tls: not read by experiment=table6 on tier=simulate"),
    (["experiment=burst", "link.loss_burst_segments=4"], "link.loss_burst_segments: has no effect without loss; accepted: with"),
    (["experiment=burst", "link.loss=0.01", "link.schedule=[{at_s:1,loss:0.1}]"], "link.schedule: changes of loss or rtt_s are not"),
    (["experiment=table6", "tier=simulate", "model=minimax_m2_5"], "model: not read by experiment=table6 on tier=simulate"),
    (["experiment=table6", "cluster.decode.memory_bytes=1e10"], "cluster.decode.memory_bytes: not read by experiment=table6 on tier=model"),
    (["experiment=table6", "tier=simulate", "cluster.decode.steps=rows"], "cluster.decode.steps: rows; paper_1t_h20 has none"),
    (["experiment=simulation", "cluster.decode.memory_bytes=1e9"], "cluster.decode.memory_bytes: 1e+09, but a request of 132096 tokens"),
    (
        ["experiment=burst", "cluster.failures.schedule=[{pool:pd,instance:0,at_s:1,for_s:1}]"],
        "cluster.failures.schedule: not read by experiment=burst on tier=simulate",
    ),
    (
        ["experiment=simulation", "cluster.failures.schedule=[{pool:pd,instance:8,at_s:1,for_s:1}]"],
        "cluster.failures.schedule: instance 8 of pd does not exist; accepted: below 8",
    ),
    (
        ["experiment=simulation", "cluster.failures.schedule=[{pool:pd,instance:0,at_s:-1,for_s:1}]"],
        "cluster.failures.schedule[0].at_s: -1.0; accepted: seconds, 0 or more",
    ),
    (
        ["experiment=agentic", "policy.cache.lower=[{name:ssd,capacity_gb:1}]", "policy.cache.enabled=true"],
        "policy.cache.lower: not read by experiment=agentic on tier=simulate",
    ),
    (
        ["experiment=simulation", "policy.cache.lower=[{name:ssd,capacity_gb:1}]"],
        "policy.cache.lower: has no effect without policy.cache.enabled=true",
    ),
    (
        ["experiment=simulation", "policy.cache={enabled:true,capacity_gb:null,lower:[{name:ssd,capacity_gb:1}]}"],
        "policy.cache.lower[0]: has no effect below a tier without limit",
    ),
    (["experiment=table6", "tier=simulate", "options.draws=3"], "options.draws: not read by experiment=table6 on tier=simulate"),
    (["experiment=burst", "transport.connections=2"], "transport.connections: 2 has no effect on tier=simulate while TCP carries"),
    (["experiment=burst", "policy.lengths=true_mean"], "policy.lengths: not read by experiment=burst"),
    (["experiment=table2", "cost.usd_per_egress_gb=1"], "cost.usd_per_egress_gb: not read by experiment=table2"),
    (["experiment=link_fidelity", "link.jitter_s=0.01"], "link.jitter_s: not read by experiment=link_fidelity"),
    (["bench=transport", "transport.connections=2"], "transport.connections: not read by bench=transport on tier=execute"),
    (["bench=transport", "tier=emulate", "link.schedule=[{at_s:1,loss:0.1}]"], "link.schedule: not read by bench=transport"),
    (["bench=search", "cluster.pd.instances=7"], "cluster.pd.instances: not read by bench=search"),
    (
        ["experiment=table6", "workload=trace", "workload.trace.path=TRACE", "workload.output_tokens=9"],
        "workload.output_tokens: has no effect beside workload.trace",
    ),
    (
        ["experiment=simulation", "workload=trace", "workload.trace.path=TRACE", "workload.lengths.mu=9"],
        "workload.lengths.mu: has no effect beside workload.trace",
    ),
    (
        ["experiment=cost", "cost.usd_per_gpu_hour.B300=9"],
        "cost.usd_per_gpu_hour.B300: no cluster here has that accelerator; accepted: H20, H200",
    ),
    (
        ["experiment=cost", "profile=paper_1t_h20", "cost.usd_per_gpu_hour.H200=9"],
        "cost.usd_per_gpu_hour.H200: no cluster here has that accelerator; accepted: H20",
    ),
    (["experiment=egress", "workload.slo.ttft_s=1"], "workload.slo.ttft_s: not read by experiment=egress"),
    (
        ["experiment=tiers", "profile=paper_1t_h200"],
        "options.slowdown: 4; accepted with a profile that is given (profile=paper_1t_h200): 1",
    ),
    (["experiment=case_study", "policy.short_term.period_s=2"], "policy.short_term.period_s: not read by experiment=case_study"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda part: part[-1] if isinstance(part, list) else "")
def test_a_key_that_is_not_read_ends_in_one_line_before_a_directory_exists(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words("trace", "simulate", tmp_path)  # writes a trace
    arguments = [word.replace("TRACE", str(tmp_path / "trace.jsonl")) for word in arguments]
    assert app.main([*arguments, "tracking=disabled", f"results={tmp_path / 'results'}"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith(f"error: {message}")
    assert not (tmp_path / "results").exists()


NODES = {
    "model": "model=qwen3_235b", "size": "size=single_gpu", "cluster": "cluster.pd.instances=7", "link": "link.rate_bps=5e9",
    "workload": "workload.lengths.mu=9.5", "policy": "policy.threshold_step_tokens=200", "transport": "transport.connections=2",
    "cost": "cost.usd_per_egress_gb=0.01", "profile": "profile=paper_1t_h20", "seed": "seed=5", "ray": "ray=10.0.0.1:6379",
}  # fmt: skip


@pytest.mark.parametrize(("name", "tier"), every(), ids=str)
def test_every_node_is_read_or_refused_by_name(name: str, tier: str) -> None:
    experiment = base.load(name)
    for key in (word.partition("=")[0] for word in NODES.values()):
        parts = [base.part_reads(part, key) for part in experiment.parts.get(tier, ())]
        if experiment.reads_key(key, tier) or any(parts):
            base.refuse_unread(experiment, tier, [key])
        else:
            with pytest.raises(UserError, match=f"^{key}: not read by {typed(name)} on tier={tier}"):
                base.refuse_unread(experiment, tier, [key])


def test_a_file_of_ones_own_that_sets_an_unread_key_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n# Mine.\nname: table5\nlink:\n  rtt_s: 0.1\n"
    )
    assert app.main(["--config-dir", str(tmp_path), "experiment=mine", f"results={tmp_path / 'results'}"]) == 2
    assert capsys.readouterr().err.startswith("error: link.rtt_s: not read by experiment=table5 on tier=model")
    assert not (tmp_path / "results").exists()


def test_the_configuration_has_no_node_that_no_experiment_reads() -> None:
    for group in sorted(
        path.name for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "sweep", "bench")
    ):
        if group in ("experiment", "tier", "tracking"):
            continue
        assert any(base.load(name).reads_key(group, tier) for name, tier in every()), group
