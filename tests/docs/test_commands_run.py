"""Every command that the README and the manual show is run: on tiny images and networks, and for a few updates."""

import itertools
import shutil

import numpy as np
import pytest
from docs.test_examples import PAGES, commands
from PIL import Image

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.slow

NOT_RUN = {  # what cannot be run on one machine without a network, and why
    "trainer.devices=8": "eight GPUs",
    "slurm.time=": "a cluster; tests/slurm has one",
    "init_from=vit_small_patch": "weights from the network",
    "vit_small_patch14_dinov2": "weights from the network",
    "mae_pretrain_vit_base": "a file of the authors",
    "init_from=mae.pth": "a file of the authors",
    "s3://bucket": "a bucket; tests/data/sources/test_bucket.py has one",
    "https://host": "a server; tests/data/test_remote_shards.py has one",
    "data.path=ylecun/mnist": "a set from the network",
    "data.name=CIFAR10": "a set from the network",
    "-{000000..000146}.tar": "many shards; the folder of the same page has one",
}
RUN_ALL_THE_SAME = "dry_run=plan"  # of any number of devices
CPU = ["trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.enable_progress_bar=false"]
TINY = ["backbone.embed_dim=32", "backbone.depth=1", "backbone.num_heads=2", "batch_size=8", "evaluate_images=50"]
OF_METHOD = {
    "mae": ["decoder_embed_dim=16", "decoder_num_heads=2"],
    "dino": ["prototypes=64", "hidden=32", "bottleneck=16", "local_crops=2"],
}
FEW_UPDATES = ["epochs=0", "min_updates=2", "evaluations=1"]
COMPARED = ["labels_per_class=[1,2]", "seeds=1", "lr_ratios=[1.0]", "scratch_longer=2"]


def shortened(name, words):
    """Return the words with those settings that make them tiny and short, in place of their own."""
    line = " ".join(words)
    method = "dino" if "recipe=dino" in line else "mae"
    if name == "pretrain" and "resume=auto" not in words and "dry_run=plan" not in words:
        short = [*TINY, *OF_METHOD[method], *CPU, "dry_run=true"]
    elif name == "finetune":
        short = [*FEW_UPDATES, *CPU, *(COMPARED if "recipe=compare" in words else [])]
    elif name == "tune":
        tiny = [*TINY, *OF_METHOD[method]] if "run=" not in line else []
        short = [*tiny, *CPU[:2], "epochs=1", "budget=45s", *(["trials=2"] if "search=" in line else [])]
    elif name == "scale":
        length = [] if "dry_run=true" in words else ["budget=90s"]
        short = [*TINY, *OF_METHOD[method], *CPU[:2], *length, "rungs=4", "factor=1.5"]
    elif name == "inspect":
        short = ["batch_size=1"]
    else:
        short = []
    if name in ("probe", "embed", "segment", "predict", "inspect"):
        short.append("device=cpu")
    keys = {word.split("=")[0] for word in short}
    return [word for word in words if word.split("=")[0] not in keys] + short


def draw(file, *, size=(64, 64), seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(file)


@pytest.fixture(scope="module")
def prepared(warm_command, tmp_path_factory):
    """A folder with the images and runs that the pages speak of."""
    folder = tmp_path_factory.mktemp("manual")
    numbers = itertools.count()
    for kind, number in itertools.product(("cat", "dog", "owl"), range(20)):
        draw(folder / "photos" / kind / f"{number}.png", seed=next(numbers))
        for part in ("train", "val"):
            draw(folder / "labeled" / part / kind / f"{number}.png", seed=next(numbers))
    for number in range(6):
        draw(folder / "new_photos" / f"{number}.jpg", seed=next(numbers))
    for number in range(24):
        draw(folder / "spectrograms" / f"{number}.png", size=(512, 64), seed=next(numbers))
        draw(folder / "roads" / f"{number}.png", size=(128, 64), seed=next(numbers))
        for part in ("train", "val"):
            draw(folder / "scenes" / "images" / part / f"{number}.png", seed=next(numbers))
            mask = np.kron(np.eye(2, dtype=np.uint8), np.ones((32, 32), np.uint8))
            (folder / "scenes" / "masks" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / "scenes" / "masks" / part / f"{number}.png")
    draw(folder / "photo.jpg")
    shutil.copytree(folder / "photos", folder / "other")
    shutil.make_archive(str(folder / "photos"), "zip", folder / "photos")
    names = [path.relative_to(folder / "photos") for path in sorted((folder / "photos").rglob("*.png"))]
    rows = [{"path": str(name), "species": name.parent.name} for name in names]
    (folder / "images.csv").write_text("\n".join(["path", *(f"photos/{name}" for name in names)]) + "\n")
    images = [{"bytes": (folder / "photos" / name).read_bytes(), "path": str(name)} for name in names]
    for file, content in (("train", rows[::2]), ("val", rows[1::2]), ("flowers", [{"image": one} for one in images])):
        parquet.write_table(pyarrow.Table.from_pylist(content), folder / f"{file}.parquet")
    begun = [*TINY, *OF_METHOD["mae"], *CPU, "max_steps=4"]
    for name in ("mae", "a"):
        run(warm_command, folder, "pretrain", ["recipe=mae", f"name={name}", *begun])
    begun_dino = [*TINY, *OF_METHOD["dino"], *CPU, "max_steps=4"]
    run(warm_command, folder, "pretrain", ["recipe=dino", "name=dino", *begun_dino])
    run(warm_command, folder, "pretrain", ["recipe=mae_photos", "data.root=photos", "name=first", *begun])
    run(warm_command, folder, "embed", ["run=outputs/first", "data.root=photos", "output_dir=outputs/embedded"])
    run(warm_command, folder, "pack", ["data=folder", "data.root=photos", "data.channels=3", "output_dir=shards"])
    tuned = ["run=outputs/first", "data=folder", "data.root=labeled", *FEW_UPDATES, *CPU]
    for name in ("classifier", "photos"):
        run(warm_command, folder, "finetune", [*tuned, f"name={name}"])
    return folder


def run(call, folder, name, words):
    done = call(*words, cwd=folder, of=name, timeout=600)
    assert done.returncode == 0, (name, words, done.stdout[-3000:], done.stderr[-3000:])


def shown():
    """Yield each command of each page once, as a parameter of a test."""
    seen = set()
    for page in PAGES:
        for name, words in commands(page):
            line = " ".join([name, *words])
            left_out = [why for part, why in NOT_RUN.items() if part in line and RUN_ALL_THE_SAME not in line]
            if line not in seen and not left_out:
                yield pytest.param(name, words, id=f"{page.stem}: {line}")
            seen.add(line)


@pytest.mark.parametrize(("name", "words"), list(shown()))
def test_a_command_that_is_shown_runs(name, words, prepared, warm_command, tmp_path):
    folder = tmp_path / "here"
    shutil.copytree(prepared, folder)
    if name == "pack":
        shutil.rmtree(folder / "shards")
    if name == "embed":
        shutil.rmtree(folder / "outputs" / "embedded")
    if name == "finetune" and (named := [word for word in words if word.startswith("name=")]):
        shutil.rmtree(folder / "outputs" / named[0].removeprefix("name="))
    run(warm_command, folder, name, shortened(name, words))


def test_what_is_not_run_is_still_shown():
    lines = [" ".join([name, *words]) for page in PAGES for name, words in commands(page)]
    assert [part for part in NOT_RUN if not any(part in line for line in lines)] == []
