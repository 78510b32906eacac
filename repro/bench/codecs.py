"""How fast each codec is, per thread: encode, decode, and the link above which it no longer pays.

A codec pays while encoding is faster than the bytes it saves would take on the link, that is on links slower than
speed · (1 − 1/ratio). Tensors are those of a prefilled model; a random model's are marked synthetic.

    scripts/bench codecs [pretrained=FOLDER] [options.tokens=2048] [options.repeats=5]
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from repro.errors import UserError
from repro.experiments.base import MODEL, Context, Experiment, Outcome
from repro.experiments.split_model import check_one
from repro.experiments.table3 import one_model
from repro.kvcache.codecs import CODECS, CodecSpec
from repro.kvcache.quality import through
from repro.kvcache.state import State, extract
from repro.models.build import build
from repro.models.prefill import chunked_prefill
from repro.models.spec import ModelSpec
from repro.models.train import Corpus


@dataclass(frozen=True)
class Options:
    """The state after a prompt of `tokens`, through every codec `repeats` times; the fastest counts."""

    tokens: int = 2048
    repeats: int = 5

    def __post_init__(self) -> None:
        for name in ("tokens", "repeats"):
            if getattr(self, name) < 1:
                raise UserError(f"options.{name}: {getattr(self, name)}; accepted: 1 or more")


def run(context: Context) -> Outcome:
    """Every codec on one thread."""
    options, model = context.options, one_model(context.settings)
    assert isinstance(options, Options)
    prefix, threads = "" if model.pretrained else "synthetic, ", torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        states, rows = _states(model, options.tokens), []
        raw = sum(state.nbytes for state in states)
        for name in CODECS:
            runs = [through(states, CodecSpec(name), time.perf_counter) for _ in range(options.repeats + 1)][1:]
            ratio = raw / runs[0][1]
            encode_bps, decode_bps = (
                8 * raw / min(times) for times in ([run[2] for run in runs], [run[3] for run in runs])
            )
            pays_bps = encode_bps * (1 - 1 / ratio)
            context.progress(
                f"{prefix}{name}: ratio {ratio:.3f}, encode {encode_bps / 1e9:.2f} Gbps, decode {decode_bps / 1e9:.2f} Gbps; "
                f"pays below {pays_bps / 1e9:.2f} Gbps per thread"
            )
            values = (("ratio", ratio, "1"), ("encode_bps", encode_bps, "bit/s"), ("decode_bps", decode_bps, "bit/s"))
            for metric, value, unit in (*values, ("pays_below_bps", pays_bps, "bit/s")):
                rows.append(context.metric(prefix + name, metric, value, unit, "measured", n=options.repeats))
    finally:
        torch.set_num_threads(threads)
    return Outcome(rows)


def _states(spec: ModelSpec, tokens: int) -> list[State]:
    """The state after a prompt, moved out of the cache: held-out bytes for a checkpoint, else random tokens."""
    model = build(spec)
    if spec.pretrained:
        ids = Corpus.of().held_out[None, :tokens]
    else:
        vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        ids = torch.randint(3, min(500, vocabulary), (1, tokens), generator=torch.Generator().manual_seed(0))
    cache = chunked_prefill(model, ids, 512)[0]
    held = extract(cache, model.config, tokens)  # type: ignore[arg-type]
    return [State(s.layer, s.kind, s.slot, s.start, s.end, s.tensor.clone()) for s in held]


EXPERIMENT = Experiment(
    "bench_codecs", reads={"execute": (*MODEL, "options")}, run=run, options=Options, check=check_one, timed=True
)
