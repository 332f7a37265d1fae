"""What the commands' tests make their scans and manifests with lies in the rooms' own folders."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in ("ct", "cases")]
