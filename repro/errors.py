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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within, a full disk is a UserError that names the path; the error itself seldom names it."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(f"results: {path} cannot be written ({os.strerror(error.errno)})") from error
        raise
