"""``python -m pgworker_client`` is the command ``pgworker``."""

import sys

from pgworker_client.cli import main

sys.exit(main())
