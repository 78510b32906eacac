"""`python -m repro`."""

import sys

from repro.app import main

sys.exit(main())
