"""search, duplicates, outliers, select and cluster: from a folder of embeddings to a CSV file and a contact sheet."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from written_embeddings import write_embeddings

from sslvision.cli.commands import work
from sslvision.cli.compose import compose_runs
from sslvision.cli.recipes import COMMANDS
from sslvision.cli.words import split_words
from sslvision.errors import DataError, UsageError
from sslvision.workflows import finding_duplicates, searching

COLORS = {"blue": (20, 40, 200), "green": (20, 180, 40), "red": (220, 30, 30)}


def run(name, folder, *words):
    """Run a command on embeddings, and return its CSV file and the rows of it."""
    (one,) = compose_runs(split_words([f"embeddings={folder}", "device=cpu", *words]), COMMANDS[name])
    file = work(one, [])()
    with open(file, newline="") as opened:
        return file, [*csv.DictReader(opened)]


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """Sixty images of three colors, and embeddings that are their mean colors; blue/00 and red/19 are copies."""
    folder = tmp_path_factory.mktemp("colors") / "photos"
    rng, names, embeddings = np.random.default_rng(0), [], []
    for color, mean in COLORS.items():
        (folder / color).mkdir(parents=True)
        for number in range(20):
            names.append(f"{color}/{number:02d}.png")
            embeddings.append(np.array(mean) + rng.normal(size=3) * 10)
    embeddings[0], embeddings[59] = embeddings[1], embeddings[58]
    for name, one in zip(names, embeddings, strict=True):
        Image.new("RGB", (40, 30), tuple(one.clip(0, 255).astype(int))).save(folder / name)
    splits = ["test" if name.endswith("00.png") else "train" for name in names]
    labels = [name.partition("/")[0] for name in names]
    made = np.array(embeddings, np.float32)
    write_embeddings(folder.parent / "embedded", made, names=names, labels=labels, splits=splits, root=str(folder))
    return folder.parent / "embedded"


def has_colors(file, *colors):
    """Return whether a picture has pixels near each of these colors."""
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    return all((abs(pixels - np.array(COLORS[color])).max(axis=2) < 40).sum() > 500 for color in colors)


def test_search_finds_the_nearest_of_an_embedded_image_but_not_itself(colors):
    file, rows = run("search", colors, "image=green/07.png", "k=5")
    assert file == colors / "search-07" / "nearest.csv"
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert {row["label"] for row in rows} == {"green"}
    assert "green/07.png" not in [row["path"] for row in rows]
    similarities = [float(row["similarity"]) for row in rows]
    assert similarities == sorted(similarities, reverse=True)
    assert has_colors(file.with_suffix(".png"), "green")
    assert not has_colors(file.with_suffix(".png"), "red")


def test_search_by_a_file_that_has_no_embedding_encodes_it(colors, tmp_path, monkeypatch):
    Image.new("RGB", (10, 10), COLORS["red"]).save(tmp_path / "new.png")

    def mean_colors(opened, images):
        return opened.rows.unit(torch.stack([image.float().mean(dim=(1, 2)) for image in images]))

    monkeypatch.setattr(searching, "encode", mean_colors)
    root = colors.parent / "photos"
    words = (f"image={tmp_path / 'new.png'},{root / 'blue' / '00.png'}", "k=3", f"output_dir={tmp_path / 'out'}")
    _, rows = run("search", colors, *words)
    assert [row["label"] for row in rows] == ["red"] * 3 + ["blue"] * 3
    assert rows[3]["path"] == "blue/01.png"
    assert float(rows[3]["similarity"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([], UsageError, "image is not given"),
        (["image=nowhere.png"], DataError, r"image=nowhere\.png: there is no such file.* 60 with embeddings"),
        (["image=red/00.png,red/00.png"], UsageError, "is given twice"),
        (["image=red/00.png", "k=0"], UsageError, "k=0 is too small"),
    ],
)
def test_what_cannot_be_searched_is_refused(words, error, message, colors):
    with pytest.raises(error, match=message):
        run("search", colors, *words)


def test_duplicates_are_grouped_and_those_across_splits_are_told(colors, capsys):
    file, rows = run("duplicates", colors, "threshold=0.999999", "center=true", "pixels=-1")
    assert [(row["group"], row["path"]) for row in rows] == [
        ("1", "blue/00.png"),
        ("1", "blue/01.png"),
        ("2", "red/18.png"),
        ("2", "red/19.png"),
    ]
    told = capsys.readouterr().out
    assert "1 group has images in more than one split" in told
    assert "2 groups of near-duplicates" in told
    assert has_colors(file.with_suffix(".png"), "blue", "red")
    assert not has_colors(file.with_suffix(".png"), "green")


def test_the_pixels_tell_copies_from_images_with_similar_embeddings(tmp_path, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        picture = coarse.resize((90, 60), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "photos" / f"{number}.png")
    Image.open(tmp_path / "photos" / "2.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
        tmp_path / "photos" / "2-mirrored.jpg"
    )
    Image.open(tmp_path / "photos" / "4.png").resize((45, 30)).save(tmp_path / "photos" / "4-small.png")
    names = sorted(file.name for file in (tmp_path / "photos").iterdir())
    alike = (np.ones((8, 5)) + 0.05 * rng.normal(size=(8, 5))).astype(np.float32)
    folder = write_embeddings(tmp_path / "a", alike, names=names, root=str(tmp_path / "photos"))
    _, rows = run("duplicates", folder)
    assert {row["path"] for row in rows if row["group"] == "1"} == {"2.png", "2-mirrored.jpg"}
    assert {row["path"] for row in rows if row["group"] == "2"} == {"4.png", "4-small.png"}
    assert len(rows) == 4
    assert len(run("duplicates", folder, "pixels=-1")[1]) == 8
    for file in (tmp_path / "photos").iterdir():
        file.unlink()
    assert len(run("duplicates", folder)[1]) == 8
    assert "8 images cannot be read any more, and are judged by the embedding alone" in capsys.readouterr().out


def test_without_duplicates_the_file_has_no_rows_and_there_is_no_picture(colors, tmp_path, monkeypatch):
    monkeypatch.setattr(finding_duplicates, "similar_pairs", lambda *_, **__: (np.empty((0, 2), int), np.empty(0), 1.0))
    file, rows = run("duplicates", colors, f"output_dir={tmp_path}")
    assert rows == []
    assert not file.with_suffix(".png").exists()


def test_the_outlier_is_the_image_that_is_like_no_other(tmp_path):
    rng = np.random.default_rng(0)
    made = rng.normal(size=(200, 4)) * 0.05 + np.repeat(np.eye(4), 50, axis=0)
    made[77] = [-1, -1, 1, -1]
    write_embeddings(tmp_path, made.astype(np.float32))
    file, rows = run("outliers", tmp_path, "n=7", "k=5")
    assert rows[0]["path"] == "77.png"
    assert float(rows[0]["distance"]) > 3 * float(rows[1]["distance"])
    assert len(rows) == 7
    assert file.with_suffix(".png").exists()
    with pytest.raises(UsageError, match="k=200 neighbors are more than the 199 other images"):
        run("outliers", tmp_path, "k=200")


@pytest.mark.parametrize("by", ["cover", "clusters"])
def test_three_selected_images_have_the_three_colors(by, colors, tmp_path, capsys):
    file, rows = run("select", colors, "n=3", f"by={by}", "split=train", f"output_dir={tmp_path}")
    assert {row["label"] for row in rows} == {*COLORS}
    assert {row["split"] for row in rows} == {"train"}
    assert "They have 3 of 3 classes" in " ".join(capsys.readouterr().out.split())
    assert has_colors(file.with_suffix(".png"), *COLORS)


def test_the_next_selection_avoids_what_is_labeled(colors, tmp_path):
    file, first = run("select", colors, "n=2", f"output_dir={tmp_path / 'a'}")
    _, second = run("select", colors, "n=1", f"labeled={file}", f"output_dir={tmp_path / 'b'}")
    assert {row["label"] for row in first + second} == {*COLORS}
    _, rest = run("select", colors, "n=58", f"labeled={file}", f"output_dir={tmp_path / 'c'}")
    assert not {row["path"] for row in rest} & {row["path"] for row in first}


def test_a_selection_that_cannot_be_is_refused(colors, tmp_path):
    (tmp_path / "labels.csv").write_text("image\na.png\n")
    with pytest.raises(UsageError, match=r"labels\.csv has no column `path`; its columns are image"):
        run("select", colors, f"labeled={tmp_path / 'labels.csv'}")
    (tmp_path / "labels.csv").write_text("path\na.png\n")
    with pytest.raises(UsageError, match=r"none of its 1 paths has an embedding; the first is a\.png"):
        run("select", colors, f"labeled={tmp_path / 'labels.csv'}")
    with pytest.raises(UsageError, match="n=4 are more than the 3 images to choose from"):
        run("select", colors, "split=test", "n=4")


def test_clusters_are_the_colors(colors, capsys):
    file, rows = run("cluster", colors, "k=3")
    of = {color: {row["cluster"] for row in rows if row["label"] == color} for color in COLORS}
    assert all(len(clusters) == 1 for clusters in of.values())
    assert len(set.union(*of.values())) == 3
    assert len(rows) == 60
    assert "100.0% of the labeled images" in " ".join(capsys.readouterr().out.split())
    assert has_colors(file.with_suffix(".png"), *COLORS)


def test_earlier_results_are_kept_unless_they_shall_be_replaced(colors):
    first, _ = run("outliers", colors, "n=3")
    second, _ = run("outliers", colors, "n=4")
    assert [file.parent.name for file in (first, second)] == ["outliers", "outliers-2"]
    again, rows = run("outliers", colors, "n=5", "overwrite=true")
    assert (again, len(rows)) == (first, 5)
    with pytest.raises(UsageError, match="exists: replace it with overwrite=true"):
        run("outliers", colors, f"output_dir={first.parent}")


def test_images_that_are_gone_are_crossed_out_and_told(colors, tmp_path, capsys):
    write_embeddings(tmp_path / "a", np.eye(6, dtype=np.float32), root=str(tmp_path / "gone"))
    file, rows = run("select", tmp_path / "a", "n=3")
    assert len(rows) == 3
    assert file.with_suffix(".png").exists()
    assert "The picture lacks images" in capsys.readouterr().out


def test_images_of_a_data_set_in_memory_are_drawn(tmp_path):
    from sslvision.data.sources.digits import open_digits

    test = open_digits().test
    names = [test.describe(number) for number in range(12)]
    write_embeddings(
        tmp_path,
        test.images[:12].flatten(1).numpy().astype(np.float32),
        names=names,
        splits=["test"] * 12,
        channels=1,
        root="",
        data={"_target_": "sslvision.data.sources.digits.open_digits"},
    )
    file, rows = run("search", tmp_path, f"image={names[3]}", "k=4", f"output_dir={tmp_path / 'out'}")
    assert len(rows) == 4
    pixels = np.asarray(Image.open(file.with_suffix(".png")).convert("L"))
    assert (pixels < 20).sum() > 5000


@pytest.mark.thorough
def test_a_new_image_is_encoded_by_the_network_that_made_the_embeddings(tiny_run, settings_of, tmp_path):
    from sslvision.data.sources.digits import open_digits
    from sslvision.workflows.embedding import embed

    words = (f"run={tiny_run}", "split=test", "device=cpu", "format=npz")
    embed(settings_of("embed", *words), tmp_path / "a", words)
    picture = Image.fromarray(open_digits().test.images[5, 0].numpy())
    picture.save(tmp_path / "new.png")
    _, rows = run("search", tmp_path / "a", f"image={tmp_path / 'new.png'}", "k=2")
    assert rows[0]["path"] == open_digits().test.describe(5)
    assert float(rows[0]["similarity"]) == pytest.approx(1, abs=1e-4)
    about = (tmp_path / "a" / "embeddings.json").read_text()
    (tmp_path / "a" / "embeddings.json").write_text(about.replace('"weights": "', '"weights": "0'))
    with pytest.raises(UsageError, match="are not those that made these embeddings"):
        run("search", tmp_path / "a", f"image={tmp_path / 'new.png'}")
