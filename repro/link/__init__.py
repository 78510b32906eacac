"""The emulated WAN between the two clusters: what was asked, the backend that makes it, and what it measured.

The paper's clusters stand in different datacenters; here both stand on one machine and everything between them passes
an emulated link, so that "100 Gbps, 2 ms" is a statement that was made true and measured before it is believed.

>>> with open_link(LinkSpec(rate_bps=1e9, rtt_s=0.02), run="demo") as link:  # doctest: +SKIP
...     server = subprocess.Popen(link.command("decode", ["iperf3", "-s", "-B", link.listen_host("decode")]))
...     host, port = link.dial(5201)
...     subprocess.run(link.command("prefill", ["iperf3", "-c", host, "-p", str(port)]))
"""

from repro.link.backends import open_link
from repro.link.link import DirectionSignals, Link, LinkSignals
from repro.link.measurement import LinkMeasurement
from repro.link.spec import BACKENDS, Direction, LinkChange, LinkSpec, Side

__all__ = [
    "BACKENDS",
    "Direction",
    "DirectionSignals",
    "Link",
    "LinkChange",
    "LinkMeasurement",
    "LinkSignals",
    "LinkSpec",
    "Side",
    "open_link",
]
