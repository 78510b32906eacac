"""Run directories, provenance and metrics: what a run leaves behind, in one form for all tiers."""

from repro.record.loading import load

__all__ = ["load"]
