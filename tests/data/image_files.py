"""Images, and what of them the tests compare."""

import io

import numpy as np

RED, WHITE = (255, 0, 0), (255, 255, 255)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def color(tensor, row=0, column=0):
    return tuple(tensor[:, row, column].tolist())
