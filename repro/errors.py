"""The one exception that a user is meant to read: the command line prints it as a single line, without a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

#: A disk that takes no more. Any other error of the operating system may be of something else than a record.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Bad input. The message names the key or file, what was wrong, and what is accepted."""


def at_least(values: object, node: str, **least: float) -> None:
    """Refuse the first of these fields of `values` that is below its least, by the name that it has under `node`. Raises UserError."""
    for key, accepted in least.items():
        if getattr(values, key) < accepted:
            raise UserError(f"{node}.{key}: {getattr(values, key)}; accepted: {accepted} or more")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, a full disk is a UserError that names the path; the error itself seldom names it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(f"results: {path} cannot be written ({os.strerror(error.errno)})") from error
        raise
