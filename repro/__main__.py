"""`python -m repro`."""

import sys

try:
    from repro.app import main
except KeyboardInterrupt:  # while importing; once that is done, `main` says it
    print("error: interrupted", file=sys.stderr)
    sys.exit(130)

sys.exit(main())
