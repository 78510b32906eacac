"""How fast each codec is, per thread: encode, decode, and the link above which it no longer pays.

A codec pays while encoding is faster than the bytes it saves would take on the link, that is on links slower than
speed · (1 − 1/ratio). Tensors are those of a prefilled model; a random model's are marked synthetic.

    scripts/bench codecs [--pretrained FOLDER] [--tokens 2048] [--repeats 5]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from repro.bench._record import recorded
from repro.kvcache.codecs import CODECS, CodecSpec
from repro.kvcache.quality import through
from repro.kvcache.state import State, extract
from repro.models import spec
from repro.models.build import build
from repro.models.prefill import chunked_prefill
from repro.models.spec import ModelSpec
from repro.models.train import Corpus
from repro.record.metrics import Metric


def main(argv: list[str]) -> int:
    """Run, print one line per codec, write a record; its path is the last line."""
    parser = argparse.ArgumentParser(prog="bench codecs", description=__doc__)
    parser.add_argument("--pretrained", help="a checkpoint of scripts/train_checkpoint; random weights without it")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("results"))
    arguments = parser.parse_args(argv)
    name = "trained" if arguments.pretrained else "synthetic"
    with recorded("codecs", f"{name}_{arguments.tokens}", arguments, argv, {"prompt": 0}) as directory:
        directory.write_metrics(_rows(arguments, "" if arguments.pretrained else "synthetic, "))
    return 0


def _rows(arguments: argparse.Namespace, prefix: str) -> list[Metric]:
    torch.set_num_threads(1)
    states, rows = _states(arguments), []
    raw = sum(state.nbytes for state in states)
    for name in CODECS:
        runs = [through(states, CodecSpec(name), time.perf_counter) for _ in range(arguments.repeats + 1)][1:]
        on_link = [run[1] for run in runs]
        ratio = raw / on_link[0]
        encode_bps, decode_bps = (
            8 * raw / min(times) for times in ([run[2] for run in runs], [run[3] for run in runs])
        )
        pays_bps = encode_bps * (1 - 1 / ratio)
        print(
            f"{prefix}{name}: ratio {ratio:.3f}, encode {encode_bps / 1e9:.2f} Gbps, decode {decode_bps / 1e9:.2f} Gbps; "
            f"pays below {pays_bps / 1e9:.2f} Gbps per thread",
            file=sys.stderr,
        )
        values = (("ratio", ratio, ""), ("encode_bps", encode_bps, "bit/s"), ("decode_bps", decode_bps, "bit/s"))
        for metric, value, unit in (*values, ("pays_below_bps", pays_bps, "bit/s")):
            rows.append(
                Metric("bench_codecs", "execute", prefix + name, metric, value, unit, "measured", n=arguments.repeats)
            )
    return rows


def _states(arguments: argparse.Namespace) -> list[State]:
    """The state after a prompt, moved out of the cache: held-out bytes for a checkpoint, else random tokens."""
    if arguments.pretrained:
        model = build(ModelSpec("pretrained", "auto", dtype="bfloat16", pretrained=arguments.pretrained))
        ids = Corpus.of().held_out[None, : arguments.tokens]
    else:
        model = build(spec.load("qwen3_5_397b", "tiny"))
        ids = torch.randint(3, 500, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    cache = chunked_prefill(model, ids, 512)[0]
    held = extract(cache, model.config, arguments.tokens)  # type: ignore[arg-type]
    return [State(s.layer, s.kind, s.slot, s.start, s.end, s.tensor.clone()) for s in held]
