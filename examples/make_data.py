"""The demo's data, from packages that are installed anyway: no download.

Writes glyphs.h5 (letters of many scripts, rendered from matplotlib's fonts: classes to meta-train on) and digits.npz
(scikit-learn's handwritten digits: real scans of 43 people, 1,797 images of 8x8 pixels, never seen in meta-training).
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from stages.artifacts.files import atomic_write
from stages.artifacts.hdf5 import encode
from stages.data.synthetic import Glyphs, glyphs


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    letters = glyphs(Glyphs(size=28))
    atomic_write(folder / "glyphs.h5", encode(letters))
    digits = load_digits()
    grey = (digits.images * (255 / 16)).round().astype(np.uint8)
    np.savez(folder / "digits.npz", x=grey, y=digits.target)
    print(f"{len(letters)} glyphs of {len(letters.names or ())} letters, {len(grey)} handwritten digits")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out"))
