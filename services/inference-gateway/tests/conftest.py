"""Makes this folder's `gateway` and `models` modules importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
