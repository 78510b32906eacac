"""Bodies of the OpenAI-compatible front, and its tokenizers: pure values in, pure values out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from repro.errors import UserError
from repro.serving.openai_bodies import (
    ApiError,
    ChatBody,
    CompletionBody,
    Shape,
    StopText,
    messages_of,
    parsed,
    prompt_of,
    usage_of,
)  # fmt: skip
from repro.serving.tokenizer import ByteTokenizer, _Growing, plain_chat, tokenizer_of


def completion(**values: Any) -> CompletionBody:
    return parsed(msgspec.json.encode({"model": "m", **values}), CompletionBody)


@pytest.mark.parametrize(
    ("given", "expected"), [("text", "text"), ([1, 2], [1, 2]), (["text"], "text"), ([[1, 2]], [1, 2])], ids=str
)
def test_one_prompt_comes_as_text_or_ids_alone_or_in_a_list(given: Any, expected: Any) -> None:
    assert prompt_of(completion(prompt=given)) == expected


@pytest.mark.parametrize("given", ["", [], [1, "a"], [[1], [2]], [True, False], 3], ids=str)
def test_what_is_no_prompt_is_refused(given: Any) -> None:
    if given == "":
        assert prompt_of(completion(prompt=given)) == ""  # a text of no tokens, which is refused for its length
        return
    with pytest.raises(ApiError) as raised:
        prompt_of(completion(prompt=given))
    assert raised.value.param == "prompt"


def test_null_and_neutral_fields_change_nothing() -> None:
    body = completion(prompt="a", n=1, temperature=0.0, stop=None, max_tokens=None, logit_bias={}, top_p=0.5, user="me")
    assert body == completion(prompt="a")


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 2), ("temperature", 1), ("tools", [{"type": "function"}]), ("echo", True), ("logprobs", 5)],
)
def test_what_would_be_ignored_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ApiError, match=f"^{field}: ") as raised:
        completion(prompt="a", **{field: value})
    assert (raised.value.status, raised.value.param) == (400, field)


def test_a_wrong_type_names_its_field() -> None:
    with pytest.raises(ApiError, match=r"messages\[0\]\.role") as raised:
        parsed(b'{"model": "m", "messages": [{"role": 3, "content": "a"}]}', ChatBody)
    assert raised.value.param == "messages[0].role"


def test_messages_may_have_parts_of_text_and_no_others() -> None:
    body = parsed(
        b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}',
        ChatBody,
    )
    assert messages_of(body) == [{"role": "user", "content": "ab"}]
    image = parsed(b'{"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', ChatBody)
    with pytest.raises(ApiError, match=r"messages\[0\]\.content"):
        messages_of(image)


def test_a_stop_text_is_found_across_pieces_and_not_shown() -> None:
    stop = StopText(["END", "STOP"])
    shown = [stop.take(piece) for piece in ("a E", "N", "x EN", "D more")]
    assert ("".join(shown), stop.found) == ("a ENx ", True)


def test_what_might_have_been_a_stop_text_is_shown_at_last() -> None:
    stop = StopText(["END"])
    assert stop.take("an EN") == "an "
    assert (stop.rest(), stop.found) == ("EN", False)


def test_events_and_objects_have_the_forms_of_their_endpoints() -> None:
    usage = usage_of(3, 2)
    assert usage["total_tokens"] == 5
    text = Shape("cmpl-1", "m", 7, chat=False, with_ids=True)
    event = msgspec.json.decode(text.event("a", [4], None, first=True)[6:])
    assert event["choices"] == [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None, "token_ids": [4]}]
    chat = Shape("chatcmpl-1", "m", 7, chat=True)
    first, later = (msgspec.json.decode(chat.event("a", [4], None, first=first)[6:]) for first in (True, False))
    assert (first["object"], first["choices"][0]["delta"]) == (
        "chat.completion.chunk",
        {"role": "assistant", "content": "a"},
    )
    assert later["choices"][0]["delta"] == {"content": "a"}
    assert chat.whole("ab", [4, 5], "length", usage, [1])["choices"][0]["message"] == {
        "role": "assistant",
        "content": "ab",
    }


def test_every_byte_and_every_other_id_shows_at_once() -> None:
    tokenizer = ByteTokenizer(300)
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert [tokenizer.stream()(token) for token in (97, 195, 299)] == ["a", "\ufffd", "<299>"]
    with pytest.raises(UserError, match="vocabulary of 200"):
        ByteTokenizer(200)


def test_a_saved_byte_tokenizer_counts_as_the_server_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ByteTokenizer(512).save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Prefill-as-a-Service\n§ 3.3 — \x00é"
    assert loaded(text)["input_ids"] == ByteTokenizer(512).encode(text)
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.decode([300, 97]) == "<300>a"
    assert len(loaded) == 512


def test_text_waits_for_the_rest_of_a_letter_and_keeps_its_blanks() -> None:
    # As SentencePiece does: a word's blank is seen only behind another token.
    def decode(ids: Any) -> str:
        return bytes(ids).decode(errors="replace").lstrip(" ")

    text_of = _Growing(decode)
    assert [text_of(byte) for byte in " a é".encode()] == ["", "a", " ", "", "é"]


def test_a_checkpoint_without_a_tokenizer_is_served_as_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert tokenizer_of(str(folder), 2048).name == "bytes"
    assert tokenizer_of(None, 256).name == "bytes"


def test_a_checkpoint_with_a_tokenizer_brings_its_template_and_its_end(tmp_path: Path) -> None:
    import json

    ByteTokenizer(512).save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}>"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": template, "eos_token": "<300>"})
    )
    tokenizer = tokenizer_of(str(tmp_path), 512)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat(messages) == list(b"[user]hi>")
    assert tokenizer.stop_ids == {300}
    assert plain_chat(messages) == "user: hi\nassistant: "
    text_of = tokenizer.stream()
    assert "".join(text_of(token) for token in "né".encode()) == "né"
