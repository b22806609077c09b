"""Where things are, from any test."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "tests" / "reference"  # figures of the published implementation
