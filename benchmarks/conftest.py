"""Lets pytest import the package from the source folder when it is not installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
