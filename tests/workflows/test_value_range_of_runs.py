"""The value range of a run's images: recorded by pretraining, and used by what comes after it."""

import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from sslvision.cli.compose import compose_settings
from sslvision.cli.recipes import PREDICT, PROBE
from sslvision.workflows import predicting
from sslvision.workflows.predicting import predict_to_csv


@pytest.fixture(scope="module")
def infrared(tmp_path_factory):
    """Return a folder of 12-bit images in 16-bit files, in two classes."""
    root = tmp_path_factory.mktemp("data") / "infrared"
    rng = np.random.default_rng(0)
    for number in range(24):
        where = root / f"class{number % 2}"
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 4096, (20, 24)).astype(np.uint16)).save(where / f"{number}.png")
    return root


@pytest.mark.thorough
def test_the_range_is_kept_in_the_config_and_in_the_exports_and_used_by_every_command(
    infrared, run_tiny, settings_of, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    data = ("data=folder", f"data.root={infrared}", "data.channels=1", "data.workers=0")
    run_tiny(run, *data, "batch_size=8", "epochs=1", "warmup_epochs=0", "backbone.image_size=16", "data.holdout=0.2")
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["value_range"] == [0, 4095]
    assert json.loads((run / "export" / "config.json").read_text())["value_range"] == [0, 4095]
    assert compose_settings([f"run={run}"], PROBE).data["value_range"] == [0, 4095]  # the data of the run itself

    from sslvision.workflows.finetuning import finetune

    words = (
        f"run={run}",
        *data[:2],
        "data.workers=0",
        "data.holdout=0.2",
        "epochs=0",
        "min_updates=1",
        "scratch=false",
    )
    words += ("batch_size=8", "evaluations=1", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false")
    finetune(settings_of("finetune", *words), tmp_path / "tuned", words)
    assert json.loads((tmp_path / "tuned" / "export" / "config.json").read_text())["value_range"] == [0, 4095]

    sources = []
    rows = predicting.predict
    monkeypatch.setattr(predicting, "predict", lambda *given, **more: sources.append(given[3]) or rows(*given, **more))
    words = [f"run={tmp_path / 'tuned'}", f"images={infrared}", "workers=0", "device=cpu", "top=1"]
    predict_to_csv(compose_settings(words, PREDICT))
    (source,) = sources
    assert source.value_range.integers == (0, 4095)
    assert len(source.read(0).unique()) > 100
    images_of_another_sensor_are_told(tmp_path)


def images_of_another_sensor_are_told(folder):
    """Ask for predictions of images unlike those of the fine-tuned run, and follow the advice that is printed."""
    rng = np.random.default_rng(0)
    images = {
        "eight": rng.integers(0, 256, (20, 24)).astype(np.uint8),
        "dim": rng.integers(0, 256, (20, 24)).astype(np.uint16),
        "bright": rng.integers(0, 65536, (20, 24)).astype(np.uint16),
        "floats": rng.random((20, 24)).astype(np.float32),
    }
    words = [f"run={folder / 'tuned'}", "workers=0", "device=cpu", "top=1", "overwrite=true"]
    told = {}
    for name, pixels in images.items():
        where = folder / name
        where.mkdir()
        np.save(where / "a.npy", pixels)
        settings = compose_settings([*words, f"images={where}", f"output={folder / name}.csv"], PREDICT)
        source = predicting.open_images(where, channels=1)
        told[name] = " ".join(predicting.look_at_values(source, settings))
    assert (
        "1 images looked at have 8 bits and stay as they are, so that value_range=[0,4095] has no effect"
        in told["eight"]
    )
    assert "fewer than 32 gray levels" in told["dim"]
    assert "set value_range=[0,255]." in told["dim"]
    assert re.search(r"9\d % of the values are beyond", told["bright"])
    assert "a median of 1: their values span little of value_range=[0,4095]" in told["floats"]
    advised = re.search(r"set (value_range=\S+)\.$", told["floats"])[1]
    settings = compose_settings([*words, f"images={folder / 'floats'}", advised], PREDICT)
    source = predicting.open_images(folder / "floats", channels=1)
    assert "fewer than" not in " ".join(predicting.look_at_values(source, settings))
    assert len(source.read(0).unique()) > 100
