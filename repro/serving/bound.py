"""The least TTFT that a split run can have: the yardstick of layer-wise overlap (§3.3, and the minimum in equation 3)."""

from __future__ import annotations


def ttft_bound_s(
    *,
    queue_s: float,
    prefill_s: float,
    first_piece_s: float,
    kv_bytes: float,
    goodput_bps: float,
    rtt_s: float,
    step_s: float,
) -> float:
    """Queue, then the slower of prefill and link, then half a round trip and one decode step, in seconds.

    The link has nothing to carry before the first piece is there (`first_piece_s` after prefill began), and from then on
    it needs S_kv / B at its goodput. No order of sending can beat that; whatever a run takes beyond it is overhead.
    """
    return queue_s + max(prefill_s, first_piece_s + 8 * kv_bytes / goodput_bps) + rtt_s / 2 + step_s
