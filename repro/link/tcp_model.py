"""What TCP makes of a link: goodput from round trip, loss, congestion control and window, and what an idle window costs.

A rate alone does not say what crosses a wide-area link. A connection sends a window per round trip; under loss, CUBIC's window is what its
decreases and its growth leave of it. RFC 9438 (section 5.1) states that mean for losses at even distances; packets are lost at random,
windows are whole segments, and a recovery takes its round trip, so the mean here is taken over a Markov chain of rounds: each round
sends a window, loses each segment with the same probability, and then shrinks or grows as the standard says. One law serves the
simulated link (`repro.simulate`) and the study of distance.

Constants are the standards'; two were set by what iperf3 measures on the emulated link. `experiment=link_law` fits them anew; its reference
record says how near its fit and the law come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from repro.errors import UserError
from repro.link.spec import CONGESTION_CONTROLS, TCP_HEADERS_BYTES

#: RFC 6928: segments of a new connection's window, and the least that an idle one falls back to.
INITIAL_SEGMENTS = 10
#: RFC 9438, sections 4.1 and 4.6: CUBIC's constant in segments/s³, and what a loss leaves of the window.
CUBIC_C, CUBIC_BETA = 0.4, 0.7
#: RFC 5681: what a loss leaves of Reno's window.
RENO_BETA = 0.5
#: The smallest window (RFC 5681, section 3.1), in segments.
SMALLEST_SEGMENTS = 2.0
#: The largest window that Linux opens by itself.
LINUX_WINDOW_BYTES = 4.0 * 2**20
#: From measurements: rounds after a decrease in which a window does not grow (losses are found, sent again and acknowledged), and what
#: hosts add to the link's round trip while they wake, copy and acknowledge.
RECOVERY_ROUNDS, HOST_S = 1, 0.0007

_CHAINS = 256
_FEWEST_ROUNDS, _MOST_ROUNDS = 400, 4000
#: A chain forgets where it began, and is then averaged, over so many of the distances between two decreases.
_FORGETS, _AVERAGED = 8, 24


@dataclass(frozen=True)
class TcpPath:
    """`connections` that send together as fast as they may.

    `loss` is the probability that a segment is lost, in bursts of `burst_segments` on average, each of which shrinks a window once.
    `link_bps` is what the link carries of payload (infinite: the connections alone decide); it queues what it carries in a round trip.
    `window_bytes` is a connection's largest window, `segment_bytes` the payload of a segment.
    """

    rtt_s: float
    loss: float = 0.0
    congestion_control: str = "cubic"
    connections: int = 1
    window_bytes: float = LINUX_WINDOW_BYTES
    segment_bytes: int = 1500 - TCP_HEADERS_BYTES
    burst_segments: float = 1.0
    link_bps: float = math.inf

    def __post_init__(self) -> None:
        if self.congestion_control not in CONGESTION_CONTROLS:
            raise UserError(
                f"link.congestion_control: {self.congestion_control!r}; accepted: {', '.join(CONGESTION_CONTROLS)}"
            )
        if not (self.rtt_s >= 0 and 0 <= self.loss < 1 and self.connections >= 1 and self.window_bytes > 0):
            raise UserError(
                f"link: TCP over rtt_s {self.rtt_s:g}, loss {self.loss:g}, {self.connections} connections, windows of "
                f"{self.window_bytes:g} bytes; accepted: 0 or more, below 1, 1 or more, above 0"
            )

    @property
    def goodput_bps(self) -> float:
        """Payload that all connections together deliver in the long run, in bit/s; infinite without a round trip, a loss and a link.

        BBR takes no loss for congestion: it fills the link, or its window, with what is not lost.
        """
        whole = self.connections * 8 * self.window_bytes / self.rtt_s if self.rtt_s > 0 else math.inf
        most = min(whole, self.link_bps)
        if self.congestion_control == "bbr" or self.loss == 0:
            return most * (1 - self.loss)
        return min(most, chain_bps(self, RECOVERY_ROUNDS, HOST_S))

    def idle_window_bps(self, idle_s: float, rto_s: float) -> float:
        """What the first round trip after `idle_s` of silence carries, over all connections; infinite idleness is a new connection.

        Linux halves an idle window once per retransmission timeout, down to the initial one (RFC 5681, section 4.1, restarts at once).
        BBR paces on from the rate that it knows, so only a new connection of it begins small.
        """
        if self.rtt_s <= 0:
            return self.goodput_bps
        least = self.connections * 8 * INITIAL_SEGMENTS * self.segment_bytes / self.rtt_s
        steady = self.goodput_bps
        if math.isfinite(idle_s) and self.congestion_control == "bbr":
            return steady
        return min(steady, max(least, steady * math.pow(2.0, -min(idle_s / rto_s, 1000.0))))

    def delivery_s(self, size_bytes: float, idle_s: float = math.inf, rto_s: float = 0.2) -> float:
        """From the first byte sent to the last one received: windows double per round trip until the steady rate, then that.

        Without losses in between, this is the slow start of RFC 5681; `repro.simulate` plays the same rounds as events.
        """
        steady = self.goodput_bps / 8
        rate, left, elapsed = self.idle_window_bps(idle_s, rto_s) / 8, size_bytes, 0.0
        while rate < steady and left > rate * self.rtt_s:
            left -= rate * self.rtt_s
            elapsed += self.rtt_s
            rate = min(2 * rate, steady)
        return elapsed + (left / rate if rate < math.inf else 0.0) + self.rtt_s / 2


@lru_cache(maxsize=4096)
def chain_bps(path: TcpPath, recovery_rounds: int, host_s: float) -> float:
    """The mean over rounds of windows that shrink by losses: of the link's own queue as well, where it is too short for what is sent.

    A chain is one group of `connections` on a link of their own; all have the same random losses at every call.
    """
    reno = path.congestion_control == "reno"
    c, beta = (0.0, RENO_BETA) if reno else (CUBIC_C, CUBIC_BETA)
    grows = 3 * (1 - beta) / (1 + beta)  # of the Reno-friendly region: 1 for Reno itself
    bits, k, rtt_s = 8 * path.segment_bytes, path.connections, path.rtt_s + host_s
    largest = max(path.window_bytes / path.segment_bytes, SMALLEST_SEGMENTS)
    held = 2 * path.link_bps * rtt_s / bits
    event = path.loss / path.burst_segments
    even = even_losses_bps(replace(path, rtt_s=rtt_s)) * rtt_s / bits
    usual = max(min(even, largest, held / k), SMALLEST_SEGMENTS)
    cycle = 1 / min(event * usual, 1.0)
    forgets = int(min(max(_FORGETS * cycle, _FEWEST_ROUNDS / 4), _MOST_ROUNDS / 4))
    rounds = forgets + int(min(max(_AVERAGED * cycle, _FEWEST_ROUNDS), _MOST_ROUNDS))

    shape = (max(_CHAINS // k, 8), k)
    draw = np.random.default_rng(0).random
    window = np.full(shape, usual)
    peak, start, friendly = window, window, window  # W_max, the window at the epoch's start, and W_est of RFC 9438
    since_s, rests = np.zeros(shape), np.zeros(shape)  # the epoch's age, and rounds until growth
    delivered = elapsed = 0.0
    for number in range(rounds):
        sent = np.floor(window)
        together = sent.sum(axis=1, keepdims=True)
        round_s = np.maximum(rtt_s, together * bits / path.link_bps)
        if number >= forgets:
            delivered += float(sent.sum()) * (1 - path.loss)
            elapsed += k * float(round_s.sum())
        passes = np.log1p(-event) * sent
        if math.isfinite(held):
            passes = passes - np.maximum(together - held, 0.0) * sent / together
        lost = draw(shape) >= np.exp(passes)
        since_s, rests = since_s + round_s, rests - 1
        # Growth: the cubic one, seen a round trip ahead, or the friendly one where that is more (RFC 9438, sections 4.2 to 4.4). Linux
        # counts the friendly window in whole segments, and closes the distance to it within a round.
        friendly = np.where(rests < 0, friendly + grows, friendly)
        aim = window + np.maximum(np.floor(friendly) - sent, 0.0)
        if c:
            rise_s = np.cbrt(np.maximum(peak - start, 0.0) / c)
            cubic = c * (since_s + round_s - rise_s) ** 3 + np.maximum(peak, start)
            aim = np.clip(np.maximum(cubic, aim), window, 1.5 * window)
        grown = np.minimum(np.where(rests < 0, aim, window), largest)
        # A loss: fast convergence where the last peak was not reached (section 4.7).
        peak = np.where(lost, np.where(window < peak, window * (1 + beta) / 2, window), peak)
        window = np.where(lost, np.maximum(np.floor(beta * sent), SMALLEST_SEGMENTS), grown)
        friendly = np.where(lost, window, np.minimum(friendly, largest))
        start = np.where(lost, window, start)
        since_s = np.where(lost, 0.0, since_s)
        rests = np.where(lost, float(recovery_rounds), rests)
    return k * delivered * bits / elapsed


def even_losses_bps(path: TcpPath) -> float:
    """What one connection carries where losses come at even distances and there is no link to fill, in bit/s.

    A window per round trip, under CUBIC the mean of RFC 9438, section 5.1, whose friendly region is Mathis's law.
    """
    if path.rtt_s <= 0:
        return math.inf
    bits = 8 * path.segment_bytes
    segments = path.window_bytes * 8 / bits
    event = path.loss / path.burst_segments
    if path.congestion_control != "bbr" and event > 0:
        cubic = (CUBIC_C * (3 + CUBIC_BETA) / (4 * (1 - CUBIC_BETA))) ** 0.25 * (path.rtt_s / event) ** 0.75
        friendly = math.sqrt(1.5 / event)
        segments = min(segments, friendly if path.congestion_control == "reno" else max(cubic, friendly))
    return segments * bits / path.rtt_s
