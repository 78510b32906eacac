"""The paper's two profiles, built from its tables when asked for, and the door to profiles in files.

`PaperInputs` holds every printed number that the case study rests on; `perturbed` moves each within its rounding, which is how a result
gets its spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import yaml

from repro.configuration import build, plain
from repro.errors import UserError
from repro.paper import tables, text
from repro.paper.quantity import Quantity
from repro.profiles import silicon
from repro.profiles.base import KVSize, PhaseProfile, PrefillCurve
from repro.profiles.calibration import DecodeAnchors, Family, PrefillAnchors, calibrated_profile
from repro.workload.lengths import LengthDistribution, TruncatedLogNormal

MEBIBYTE = 2**20


@dataclass(frozen=True)
class PaperInputs:
    """Printed numbers behind the case study, as drawn from within their rounding."""

    lengths: LengthDistribution
    kv_size_mib: tuple[float, ...]
    prefill_s: tuple[float, ...]
    threshold_tokens: float
    theta_pd_p: tuple[float, float]
    ttft_homogeneous_s: tuple[float, float]
    theta_pd_d: tuple[float, ...]

    @staticmethod
    def draw(rng: np.random.Generator | None = None) -> PaperInputs:
        """The printed values themselves, or a uniform draw from everything that rounds to them."""

        def value(quantity: Quantity) -> float:
            return quantity.value if rng is None else float(rng.uniform(*quantity.interval))

        table_5, table_6 = tables.TABLE_5, tables.TABLE_6
        homogeneous = table_6["homogeneous_pd"]
        return PaperInputs(
            lengths=TruncatedLogNormal(
                value(text.LENGTH_MU), value(text.LENGTH_SIGMA), text.LENGTH_MINIMUM_TOKENS, text.LENGTH_MAXIMUM_TOKENS
            ),
            kv_size_mib=tuple(value(table_5[length].kv_size) for length in tables.LENGTHS),
            prefill_s=tuple(value(table_5[length].prefill) for length in tables.LENGTHS),
            threshold_tokens=value(table_6["prfaas_pd"]["threshold_tokens"]),
            theta_pd_p=(value(table_6["prfaas_pd"]["theta_pd_p"]), value(homogeneous["theta_pd_p"])),
            ttft_homogeneous_s=(value(homogeneous["ttft_mean_s"]), value(homogeneous["ttft_p90_s"])),
            theta_pd_d=tuple(value(table_6[case]["theta_pd_d"]) for case in tables.CASES),
        )

    def prefill_anchors(self) -> PrefillAnchors:
        """What pins H20's T_prefill."""
        case_study = tables.TABLE_6
        return PrefillAnchors(
            lengths=self.lengths,
            threshold_tokens=self.threshold_tokens,
            pd_prefill_per_s=self.theta_pd_p[0],
            pd_prefill_instances=int(case_study["prfaas_pd"]["n_p"].value),
            homogeneous_prefill_per_s=self.theta_pd_p[1],
            homogeneous_instances=int(case_study["homogeneous_pd"]["n_p"].value),
            ttft_mean_s=self.ttft_homogeneous_s[0],
            ttft_p90_s=self.ttft_homogeneous_s[1],
        )

    def decode_anchors(self) -> DecodeAnchors:
        """What pins the decode rate."""
        return DecodeAnchors(
            theta_pd_d=self.theta_pd_d,
            instances=tuple(int(tables.TABLE_6[case]["n_d"].value) for case in tables.CASES),
            cases=tables.CASES,
            output_tokens=text.OUTPUT_TOKENS,
            slo_tokens_per_s=text.SLO_TOKENS_PER_S,
        )

    def kv_size(self) -> KVSize:
        """The straight line through Table 5's sizes."""
        tokens = np.array([tables.TOKENS[length] for length in tables.LENGTHS], np.float64)
        slope, intercept = np.polyfit(tokens, np.array(self.kv_size_mib) * MEBIBYTE, 1)
        return KVSize(fixed_bytes=float(intercept), bytes_per_token=float(slope))

    def h200(self, interpolation: str = "monotone_cubic") -> PhaseProfile:
        """Table 5: the 1T hybrid model on 8×H200. The PrfaaS cluster never decodes, so its decode step is that of the PD cluster."""
        return PhaseProfile(
            name="paper_1t_h200", model="paper_1t", accelerator="H200", gpus_per_instance=text.GPUS_PER_INSTANCE,
            prefill=PrefillCurve(
                interpolation, tuple(float(tables.TOKENS[length]) for length in tables.LENGTHS), self.prefill_s
            ),
            kv=self.kv_size(), decode=self.decode_anchors().step(),
            prefill_source="published", kv_source="published", decode_source="calibrated", notes="Table 5.",
        )  # fmt: skip

    def h20(self, family: Family = "quadratic") -> PhaseProfile:
        """The same model on 8×H20, calibrated from Table 6."""
        return calibrated_profile(
            "paper_1t_h20", "paper_1t", "H20", text.GPUS_PER_INSTANCE,
            self.prefill_anchors(), self.decode_anchors(), self.kv_size(), family,
        )  # fmt: skip


@cache
def _presets() -> dict[str, PhaseProfile]:
    printed = PaperInputs.draw()
    return {"paper_1t_h200": printed.h200(), "paper_1t_h20": printed.h20()}


def load_profile(name: str, folder: Path = Path("results") / "profiles", key: str = "profile") -> PhaseProfile:
    """A profile by its name: a preset's, `silicon:<model>@<system>`, or the one under which it was saved in `folder`; or by file.

    Raises:
        UserError: when there is none, or the file does not hold one.
    """
    if name.startswith(silicon.PREFIX):
        return silicon.silicon_profile(name, key)
    presets = _presets()
    if name in presets:
        return presets[name]
    path = profile_path(name, folder)
    if path is None:
        saved = sorted(file.stem for file in folder.glob("*.yaml"))
        raise UserError(
            f"{key}: {name!r} is neither a preset nor a saved profile nor a file; accepted: {', '.join([*presets, *saved])}, "
            f"{silicon.PREFIX}<model>@<system>"
        )
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{key}: {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{key}: {path} holds no profile; accepted: a YAML file as experiment=profile writes it")
    return build(PhaseProfile, values, str(path))


def profile_path(name: str, folder: Path = Path("results") / "profiles") -> Path | None:
    """The file behind a profile's name, or none for a preset or a name that does not exist."""
    for candidate in (Path(name), folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    return None


def save_profile(profile: PhaseProfile, path: Path) -> None:
    """Write a profile so that `load_profile` reads it back; atomically, since other runs may be reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(plain(profile), sort_keys=False))
    partial.replace(path)
