"""`python -m repro.bench <name> [arguments]` runs one benchmark."""

import importlib
import sys
from pathlib import Path

from repro.errors import UserError


def main(argv: list[str]) -> int:
    """Dispatch to repro/bench/<name>.py."""
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    if not argv or argv[0] not in known:
        print(
            f"error: benchmark: {argv[0] if argv else 'none'} does not exist; accepted: {', '.join(known)}",
            file=sys.stderr,
        )
        return 2
    try:
        return int(importlib.import_module(f"repro.bench.{argv[0]}").main(argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
