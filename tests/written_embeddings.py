"""A folder of embeddings, written without a network."""

import json

from sslvision.embeddings import parts
from sslvision.embeddings.parts import Rows, part_file, write_part


def write_embeddings(folder, embeddings, *, form="npz", per_part=100, names=None, labels=None, splits=None, **about):
    """Write a folder of embeddings (N, D), as `embed` does."""
    count = len(embeddings)
    names, splits = names or [f"{row}.png" for row in range(count)], splits or ["train"] * count
    described = {
        "key": "abc",
        "format": form,
        "images": count,
        "images_per_part": per_part,
        "dim": embeddings.shape[1],
        "dtype": str(embeddings.dtype),
        "channels": 3,
        "root": str(folder),
        "data": {"_target_": "sslvision.data.sources.folder.open_folder", "root": str(folder)},
        "command": "python -m sslvision.embed run=a",
        **about,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "embeddings.json").write_text(json.dumps(described))
    for number in range(parts.number_of_parts(described)):
        of = slice(number * per_part, (number + 1) * per_part)
        rows = Rows(names[of], splits[of], labels and labels[of], None, None, embeddings[of])
        write_part(part_file(folder, number, form), rows)
    return folder
