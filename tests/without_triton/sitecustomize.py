"""Python imports this when it starts: from then on ``import triton`` fails and ``find_spec`` finds nothing."""

import sys

sys.modules["triton"] = None
