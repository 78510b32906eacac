"""The whole case study (§4) in one run: every table and figure of the paper from its inputs, then the mechanism on real tensors.

Each part is an experiment of its own with its own run directory, so a part that has run is not run again, and the report here is the
claims of all of them side by side. On tier `simulate` Table 6 runs on the simulator too, on `emulate` on the live system as well, and the
report has a column for each tier.
"""

from __future__ import annotations

from repro.experiments.base import Experiment, PartsOptions, composite

_PARTS = ("table3", "table5", "table6", "figure2", "figure5", "egress", "cost", "split")

EXPERIMENT = Experiment(
    name="case_study",
    reads=dict.fromkeys(("model", "simulate", "emulate"), ("options",)),
    run=composite,
    options=PartsOptions,
    parts={
        "model": _PARTS,
        "simulate": (*_PARTS, "table6@simulate"),
        "emulate": (*_PARTS, "table6@simulate", "table6@emulate"),
    },
)
