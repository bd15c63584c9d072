"""The sample's modules are scripts beside each other; tests find them as the demo and the pipeline's stages do."""

import sys
from pathlib import Path

SAMPLE = Path(__file__).resolve().parents[1]
for folder in (SAMPLE / "training", SAMPLE):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
