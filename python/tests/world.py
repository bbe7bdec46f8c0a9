"""What the tests agree on: where the repository is, and how large their model is."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS, HEADS, DIM = 3, 2, 32
