"""Pictures inside a page: files as data URIs, recompressed where they are large, so that a report stays small."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

SMALL = 150_000  # bytes: such a PNG is embedded as it is
MOST_BYTES = 2_000_000  # of all pictures of a page together, before base64
NARROWEST = 500  # pixels: no picture is made narrower


def encode_pictures(files: Mapping[str, Path], most_bytes: int = MOST_BYTES) -> tuple[dict[str, str], list[str]]:
    """Return pictures as data URIs by their names, and what there is to say: which cannot be read, and which are reduced."""
    found, told, scale = dict[str, str](), list[str](), 1.0
    while True:
        found, told = {}, []
        for name, file in files.items():
            try:
                found[name] = _data_uri(file, scale)
            except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged files
                told.append(f"{file.name} cannot be shown: {error}")
        if sum(map(len, found.values())) * 3 / 4 <= most_bytes or scale < 0.2:
            break
        scale *= 0.8
    if scale < 1:
        told.append("The pictures are reduced here to keep this file small; the run folder has them in full.")
    return found, told


def _data_uri(file: Path, scale: float) -> str:
    content = file.read_bytes()
    with Image.open(io.BytesIO(content)) as opened:
        image, kind = opened.copy(), "png"
        if len(content) > SMALL or scale < 1:
            shown: Image.Image = image.convert("RGB")
            width = max(round(shown.width * scale), min(NARROWEST, shown.width))
            if width < shown.width:
                shown = shown.resize(
                    (width, max(1, round(shown.height * width / shown.width))), Image.Resampling.LANCZOS
                )
            written = io.BytesIO()
            shown.save(written, "WEBP", quality=88, method=4)
            if written.tell() < len(content):
                content, kind = written.getvalue(), "webp"
        else:
            image.load()  # raises if the file is damaged
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def picture(uri: str, *, name: str, caption: str) -> str:
    """Return a figure of a picture."""
    return (
        f'<figure><div class="picture"><img src="{escape(uri)}" alt="{escape(name)}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def pictures(encoded: Mapping[str, str], captions: Mapping[str, str], names: Sequence[str]) -> str:
    """Return figures of those pictures that there are, with their captions."""
    return "".join(
        picture(
            encoded[name], name=name.replace("_", " "), caption=captions.get(name, name.replace("_", " ").capitalize())
        )
        for name in names
        if name in encoded
    )
