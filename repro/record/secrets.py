"""Secrets are kept out of records: whatever looks like one, or stands in the environment as one, is written as `<redacted>`."""

from __future__ import annotations

import os
import re
from typing import Any

REDACTED = "<redacted>"

#: Tokens by their published forms: Hugging Face, OpenAI, AWS, GitHub, Slack, and private keys.
_FORMS = re.compile(
    r"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
#: Shorter values of such variables are too common in other texts.
_SHORTEST = 12


def _of_environment() -> list[str]:
    values = [value for name, value in os.environ.items() if _NAMES.search(name) and len(value) >= _SHORTEST]
    return sorted((value for value in values if "/" not in value), key=len, reverse=True)


def found(text: str) -> bool:
    """Whether a text holds a secret."""
    return bool(_FORMS.search(text)) or any(value in text for value in _of_environment())


def redacted(value: Any) -> Any:
    """Plain values, lists and dictionaries with every secret in their texts taken out."""
    return _redacted(value, _of_environment())


def _redacted(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        value = _FORMS.sub(REDACTED, value)
        for secret in known:
            value = value.replace(secret, REDACTED)
        return value
    if isinstance(value, dict):
        return {key: _redacted(item, known) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(item, known) for item in value]
    return value
