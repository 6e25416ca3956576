"""python -m stablevelocity, the same as `svel`."""

import sys

from .cli import main

sys.exit(main())
