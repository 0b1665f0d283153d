"""``python -m mia_utils.audit`` is ``mia-audit``."""

import sys

from mia_utils.audit.cli import main

if __name__ == "__main__":
    sys.exit(main())
