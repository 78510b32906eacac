"""The argument parser of the tools: a mistake is one line, as everywhere on the command line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from repro.errors import UserError


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` whose mistakes are `UserError`s, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse what was given."""
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")
