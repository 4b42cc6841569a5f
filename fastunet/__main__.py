"""``python -m fastunet`` is the ``fastunet`` command."""

import sys

from fastunet.cli import main

if __name__ == "__main__":
    sys.exit(main())
