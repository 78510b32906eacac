"""Train a small hybrid model on the bytes of this repository, in minutes, so that codecs can be judged on a real one.

Random weights hide what quantisation does (their attention is flat) and say nothing about compression ratios. Code and
YAML as bytes need no tokenizer and no download; every tenth file is held out. Seeded, so the same sources and machine give
the same checkpoint; the sources' digest is saved beside the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from repro.errors import UserError
from repro.models import spec
from repro.models.build import build, parameters

ROOT: Final = Path(__file__).resolve().parents[2]
PATTERNS: Final = ("repro/**/*.py", "tests/**/*.py", "conf/**/*.yaml", "*.md")
BYTES: Final = 256


@dataclass(frozen=True)
class TrainSpec:
    """How long and how: `steps` of `batch` windows of `window_tokens` bytes, learning rate falling as a cosine."""

    steps: int = 300
    batch: int = 8
    window_tokens: int = 256
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "window_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is below 1")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate: {self.learning_rate} is not positive")


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, as int64 tensors, and a digest of both."""

    train: torch.Tensor
    held_out: torch.Tensor
    digest: str

    @staticmethod
    def of(root: Path = ROOT) -> Corpus:
        """The texts below `root`, in the order of their paths, every tenth held out."""
        files = sorted({path for pattern in PATTERNS for path in root.glob(pattern)})
        texts = [path.read_bytes() for path in files]
        if len(texts) < 10:
            raise UserError(f"corpus: {len(texts)} files below {root}; at least 10 are needed to hold one out")
        train = b"".join(text for i, text in enumerate(texts) if i % 10)
        held_out = b"".join(texts[::10])
        digest = hashlib.sha256(train + b"\0" + held_out).hexdigest()
        return Corpus(_tokens(train), _tokens(held_out), digest)


def _tokens(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def windows(tokens: torch.Tensor, spec: TrainSpec) -> Iterator[torch.Tensor]:
    """Seeded batches [batch, window + 1] of random windows."""
    random = torch.Generator().manual_seed(spec.seed)
    if len(tokens) <= spec.window_tokens:
        raise UserError(f"window_tokens: {spec.window_tokens}, but the corpus has {len(tokens)} bytes")
    for _ in range(spec.steps):
        starts = torch.randint(len(tokens) - spec.window_tokens, (spec.batch,), generator=random)
        yield torch.stack([tokens[at : at + spec.window_tokens + 1] for at in starts])


def train(
    model: torch.nn.Module, corpus: Corpus, spec: TrainSpec, progress: Callable[[str], None]
) -> tuple[float, float]:
    """Train in place; returns the held-out loss in nats per byte before and after."""
    before = held_out_loss(model, corpus, spec)
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, spec.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * i / spec.steps))
    )
    for step, batch in enumerate(windows(corpus.train, spec)):
        loss = _loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 0:
            progress(f"step {step} of {spec.steps}: {loss.item():.3f} nats per byte")
    model.eval().requires_grad_(False)
    return before, held_out_loss(model, corpus, spec)


def _loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, corpus: Corpus, spec: TrainSpec, batches: int = 4) -> float:
    """Mean loss over the first windows of the held-out bytes."""
    step = spec.window_tokens + 1
    count = min(batches * spec.batch, len(corpus.held_out) // step)
    rows = corpus.held_out[: count * step].view(count, step)
    losses = [_loss(model, chunk).item() * len(chunk) for chunk in torch.split(rows, spec.batch)]
    return sum(losses) / count


def train_checkpoint(folder: Path, spec: TrainSpec, name: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Train the model of conf/model/`name` and save it as a transformers checkpoint; returns what was done."""
    torch.manual_seed(spec.seed)
    model, corpus = build(load_bytes(name)), Corpus.of()
    progress(f"{parameters(model):,} parameters, {len(corpus.train):,} bytes")
    before, after = train(model, corpus, spec, progress)
    record = {
        "model": name,
        "training": asdict(spec),
        "corpus_sha256": corpus.digest,
        "corpus_bytes": len(corpus.train),
        "loss_before": before,
        "loss_after": after,
    }
    model.save_pretrained(folder)  # type: ignore[operator]
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    progress(f"held out: {before:.3f} before, {after:.3f} nats per byte after")
    return record


def checkpoint_of(folder: Path, spec: TrainSpec, name: str, progress: Callable[[str], None]) -> Path:
    """The checkpoint below `folder` that this training of these sources gives: made once, found again after that."""
    values = json.dumps([name, asdict(spec), Corpus.of().digest], sort_keys=True)
    kept = folder / f"{name}-{spec.steps}-{hashlib.sha256(values.encode()).hexdigest()[:12]}"
    if not (kept / "training.json").is_file():  # written last
        progress(f"training {name} for {spec.steps} steps on the bytes of this repository")
        train_checkpoint(kept, spec, name, progress)
    return kept


def load_bytes(name: str) -> spec.ModelSpec:
    """The specification in float32, to train in; its vocabulary must be of at least 256."""
    model = spec.load(name)
    if model.values().get("vocab_size", 0) < BYTES:
        raise UserError(f"model {name}: a vocabulary of {BYTES} or more is needed to train on bytes")
    return replace(model, dtype="float32")


def main(argv: list[str]) -> int:
    """`scripts/train_checkpoint [--out FOLDER] [--model NAME] [--steps N] …`: train, save, print the folder."""
    parser = argparse.ArgumentParser(prog="train_checkpoint", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "checkpoints" / "bytes")
    parser.add_argument("--model", default="bytes")
    for name, value in asdict(TrainSpec()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args(argv))
    out, name = arguments.pop("out"), arguments.pop("model")
    try:
        train_checkpoint(out, TrainSpec(**arguments), name, lambda line: print(line, file=sys.stderr, flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
