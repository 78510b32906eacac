"""S_kv(l) of a state layout in the form that a profile keeps."""

from __future__ import annotations

from repro.errors import UserError
from repro.models.layout import StateLayout
from repro.profiles.base import KVSize


def kv_size(layout: StateLayout) -> KVSize:
    """S_kv(l) of a layout in the form of a profile. Raises UserError for windows of several lengths."""
    windows = {state.window_tokens for state in layout.states if state.window_tokens is not None}
    if len(windows) > 1:
        raise UserError(f"profile: windows of {sorted(windows)} tokens; a profile holds one length")
    windowed = sum(state.bytes_per_token for state in layout.states if state.window_tokens is not None)
    fixed = sum(state.bytes_fixed for state in layout.states)
    return KVSize(float(fixed), float(layout.bytes_per_token), next(iter(windows), 0), float(windowed))
