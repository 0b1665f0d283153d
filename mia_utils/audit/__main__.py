"""``python -m mia_utils.audit``."""

import sys

from mia_utils.audit.cli import main

sys.exit(main())
