"""Benchmarks: `scripts/bench <name> …`, one module each; their results are kept with provenance, never asserted by a test."""
