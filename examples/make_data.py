"""The demo's data: scikit-learn's handwritten digits as digits.npz. Real scans of 43 people, 1,797 images of 8x8.

They come with the package, so nothing is downloaded.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

digits = load_digits()
grey = (digits.images * (255 / 16)).round().astype(np.uint8)
np.savez(Path(sys.argv[1]) / "digits.npz", x=grey, y=digits.target)
