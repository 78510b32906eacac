"""Every experiment runs on every tier that it offers, draws its figures, and reads exactly the keys that it declares."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import metrics, unknown
from small import every, words
from watching import Watch

from repro import runner
from repro.composition import compose
from repro.experiments import base
from repro.record.loading import flat
from repro.record.metrics import each

METRICS = metrics()

#: Keys that a node's own methods look at on the way to those that decide, on tiers without an emulated link.
PASSED_OVER = {
    "cluster.also_prfaas": "looked at wherever a deployment is made, and refused where it is not declared",
    "link.rate_bps": "overlap replaces it by multiples of the measured Φ_kv",
    "link.capacity_trace": "refused before the run",
    "link.reverse_capacity_trace": "refused before the run",
    "link.reverse_rate_bps": "the simulated link is the direction of the KVCache",
    "link.schedule": "nothing starts the schedule of a link that is benchmarked, which is made without one",
    "transport.backend": "each contender of a benchmark has its own",
    "transport.connections": "the same",
    "transport.tls": "the same",
    "policy.lengths": "replaced by the reading that the tier takes",
    "policy.cache.block_tokens": "a trace's own block size takes its place",
}
#: Keys that one experiment looks at without taking the user's value, with the reason.
LOOKED_AT = {
    "sensitivity": {"workload.trace": "the law of lengths asks whether there is one; what is set is refused"},
    "agentic": {"policy.rebalance.enabled": "its cases switch it on and off themselves"},
    "validate": {"link.rtt_s": "a drawn one takes its place; what is set is refused"},
    "live_stress": {"workload.trace": "the law of lengths asks whether there is one; what is set is refused"},
    "live_table6": {"workload.trace": "the law of lengths asks whether there is one; what is set is refused"},
    "live_wall": {"workload.trace": "the law of lengths asks whether there is one; what is set is refused"},
    "live_reuse": {"workload.trace": "the law of lengths asks whether there is one; what is set is refused"},
    "tiers": {"workload.trace": "the law of lengths asks whether there is one; what is set is refused"},
    "scenarios": {
        "workload.mixture": "the law of lengths asks whether there is one; what is set is refused",
        "workload.trace": "the law of lengths asks whether there is one; what is set is refused",
        "policy.threshold_tokens": "a check that the deployment can serve; what is set is refused",
        "policy.n_p": "the same",
    },
    "shift": {
        "workload.mixture": "the law of lengths asks whether there is one; what is set is refused",
        "workload.trace": "the law of lengths asks whether there is one; what is set is refused",
    },
}
#: Declared keys that a small run does not come to, with the reason.
NOT_REACHED = {
    "profile": "looked at when the run is prepared",
    "seed": "looked at when the run is prepared",
    "workload.trace": "only where a trace is given",
    "workload.mixture": "only where it has parts",
    "workload.sessions": "only where sessions are given",
    "policy.offload_share": "only of router=random_split",
    "policy.cache": "only where caches are switched on",
    "policy.rebalance": "only where caches are switched on",
    "link.loss_burst_segments": "only where the simulated link loses",
    "transport.connections": "of a simulated link only where TCP counts",
    "transport.turn_bytes": "looked at when a sender is made",
    "transport.rate_cap_bps": "looked at when a sender is made",
    "transport.tls": "looked at when an end is made",
    "pretrained": "handed to the models",
    "size": "handed to the models",
    "model": "of several models and sizes each run reads some",
}


def declared(experiment: base.Experiment, tier: str, key: str) -> bool:
    return experiment.reads_key(key, tier)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "tier"), every(), ids=lambda part: str(part))
def test_an_experiment_runs_draws_and_reads_what_it_declares(
    name: str, tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, watch = base.load(name), Watch()
    context = base.Context

    def watched(settings, options, folder, progress):  # type: ignore[no-untyped-def]
        return context(watch.of(settings), options, folder, progress)

    if not experiment.parts:
        monkeypatch.setattr(base, "Context", watched)
    record = runner.run(compose(words(name, tier, tmp_path)), ["repro", name], lambda line: None)
    monkeypatch.undo()

    figures = {path.stem for path in (record.path / "figures").glob("*.png")} if experiment.figures_for(tier) else set()
    assert figures == set(experiment.figures_for(tier))
    assert (record.path / "report.html").is_file()
    assert experiment.parts or len(record.metrics)
    rows = record.metrics.fillna({"unit": ""})
    undescribed = {(row.metric, row.unit) for row in each(rows) if unknown(row.metric, row.unit, METRICS)}
    assert not undescribed, "not in docs/metrics.md, or with another unit"

    other = [key for key in flat(record.configuration) if not declared(experiment, tier, key)]
    assert not other or experiment.parts, "in the record without being declared"
    unread = {key for key in watch.read if not declared(experiment, tier, key) and key not in PASSED_OVER}
    unread = {key for key in unread if key.rpartition(".")[2] not in base.DESCRIPTIONS} - LOOKED_AT.get(name, {}).keys()
    assert not unread, "read without being declared"
    for key in experiment.reads[tier]:
        if key == "options" or key.startswith("options.") or experiment.parts:
            continue
        reached = any(found == key or found.startswith(f"{key}.") for found in watch.read)
        excused = any(key == known or key.startswith(f"{known}.") for known in NOT_REACHED)
        assert reached or excused, f"{key} is declared and never read"
