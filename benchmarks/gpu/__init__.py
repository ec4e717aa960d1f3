"""What a GPU says of the engine: `make bench-gpu`, with no download, on any machine that has PyTorch."""

import os
import sys
from typing import Final

VARIABLE: Final = "BENCH_GPU_PACKAGES"  # where `wheels` unpacked what the machine lacks

# At the end of the search, where PYTHONPATH would come before the machine's own packages.
if os.environ.get(VARIABLE):
    sys.path.append(os.environ[VARIABLE])
