"""Parts `recipe`, a recipe from its command line to its scores, and `trainer`, the speed of its steps under the Trainer."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.on_gpu.findings import DRY, FILES, ROOT, attempt, note, set_up

TRAINER = {"accelerator": "cpu" if DRY else "gpu", "devices": 1}
TINY = ["backbone.depth=1", "backbone.embed_dim=48", "backbone.num_heads=3"]  # of a dry run
SHORT = ["batch_size=5000", "epochs=1", "evaluate_images=100", "knn_every_epochs=0"]
SCORES = ("knn_top1", "linear_top1", "untrained_knn_top1", "training_seconds", "seconds", "findings")


def recipe(name, *words):
    """Run `python -m sslvision.pretrain` with these words, and note scores and times under the name."""
    folder, words = FILES / name.replace("=", "_"), [*words]
    if DRY:
        words += [*SHORT, *TINY, f"trainer.accelerator={TRAINER['accelerator']}"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "sslvision.pretrain", *words, f"output_dir={folder}", "overwrite=true"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "160"},
    )
    seconds = round(time.perf_counter() - began, 1)
    print(done.stdout[-6000:], done.stderr[-4000:], flush=True)
    results = {}
    with contextlib.suppress(OSError, ValueError):
        results = json.loads((folder / "results.json").read_text())
    for file in (folder / "checkpoints").glob("*.ckpt"):  # they would fill the archive
        file.unlink()
    rates = [line.strip() for line in done.stdout.splitlines() if "img/s" in line]
    short = {key: results[key] for key in SCORES if key in results}
    short |= {"code": done.returncode, "end": rates[-1:] or done.stderr[-200:]}
    note(name, {"short": short, "wall_s": seconds, "results": results})
    if done.returncode:
        sys.exit(done.returncode)


def trainer(recipes="mae_gpu,dino_gpu", steps="300"):
    """Time steps under the Trainer: where they take longer than in `bench`, the host, the loader or a callback is why."""
    set_up()
    for name in recipes.split(","):
        attempt(f"{name}, under the Trainer", steps_of, name, 6 if DRY else int(steps))


def steps_of(recipe, steps):
    from sslvision.cli.compose import compose_settings
    from sslvision.workflows.pretraining import open_splits

    words = [*TINY, "batch_size=64", f"trainer.accelerator={TRAINER['accelerator']}"] if DRY else []
    settings = compose_settings([f"recipe={recipe}", *words])
    return under_trainer(settings, open_splits(settings.data), steps)


def under_trainer(settings, splits, steps):
    """Return images per second of training as a run does it."""
    from whole_run import train

    with tempfile.TemporaryDirectory() as folder:
        found = train(settings, splits, Path(folder), steps=steps, options=TRAINER)
    return {
        "img/s": round(found["images_per_second"], 1),
        "ms": round(found["ms"], 3),
        "batch": settings.batch_size,
        "steps": found["steps"],
    }
