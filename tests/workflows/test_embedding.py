"""Embeddings in files: what is in them, and that an interruption neither loses nor doubles a row."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from sslvision.backbones.load import load_backbone
from sslvision.data.sources.digits import open_digits
from sslvision.embeddings.parts import read_part
from sslvision.errors import DataError, UsageError
from sslvision.evaluation.features import extract_features
from sslvision.nn.normalize import Normalize
from sslvision.workflows import embedding, encoding_parts

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def embed(settings_of):
    """Write embeddings: embed(folder, "run=...", ...) -> results."""
    return lambda folder, *words: embedding.embed(settings_of("embed", *words, "device=cpu"), folder, words)


@pytest.fixture(scope="module")
def of_digits(embed, tiny_run, tmp_path_factory):
    """The embeddings of all digits by the tiny run, four parts of them; leave them as they are."""
    folder = tmp_path_factory.mktemp("embedded") / "digits"
    embed(folder, f"run={tiny_run}", "images_per_part=500", "format=parquet")
    return folder


def rows_of(folder):
    """Return all rows of a folder as (path, split, label), and the embeddings (N, D)."""
    parts = [read_part(file) for file in sorted((folder / "embeddings").iterdir())]
    rows = [
        row
        for part in parts
        for row in zip(part.paths, part.splits, part.labels or [""] * len(part.paths), strict=True)
    ]
    return rows, np.concatenate([part.embeddings for part in parts])


@pytest.fixture
def photos(tmp_path):
    """A folder of a dozen images without classes, one of them broken."""
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for number in range(12):
        picture = Image.fromarray(open_digits().test.images[number, 0].numpy())
        picture.save(tmp_path / "photos" / "deep" / f"{number:02d}.png")
    (tmp_path / "photos" / "deep" / "05.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_a_row_has_the_feature_of_its_image_and_its_label(of_digits, tiny_run):
    rows, embeddings = rows_of(of_digits)
    loaded, digits = load_backbone(tiny_run), open_digits()
    start = 0
    for split, source in (("train", digits.train), ("test", digits.test)):
        _, features = extract_features(loaded.backbone, Normalize(loaded.mean, loaded.std), source, range(len(source)))
        of_split = slice(start, start := start + len(source))
        assert {row[1] for row in rows[of_split]} == {split}
        assert [int(row[2]) for row in rows[of_split]] == source.labels.tolist()
        np.testing.assert_allclose(embeddings[of_split], features.numpy(), atol=1e-5)
    assert start == len(rows)
    assert rows[0][0] == digits.train.describe(0)
    assert embeddings.dtype == np.float32


def test_parquet_files_are_read_by_pyarrow_as_one_table_of_fixed_size_lists(of_digits):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(of_digits / "embeddings")
    rows, embeddings = rows_of(of_digits)
    assert table.column_names == ["path", "split", "label", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), embeddings.shape[1])
    assert table["path"].to_pylist() == [path for path, _, _ in rows]
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), embeddings)


def test_npz_files_in_float16_hold_the_same(embed, of_digits, tiny_run, tmp_path):
    embed(tmp_path / "a", f"run={tiny_run}", "format=npz", "dtype=float16", "split=test")
    (file,) = (tmp_path / "a" / "embeddings").iterdir()
    rows, embeddings = rows_of(of_digits)
    chosen = [number for number, row in enumerate(rows) if row[1] == "test"]
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays["embedding"].dtype == np.float16
        np.testing.assert_allclose(arrays["embedding"], embeddings[chosen], rtol=2e-3, atol=2e-3)
        assert arrays["path"].tolist() == [rows[number][0] for number in chosen]
        assert arrays["label"].tolist() == [rows[number][2] for number in chosen]


def test_an_interrupted_command_goes_on_without_making_a_part_again(embed, of_digits, tiny_run, tmp_path, monkeypatch):
    words = (f"run={tiny_run}", "images_per_part=500", "format=parquet", "batch_size=300")
    real, written = encoding_parts.write_part, []

    def fail_at_the_third(file, rows):
        if len(written) == 2:
            raise KeyboardInterrupt
        real(file, rows)
        written.append(file)

    monkeypatch.setattr(encoding_parts, "write_part", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        embed(tmp_path / "a", *words)
    before = [file.stat().st_mtime_ns for file in written]
    monkeypatch.setattr(encoding_parts, "write_part", real)
    assert not (tmp_path / "a" / "results.json").exists()
    results = embed(tmp_path / "a", *words)
    assert results["images"] == 1797
    assert [file.stat().st_mtime_ns for file in written] == before
    whole, again = rows_of(of_digits), rows_of(tmp_path / "a")
    assert again[0] == whole[0]
    np.testing.assert_allclose(again[1], whole[1], atol=1e-5)


def test_a_damaged_part_is_made_again(embed, of_digits, tiny_run, tmp_path):
    words = (f"run={tiny_run}", "split=test", "images_per_part=200", "format=parquet")
    embed(tmp_path / "a", *words)
    file = sorted((tmp_path / "a" / "embeddings").iterdir())[1]
    kept = file.read_bytes()
    file.write_bytes(kept[: len(kept) // 2])
    embed(tmp_path / "a", *words)
    assert len(rows_of(tmp_path / "a")[0]) == 599


def test_images_that_cannot_be_read_are_named_and_paths_are_relative_to_the_folder(embed, tiny_run, photos, tmp_path):
    results = embed(tmp_path / "a", f"run={tiny_run}", f"data={photos}", "images_per_part=4", "data.holdout=0")
    assert (results["images"], results["unreadable"], results["files"]) == (11, 1, 3)
    rows, _ = rows_of(tmp_path / "a")
    assert rows == [(f"deep/{number:02d}.png", "train", "") for number in range(12) if number != 5]
    assert (tmp_path / "a" / "unreadable.csv").read_text().startswith('path,problem\ndeep/05.png,"the content is not')
    assert any("1 of 12 images (8.33 %) cannot be read" in finding for finding in results["findings"])


def test_a_part_of_unreadable_images_only_is_an_empty_file(embed, tiny_run, photos, tmp_path):
    for number in range(8, 12):
        (photos / "deep" / f"{number:02d}.png").write_bytes(b"no image")
    embed(tmp_path / "a", f"run={tiny_run}", f"data={photos}", "images_per_part=4", "data.holdout=0")
    assert len(rows_of(tmp_path / "a")[0]) == 7
    for number in range(12):
        (photos / "deep" / f"{number:02d}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"None of 12 images can be read; the first: deep/00\.png"):
        embed(tmp_path / "b", f"run={tiny_run}", f"data={photos}", "images_per_part=4", "data.holdout=0")


def test_a_classifier_also_predicts(embed, photos, tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    timm.models.save_for_hf(
        model,
        tmp_path / "export",
        model_config={
            "num_classes": 3,
            "label_names": ["ant", "bee", "cat"],
            "model_args": {"img_size": 32},
            "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
        },
        safe_serialization=True,
    )
    embed(tmp_path / "a", f"run={tmp_path / 'export'}", f"data={photos}", "data.holdout=0")
    (file,) = (tmp_path / "a" / "embeddings").iterdir()
    rows = read_part(file)
    images = torch.stack(
        [torch.from_numpy(np.array(Image.open(photos / path).convert("RGB"))).permute(2, 0, 1) for path in rows.paths]
    )
    with torch.no_grad():
        shares = model((images / 255 - 0.5) / 0.5).softmax(dim=1)
    assert rows.predictions == [["ant", "bee", "cat"][index] for index in shares.argmax(dim=1).tolist()]
    np.testing.assert_allclose(rows.probabilities, shares.amax(dim=1).numpy(), atol=1e-4)


def test_any_timm_model_is_a_backbone(embed, photos, tmp_path):
    words = ("backbone=test_vit", "backbone.image_size=32", "pretrained=false", "data.holdout=0", f"data={photos}")
    results = embed(tmp_path / "a", *words)
    assert (results["images"], results["weights"]) == (11, "random")
    embed(tmp_path / "b", *words, "seed=1")
    assert not np.allclose(rows_of(tmp_path / "a")[1], rows_of(tmp_path / "b")[1])


def test_embeddings_of_other_weights_or_images_are_not_mixed(embed, tiny_run, photos, tmp_path):
    words = (f"run={tiny_run}", f"data={photos}", "data.holdout=0")
    embed(tmp_path / "a", *words)
    with pytest.raises(UsageError, match=r"a holds other embeddings: dtype differ\. .*overwrite=true"):
        embed(tmp_path / "a", *words, "dtype=float16")
    listed = tmp_path / "images.csv"
    for labels in ("cat", "dog"), ("dog", "cat"):
        files = sorted(photos.rglob("*.*"))[:4]
        rows = (f"{file},{labels[number % 2]}\n" for number, file in enumerate(files))
        listed.write_text("path,label\n" + "".join(rows))
        of_list = (f"run={tiny_run}", "data=list", f"data.file={listed}", "data.holdout=0")
        if labels[0] == "cat":
            embed(tmp_path / "listed", *of_list)
            continue
        with pytest.raises(UsageError, match=r"other embeddings: the labels differ"):
            embed(tmp_path / "listed", *of_list)
    Image.new("L", (32, 32)).save(photos / "new.png")
    with pytest.raises(UsageError, match=r"other embeddings: the images differ"):
        embed(tmp_path / "a", *words)
    assert embed(tmp_path / "a", *words, "overwrite=true")["images"] == 12


def test_without_pyarrow_the_files_are_npz_and_parquet_is_refused_with_what_to_install(
    embed, tiny_run, photos, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    words = (f"run={tiny_run}", f"data={photos}", "data.holdout=0")
    with pytest.raises(UsageError, match=r'format=parquet needs pyarrow: pip install "sslvision\[embed\]"'):
        embed(tmp_path / "a", *words, "format=parquet")
    assert embed(tmp_path / "a", *words)["format"] == "npz"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run is not given: say run=.* or backbone=NAME"),
        (["backbone=test_vit"], "No images: test_vit has no data of its own"),
        (["run=a", "backbone=test_vit", "data=digits"], "run=a and backbone.name=test_vit are two backbones"),
        (["run=nowhere", "data=digits"], "run=nowhere is nothing to load"),
        (
            ["backbone=test_vit", "pretrained=false", "data=digits", "split=validation"],
            "split=validation: the data have no",
        ),
        (["backbone=test_vit", "data=digits", "dtype=float64"], "dtype=float64 is unknown"),
        (["backbone=test_vit", "data=digits", "resume=a.ckpt"], "resume=a.ckpt: embeddings are resumed in their own"),
    ],
)
def test_what_cannot_be_embedded_is_refused(words, message, embed, tmp_path):
    with pytest.raises(UsageError if "split" not in message else DataError, match=message):
        embed(tmp_path / "a", *words)
    assert not (tmp_path / "a").exists()


@pytest.mark.e2e
def test_two_processes_give_the_rows_of_one_and_one_goes_on_where_two_were_stopped(
    of_digits, embed, tiny_run, tmp_path
):
    words = [f"run={tiny_run}", "images_per_part=500", "format=parquet", "device=cpu", "output_dir=two"]
    done = subprocess.run(
        [*TORCHRUN, "-m", "sslvision.embed", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    whole, two = rows_of(of_digits), rows_of(tmp_path / "two")
    assert two[0] == whole[0]
    np.testing.assert_allclose(two[1], whole[1], atol=1e-5)
    (tmp_path / "two" / "embeddings" / "part-00001.parquet").unlink()
    embed(tmp_path / "two", *words[:-2])
    assert rows_of(tmp_path / "two")[0] == whole[0]


@pytest.mark.e2e
@pytest.mark.faults
def test_a_killed_process_leaves_whole_parts_and_the_same_command_ends_with_every_row_once(
    of_digits, tiny_run, tmp_path
):
    words = [f"run={tiny_run}", "images_per_part=20", "batch_size=20", "format=parquet", "device=cpu", "output_dir=a"]
    call = [sys.executable, "-m", "sslvision.embed", *words]
    parts = tmp_path / "a" / "embeddings"
    for number, signum in enumerate((signal.SIGKILL, signal.SIGTERM)):
        process = subprocess.Popen(call, cwd=tmp_path, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and len([*parts.glob("part-*")]) < 5 + 20 * number:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signum)
        _, told = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 143)
    assert "The files that are written are kept, and the same command goes on: python -m sslvision.embed" in told
    kept = {file: file.stat().st_mtime_ns for file in parts.glob("part-*")}
    assert 25 <= len(kept) < 90
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} of 90 files are there already" in done.stdout
    assert all(file.stat().st_mtime_ns == time_ for file, time_ in kept.items())
    rows = rows_of(tmp_path / "a")
    assert rows[0] == rows_of(of_digits)[0]
    np.testing.assert_allclose(rows[1], rows_of(of_digits)[1], atol=1e-5)
    assert not [name for name in os.listdir(parts) if name.endswith(".tmp")]
    assert json.loads((tmp_path / "a" / "results.json").read_text())["images"] == 1797
