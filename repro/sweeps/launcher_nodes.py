"""The nodes that `hydra/launcher` chooses beside Hydra's own: how many jobs there are, and what each of them is given.

They are registered here, so that no launcher needs a plugin of Hydra's. Keys that a node does not name are added with a plus:
`+hydra.launcher.qos=high` is SLURM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

#: Name → parameters. `jobs` share the points; null is one per core of this machine.
NODES: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "submitit_local": {"jobs": 2, "timeout_min": 600},
    "submitit_slurm": {
        "jobs": 4, "name": "prfaas-repro", "timeout_min": 60, "cpus_per_task": 1, "mem_gb": 4, "partition": None, "account": None,
    },
    "ray": {"jobs": None, "address": None, "cpus_per_job": 1},
})  # fmt: skip


def register() -> None:
    """Put the nodes into Hydra's ConfigStore."""
    from hydra.core.config_store import ConfigStore

    for name, parameters in NODES.items():
        node = {"_target_": f"repro.sweeps.launchers.{name}", **parameters}
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=node, provider="repro")
