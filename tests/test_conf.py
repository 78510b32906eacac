"""Every file of conf/ composes to settings that hold, and says in its first lines what it is."""

from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

import repro
from repro import runner
from repro.composition import compose
from repro.configuration import build, plain
from repro.errors import UserError
from repro.experiments import base
from repro.presets import CONF, choices, typed
from repro.settings import Settings

EXPERIMENTS = sorted(path for group in ("experiment", "bench") for path in (CONF / group).glob("*.yaml"))
SWEEPS = sorted((CONF / "sweep").glob("*.yaml"))
CHOICES = sorted(
    path for path in CONF.glob("*/*.yaml") if path.parent.name not in ("experiment", "bench", "sweep", "hydra")
)


#: Choices that cannot stand alone, with what else they need.
COMPANIONS = {"workload/trace": ["workload.trace.path=somewhere.jsonl"]}


def settings(*overrides: str) -> Settings:
    return compose(overrides).settings


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def description(path: Path) -> str:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    return lines[0] if lines else ""


def test_the_defaults_are_the_case_study_of_the_paper() -> None:
    default = settings()
    assert default.name == "case_study"
    assert (default.cluster.prfaas.instances, default.cluster.pd.instances) == (4, 8)
    assert default.link.rate_bps == 100e9
    assert default.workload.output_tokens == 1024


def test_the_values_of_config_yaml_stand_before_an_experiments_deltas() -> None:
    """With `_self_` behind `experiment`, config.yaml would silently override every experiment."""
    defaults = yaml.safe_load((CONF / "config.yaml").read_text())["defaults"]
    keys = [entry if isinstance(entry, str) else next(iter(entry)) for entry in defaults]
    assert keys.index("_self_") < keys.index("experiment")
    groups = [
        key
        for key in keys
        if key not in ("_self_", "experiment", "bench", "sweep", "settings_schema") and "override" not in key
    ]
    assert keys[0] == "settings_schema"
    assert max(map(keys.index, groups)) < keys.index("_self_")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_an_experiment_composes_on_each_of_its_tiers_and_its_options_hold(path: Path) -> None:
    choice = f"{path.parent.name}={path.stem}"
    composed = settings(choice)
    experiment = base.load(composed.name)
    assert typed(composed.name) == choice
    assert composed.name == experiment.name
    assert composed.tier in experiment.tiers
    for tier in experiment.tiers:
        on_tier = settings(choice, f"tier={tier}")
        assert on_tier.tier == tier
        build(experiment.options, on_tier.options, "options")
        assert build(Settings, plain(on_tier)) == on_tier


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_an_experiment_file_is_global_and_says_in_one_line_what_it_answers(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    assert first == "# @package _global_"
    assert second.startswith("# ")
    assert second.endswith(".")
    assert choices(path.parent.name)[path.stem] == second[2:]


@pytest.mark.parametrize(("group", "room"), [("experiment", "experiments"), ("bench", "bench")])
def test_every_experiment_module_has_its_file(group: str, room: str) -> None:
    modules = {
        path.stem
        for path in (Path(repro.__file__).parent / room).glob("*.py")
        if "\nEXPERIMENT = Experiment(" in path.read_text()
    }
    assert modules == set(choices(group))


def test_a_benchmark_beside_an_experiment_is_refused() -> None:
    with pytest.raises(UserError, match=r"^bench: 'search' beside experiment=table6; accepted: one of the two"):
        compose(["experiment=table6", "bench=search"])


@pytest.mark.parametrize("path", SWEEPS, ids=name_of)
def test_a_sweep_is_global_and_every_job_of_its_grid_composes(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    assert first == "# @package _global_"
    assert second.startswith("# ")
    parameters = yaml.safe_load(path.read_text())["hydra"]["sweeper"]["params"]
    assert parameters["experiment"], "a sweep names its experiment"
    for job in _corners({str(key): str(value) for key, value in parameters.items()}):
        composition = compose([f"sweep={path.stem}", *job])
        experiment = base.load(composition.settings.name)
        assert composition.settings.tier in experiment.tiers
        build(experiment.options, composition.settings.options, "options")
        base.refuse_unread(experiment, composition.settings.tier, composition.asked)


def _corners(parameters: dict[str, str]) -> list[list[str]]:
    """Every value of every parameter at least once; the whole grid could be thousands."""
    values = {}
    for key, text in parameters.items():
        (override,) = OverridesParser.create().parse_overrides([f"{key}={text}"])
        values[key] = list(override.sweep_string_iterator()) if override.is_sweep_override() else [text]
    longest = max(map(len, values.values()))
    return [[f"{key}={found[min(i, len(found) - 1)]}" for key, found in values.items()] for i in range(longest)]


@pytest.mark.parametrize("path", CHOICES, ids=name_of)
def test_a_choice_of_a_group_composes_and_says_what_it_is(path: Path) -> None:
    group, choice = path.parent.name, path.stem
    composed = settings(f"{group}={choice}", *COMPANIONS.get(f"{group}/{choice}", []))
    assert plain(composed)
    line = description(path)
    assert line.startswith("# ")
    assert len(line) > 12


@pytest.mark.parametrize(
    "overrides",
    [
        ["policy.threshold_tokens=5"],
        ["policy.threshold_tokens=1e6"],
        ["policy.n_p=0", "policy.threshold_tokens=20000"],
        ["policy.n_p=8"],
        ["cluster.prfaas.instances=0", "policy.threshold_tokens=20000"],
        ["profile=missing"],
        ["cluster.pd.profile=missing"],
        ["tier=execute"],
        ["name=nope"],
    ],
    ids=" ".join,
)
def test_what_cannot_run_is_refused_before_a_directory_is_made(overrides: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        runner.run(compose(["experiment=table6", f"results={tmp_path}", *overrides]), [])
    key = overrides[0].split("=")[0]
    assert key.split(".")[0] in str(caught.value) or key == "name"
    assert "accepted" in str(caught.value)
    assert not list(tmp_path.iterdir())
