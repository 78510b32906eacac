"""The whole case study (§4) in one run: every table and figure of the paper from its inputs, then the mechanism on real tensors.

Each part is an experiment of its own with its own run directory, so a part that has run is not run again, and the report here is the
claims of all of them side by side.
"""

from __future__ import annotations

from repro.experiments.base import Experiment, PartsOptions, composite

EXPERIMENT = Experiment(
    name="case_study",
    reads={"model": ("options",)},
    run=composite,
    options=PartsOptions,
    parts=("table3", "table5", "table6", "figure2", "figure5", "egress", "cost", "split"),
)
