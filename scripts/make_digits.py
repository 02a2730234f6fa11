"""Make the package's file of digits from the copy that scikit-learn brings along.

    python scripts/make_digits.py

Needs scikit-learn (pip install scikit-learn), which the package itself does not. The images and labels are those of
`sklearn.datasets.load_digits`, in its order; their source and license are in sslvision/data/NOTICE.
"""

import argparse
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parents[1] / "sslvision" / "data" / "sources" / "digits.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=TARGET)
    options = parser.parse_args()
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise SystemExit("This script needs scikit-learn: pip install scikit-learn.") from None
    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)  # (N, 8, 8) in 0..16, (N,)
    if not (images == digits.images).all():
        raise SystemExit("The images are not the whole numbers from 0 to 16 that they used to be.")
    np.savez_compressed(options.target, images=images, labels=labels)
    print(f"{options.target}: {len(images):,} images, {options.target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
