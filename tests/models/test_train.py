"""The byte model: training lowers the held-out loss, is repeatable, and its checkpoint is loaded and split like any other."""

import pytest
import torch

from repro.errors import UserError
from repro.kvcache.codecs import CodecSpec
from repro.kvcache.quality import codec_quality
from repro.kvcache.state import extract, restore
from repro.models import spec
from repro.models.build import build
from repro.models.prefill import chunked_prefill, greedy_decode
from repro.models.spec import ModelSpec
from repro.models.train import Corpus, TrainSpec, load_bytes, train, train_checkpoint, windows

QUICK = TrainSpec(steps=8, batch=2, window_tokens=64)


def trained(steps: int = 8):
    torch.set_num_threads(1)
    model = build(load_bytes("bytes"))
    losses = train(model, Corpus.of(), TrainSpec(steps=steps, batch=2, window_tokens=64), lambda line: None)
    return model, losses


def test_training_lowers_the_held_out_loss_and_is_repeatable():
    first, (before, after) = trained()
    second, _ = trained()
    assert after < before - 0.5
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_checkpoint_that_was_written_is_loaded_and_decodes_split_as_unsplit(tmp_path):
    record = train_checkpoint(tmp_path, TrainSpec(steps=2, batch=2, window_tokens=64), "bytes", lambda line: None)
    assert record["loss_after"] < record["loss_before"]
    for device in ("cpu", "auto"):
        model = build(ModelSpec("pretrained", "auto", dtype="float32", pretrained=str(tmp_path)), device)
        ids = Corpus.of().held_out[None, :100]
        cache, logits = chunked_prefill(model, ids, chunk_tokens=32)
        there = restore(extract(cache, model.config, 100), model.config, 100)
        first = logits.argmax(-1)
        split, unsplit = (greedy_decode(model, held, first, 4, 100)[0] for held in (there, cache))
        assert torch.equal(split, unsplit)


def test_held_out_bytes_are_not_trained_on(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02d}.md").write_text(f"file {i}\n")
    corpus = Corpus.of(tmp_path)
    assert bytes(corpus.held_out.byte().tolist()) == b"file 0\nfile 10\n"
    assert b"file 10\n" not in bytes(corpus.train.byte().tolist())
    (tmp_path / "05.md").write_text("changed\n")
    assert Corpus.of(tmp_path).digest != corpus.digest


def test_what_cannot_be_trained_is_named(tmp_path):
    with pytest.raises(UserError, match="at least 10"):
        Corpus.of(tmp_path)
    with pytest.raises(UserError, match="window_tokens: 64"):
        list(windows(torch.zeros(64, dtype=torch.long), QUICK))
    with pytest.raises(UserError, match="steps: 0"):
        TrainSpec(steps=0)
    assert spec.load("bytes").sizes == {}


def test_lossless_codecs_change_nothing_and_lossy_ones_little_on_a_trained_model():
    model, _ = trained()
    ids = Corpus.of().held_out[None, :160]
    exact = codec_quality(model, ids, 128, CodecSpec("zstd"))
    assert exact.kl_nats == 0
    assert exact.token_agreement == 1
    assert exact.ratio > 1.05
    for name in ("fp8", "int8"):
        lossy = codec_quality(model, ids, 128, CodecSpec(name))
        assert lossy.ratio > 3.3  # float32 state, less its scales
        assert 0 < lossy.kl_nats < 0.05
        assert lossy.token_agreement > 0.9
