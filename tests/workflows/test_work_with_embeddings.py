"""What people do with embeddings, on planted images: each command finds what was planted, and says where it is."""

import csv

import numpy as np
import pytest
from PIL import Image

from sslvision.errors import DataError, UsageError
from sslvision.workflows import embedding
from sslvision.workflows.clustering import cluster
from sslvision.workflows.finding_duplicates import find_duplicates
from sslvision.workflows.finding_outliers import find_outliers
from sslvision.workflows.searching import search
from sslvision.workflows.selecting import select

SIZE = 48


def picture(number):
    """Return a photograph of smooth colors, another for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def embedded(settings_of, tmp_path_factory):
    """Twenty images and copies of three of them, and their embeddings."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "photos").mkdir()
    for number in range(20):
        picture(number).save(folder / "photos" / f"{number:02d}.png")
    picture(3).resize((96, 96), Image.Resampling.BICUBIC).save(folder / "photos" / "3-larger.png")
    picture(7).save(folder / "photos" / "7-compressed.jpg", quality=60)
    picture(7).save(folder / "photos" / "7-again.png")
    words = (
        "backbone=test_vit",
        "backbone.image_size=32",
        "pretrained=false",
        "data.holdout=0",
        f"data={folder / 'photos'}",
    )
    embedding.embed(settings_of("embed", *words, "device=cpu"), folder / "embedded", words)
    return folder / "embedded"


def table(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_copies_are_found_in_groups_with_a_picture(settings_of, embedded, tmp_path, capsys):
    file = find_duplicates(
        settings_of("duplicates", f"embeddings={embedded}", "threshold=0.99", f"output_dir={tmp_path}")
    )
    groups = {}
    for row in table(file):
        groups.setdefault(row["group"], set()).add(row["path"])
    assert groups["1"] == {"07.png", "7-again.png", "7-compressed.jpg"}
    assert {"03.png", "3-larger.png"} in groups.values()
    assert "could be left out" in capsys.readouterr().out
    with Image.open(tmp_path / "duplicates.png") as sheet:
        assert np.asarray(sheet.convert("L")).std() > 10


def test_an_image_finds_its_copy_first_whether_it_has_an_embedding_or_not(settings_of, embedded, tmp_path):
    words = (f"embeddings={embedded}", "k=3", f"output_dir={tmp_path}", "overwrite=true")
    rows = table(search(settings_of("search", *words, "image=07.png")))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["path"] == "7-again.png"
    picture(3).save(tmp_path / "other.png")
    rows = table(search(settings_of("search", *words, f"image={tmp_path / 'other.png'}")))
    assert rows[0]["path"] == "03.png"
    assert float(rows[0]["similarity"]) == pytest.approx(1, abs=1e-4)
    with pytest.raises(DataError, match=r"image=nowhere\.jpg: there is no such file, and no image of that name"):
        search(settings_of("search", *words, "image=nowhere.jpg"))


def test_images_are_listed_by_their_distance_to_the_nearest_other(settings_of, embedded, tmp_path):
    words = (f"embeddings={embedded}", "k=1", "n=23", f"output_dir={tmp_path}")
    rows = table(find_outliers(settings_of("outliers", *words)))
    assert {rows[-1]["path"], rows[-2]["path"]} == {"07.png", "7-again.png"}  # equal images are the last ones
    assert rows[-1]["nearest"] in ("07.png", "7-again.png")
    assert [float(row["distance"]) for row in rows] == sorted((float(row["distance"]) for row in rows), reverse=True)


def test_a_selection_has_no_copies_and_leaves_out_what_is_labeled(settings_of, embedded, tmp_path):
    words = (f"embeddings={embedded}", "n=15")
    chosen = {row["path"] for row in table(select(settings_of("select", *words, f"output_dir={tmp_path / 'a'}")))}
    assert len(chosen) == 15
    assert len(chosen & {"07.png", "7-again.png", "7-compressed.jpg"}) <= 1
    (tmp_path / "labeled.csv").write_text("path\n07.png\n00.png\n")
    words = (*words, f"labeled={tmp_path / 'labeled.csv'}", f"output_dir={tmp_path / 'b'}")
    chosen = {row["path"] for row in table(select(settings_of("select", *words)))}
    assert not chosen & {"07.png", "7-again.png", "00.png"}
    with pytest.raises(UsageError, match=r"n=90 are more than the 23 images to choose from"):
        select(settings_of("select", f"embeddings={embedded}", "n=90"))


def test_every_image_has_a_cluster_and_copies_share_it(settings_of, embedded, tmp_path):
    rows = table(cluster(settings_of("cluster", f"embeddings={embedded}", "k=4", f"output_dir={tmp_path}")))
    assert len(rows) == 23
    of = {row["path"]: row["cluster"] for row in rows}
    assert of["07.png"] == of["7-again.png"]
    assert set(of.values()) == {"1", "2", "3", "4"}


def test_a_folder_without_embeddings_is_refused_with_the_command_that_makes_them(settings_of, tmp_path):
    with pytest.raises(UsageError, match=r"has no embeddings: make them with sslvision embed"):
        cluster(settings_of("cluster", f"embeddings={tmp_path}"))
