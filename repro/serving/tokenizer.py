"""Between text and token ids at the OpenAI-compatible front: a checkpoint's own tokenizer, or bytes for models that have none.

A randomly initialised model knows no words, so nothing is lost by the plainest of tokenizers: a text's UTF-8 bytes are its ids, and an id
above 255 shows as `<id>`. Every token shows as soon as it comes, so a client that times tokens by their text sees each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from repro.errors import UserError

#: One answer's way from ids to text: told a token, it returns the text that is certain by now.
TextOf = Callable[[int], str]
_BYTES = 256
#: What stands for bytes that are no text (yet).
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """What the front asks of one."""

    @property
    def name(self) -> str:
        """For whoever starts the server."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ...

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, up to where the answer begins."""
        ...

    def stream(self) -> TextOf:
        """For one answer."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids. Nothing ends an answer: among random weights an end-of-text token means nothing."""

    name = "bytes"
    stop_ids = frozenset[int]()

    def __init__(self, vocabulary: int) -> None:
        if vocabulary < _BYTES:
            raise UserError(
                f"model: a vocabulary of {vocabulary} tokens has no room for bytes; accepted: {_BYTES} or more"
            )
        self._vocabulary = vocabulary

    def encode(self, text: str) -> list[int]:
        """Its bytes."""
        return list(text.encode())

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Each message on lines of its own, under its role."""
        return self.encode(plain_chat(messages))

    def stream(self) -> TextOf:
        """Token by token: a byte beyond ASCII shows as the replacement character at once, instead of waiting for the rest of a letter."""
        return self.shown

    @staticmethod
    def shown(token: int) -> str:
        """The text of a token."""
        return bytes([token]).decode(errors="replace") if token < _BYTES else f"<{token}>"

    def save(self, folder: Path) -> None:
        """Write it as a folder that transformers' AutoTokenizer reads: load generators count tokens as the server does."""
        letters = _letters()
        words = [*(letters[byte] for byte in range(_BYTES)), *(f"<{id_}>" for id_ in range(_BYTES, self._vocabulary))]
        whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        description: dict[str, Any] = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "post_processor": None,
            "pre_tokenizer": whole, "decoder": whole,
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                "vocab": {word: id_ for id_, word in enumerate(words)}, "merges": [],
            },
        }  # fmt: skip
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(description))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _letters() -> dict[int, str]:
    """The letter by which byte-level vocabularies write each byte: itself where it can be printed, else one from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(_BYTES) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(_BYTES + at) for at, byte in enumerate(others)}


def plain_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as text, for models without a template of their own."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant: "


class CheckpointTokenizer:
    """A checkpoint's own, with its chat template and its end-of-text tokens."""

    def __init__(self, source: str, loaded: Any, stop_ids: frozenset[int]) -> None:
        self.name = f"{source}'s own"
        self.stop_ids = stop_ids
        self._loaded = loaded

    def encode(self, text: str) -> list[int]:
        """With whatever the checkpoint puts before a text."""
        return list(self._loaded(text)["input_ids"])

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """By the checkpoint's template. Raises ValueError where the template refuses the messages."""
        if self._loaded.chat_template is None:
            return self.encode(plain_chat(messages))
        try:
            text = self._loaded.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates raise what they like
            raise ValueError(f"the checkpoint's chat template refuses them: {error}") from error
        return list(self._loaded(text, add_special_tokens=False)["input_ids"])

    def stream(self) -> TextOf:
        """Text is held back while its last bytes are no whole letter."""
        return _Growing(self._decode)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._loaded.decode(list(ids), skip_special_tokens=True))


class _Growing:
    """Decodes an answer as it grows. A token's text may hang on the one before it (blanks), so pieces are decoded with what preceded."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = self._shown = 0

    def __call__(self, token: int) -> str:
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._shown])
        now = self._decode(self._ids[self._context :])
        if len(now) <= len(before) or now.endswith(_REPLACEMENT):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return now[len(before) :]


def tokenizer_of(pretrained: str | None, vocabulary: int) -> Tokenizer:
    """The checkpoint's tokenizer; bytes where there is no checkpoint, or it brings none.

    Raises:
        UserError: for a tokenizer that cannot be loaded, or a model with too few tokens for bytes.
    """
    if pretrained is None:
        return ByteTokenizer(vocabulary)
    folder = Path(pretrained).expanduser()
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        return ByteTokenizer(vocabulary)
    from transformers import AutoTokenizer, GenerationConfig

    try:
        loaded = AutoTokenizer.from_pretrained(pretrained)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"pretrained: the tokenizer of {pretrained} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    stops = {loaded.eos_token_id}
    try:
        ends = GenerationConfig.from_pretrained(pretrained).eos_token_id
        stops |= set(ends) if isinstance(ends, list) else {ends}
    except OSError:  # most checkpoints have the file, and need not
        pass
    return CheckpointTokenizer(pretrained, loaded, frozenset(stops - {None}))
