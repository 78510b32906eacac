"""The command line: `python -m repro [overrides]` runs experiments, `python -m repro <verb> …` are the tools around them.

Hydra composes and sweeps; this module keeps its manners: every mistake ends in one line that names the key, and the last line of stdout
is the run directory.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from repro.errors import UserError
from repro.experiments.base import CONFIGURATION, names

_SCHEMA = "settings_schema"


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    # A terminated run must unwind like an interrupted one, so that workers and namespaces are gone when it ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    try:
        if arguments and arguments[0] in verbs():
            return int(importlib.import_module(f"repro.verbs.{arguments[0]}").main(arguments[1:]))
        if "--help" in arguments or "-h" in arguments:
            print(_help())
            return 0
        return _hydra(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; the run is marked as failed and will start afresh", file=sys.stderr)
        return 130


def verbs() -> dict[str, str]:
    """The tools' names and first docstring lines, read without importing them."""
    found = {}
    for path in sorted((Path(__file__).parent / "verbs").glob("*.py")):
        if path.stem != "__init__":
            found[path.stem] = path.read_text().split('"""')[1].splitlines()[0]
    return found


def _help() -> str:
    groups = sorted(path.name for path in CONFIGURATION.iterdir() if path.is_dir() and path.name not in ("experiment", "hydra", "sweep"))
    lines = [
        "usage: python -m repro [experiment=<name>] [<group>=<choice> …] [<key>=<value> …]     one experiment (default: the case study)",
        "       python -m repro -m experiment=<a>,<b> [<key>=<value>,<value> …]                 a sweep",
        "       python -m repro --cfg job [overrides]                                           print the composed configuration",
        "       python -m repro <verb> …                                                        a tool",
        "",
        "experiments:",
    ]
    width = max(map(len, names())) + 2
    lines += [f"  {name:<{width}}{line}" for name, line in names().items()]
    lines += ["", "groups:"]
    for group in groups:
        choices = ", ".join(sorted(path.stem for path in (CONFIGURATION / group).glob("*.yaml")))
        lines.append(f"  {group:<{width}}{choices}")
    lines += ["", "verbs:"]
    lines += [f"  {name:<{width}}{line}" for name, line in verbs().items()]
    return "\n".join(lines)


def register() -> None:
    """Put the schema of the whole configuration into Hydra's ConfigStore."""
    from hydra.core.config_store import ConfigStore

    from repro.configuration import twin
    from repro.settings import Settings

    ConfigStore.instance().store(name=_SCHEMA, node=twin(Settings))


def settings_of(composed: Any) -> Any:
    """Frozen settings from what Hydra composed.

    Raises:
        UserError: naming the key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from repro.configuration import build
    from repro.settings import Settings

    try:
        values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from error
    assert isinstance(values, dict)
    return build(Settings, {str(key): value for key, value in values.items()})


def _hydra(arguments: list[str]) -> int:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as exceptions, to be said in one line
    register()
    sweeping = any(argument in ("-m", "--multirun") for argument in arguments)
    application = hydra.main(version_base="1.3", config_path=str(CONFIGURATION), config_name="config")(_sweep_job if sweeping else _job)
    before, sys.argv = sys.argv, ["repro", *arguments]
    try:
        application()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error)) from error
    finally:
        sys.argv = before
    return _sweep_summary(arguments) if sweeping else 0


def _job(composed: Any) -> None:
    from repro import runner

    record = runner.run(settings_of(composed), sys.argv)
    print(record.path)


def _sweep_job(composed: Any) -> None:
    """One job of a sweep: its failure is written down and must not keep the others from running."""
    from hydra.core.hydra_config import HydraConfig

    configuration = HydraConfig.get()
    outcome: dict[str, Any] = {"overrides": list(configuration.overrides.task)}
    try:
        from repro import runner

        outcome["path"] = str(runner.run(settings_of(composed), sys.argv).path)
    except UserError as error:
        outcome["error"] = str(error)
        print(f"error: {' '.join(outcome['overrides'])}: {error}", file=sys.stderr)
    except Exception as error:
        outcome["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    folder = Path(configuration.sweep.dir) / str(configuration.job.num)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outcome.json").write_text(json.dumps(outcome, indent=1) + "\n")
    print(outcome.get("path", f"failed: {outcome.get('error')}"), flush=True)


def _sweep_summary(arguments: list[str]) -> int:
    sweeps = sorted(Path("results", "sweeps").glob("*/multirun.yaml"), key=lambda path: path.stat().st_mtime)
    if not sweeps:
        return 0
    folder = sweeps[-1].parent
    outcomes = [json.loads(path.read_text()) for path in sorted(folder.glob("*/outcome.json"), key=lambda p: int(p.parent.name))]
    failed = [outcome for outcome in outcomes if "error" in outcome]
    print(f"sweep: {len(outcomes) - len(failed)} of {len(outcomes)} runs finished", file=sys.stderr)
    for outcome in failed:
        print(f"  failed: {' '.join(outcome['overrides'])}: {outcome['error']}", file=sys.stderr)
    print(folder)
    return 1 if failed else 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's messages in one line that names the key and what is accepted."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

    for cause in causes:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            key = str(cause.full_key)
            if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
                return f"{key}: no such key; accepted: {', '.join(_siblings(cause))}"
            if isinstance(cause, ValidationError):
                return f"{key}: {str(cause).splitlines()[0]}"
    return _one_line(error).replace("Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.", "").strip()


def _siblings(error: Any) -> list[str]:
    from omegaconf import DictConfig

    parent = error.parent_node
    return sorted(map(str, parent.keys())) if isinstance(parent, DictConfig) else ["see --cfg job"]
