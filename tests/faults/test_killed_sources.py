"""A run on a list, a table or shards that is killed at random moments ends as one that never was, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from sslvision.workflows.packing import pack

pytestmark = [pytest.mark.faults, pytest.mark.slow]
KILLS = 10
COUNT = 240


@pytest.fixture(scope="module")
def place(settings_of, tmp_path_factory):
    """A folder with the same images as photos/, photos.csv, shards/ and, if `datasets` is there, table/."""
    place, rng = tmp_path_factory.mktemp("killed"), np.random.default_rng(0)
    names = [f"photos/{('cat', 'dog')[number % 2]}/{number:03d}.png" for number in range(COUNT)]
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 28, 3), dtype=np.uint8)).save(place / name)
    (place / "photos.csv").write_text("path,label\n" + "".join(f"{name},{name.split('/')[1]}\n" for name in names))
    words = [f"data={place / 'photos'}", "data.channels=3", "shard_size=20", "workers=0"]
    pack(settings_of("pack", *words, f"output_dir={place / 'shards'}"))
    return place


def as_table(place):
    datasets = pytest.importorskip("datasets")
    rows = [{"image": {"bytes": file.read_bytes(), "path": None}} for file in sorted((place / "photos").rglob("*.png"))]
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(place / "table")


SOURCES = {
    "list": ["data=photos.csv"],
    "hf": ["data=hf", "data.path=table"],
    "webdataset": ["data=webdataset", "data.urls=shards", "data.index_dir=index"],
    "windows": ["data=webdataset", "data.urls=shards", "data.index_dir=index", "data.window=3"],
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_killed_at_ten_random_moments_ends_as_one_that_never_was(source, place, tiny_settings):
    if source == "hf":
        as_table(place)
    more = ["backbone.image_size=16", "data.channels=3", "data.workers=2", "batch_size=20", "epochs=6"]
    more += ["checkpoint_every_steps=1", "knn_every_epochs=0", "evaluate_images=20", "data.normalize=imagenet"]
    given = {word.split("=")[0] for word in ["data=", *more]}
    tiny = [*(word for word in tiny_settings("mae") if word.split("=")[0] not in given), *more]
    words = [sys.executable, "-m", "sslvision.pretrain", "recipe=mae", *SOURCES[source], *tiny]
    whole, broken = place / f"{source}-whole", place / f"{source}-broken"
    subprocess.run([*words, f"output_dir={whole}"], cwd=place, check=True, capture_output=True)
    rng, steps = random.Random(source), 6 * (int(COUNT * 0.95) // 20)
    for moment in sorted(rng.sample(range(1, steps), KILLS)):
        kill_after(moment, [*words, f"output_dir={broken}", "resume=auto"], place, broken, rng)
    done = subprocess.run([*words, f"output_dir={broken}", "resume=auto"], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, broken))
    assert one["global_step"] == other["global_step"] == steps
    assert [
        name for name in one["state_dict"] if not torch.equal(one["state_dict"][name], other["state_dict"][name])
    ] == []
    assert (whole / "metrics.csv").read_bytes() == (broken / "metrics.csv").read_bytes()


def kill_after(update, words, place, folder, rng):
    """Start a run, and kill it and its workers some milliseconds after it has saved an update."""
    process = subprocess.Popen(
        words, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while saved(folder) < update:
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.05))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def saved(folder):
    """Return the update of the newest checkpoint; 0 if there is none."""
    try:
        return int(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])
    except Exception:  # it is being replaced
        return 0
