"""`python -m samplewise` is the command `samplewise`."""

import sys

from .cli.main import main

sys.exit(main())
