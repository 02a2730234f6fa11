"""A method, a data source and a recipe as a user writes them, outside the package; docs/extending.md quotes these files."""

import csv
import importlib
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from sslvision.backbones.build import build_backbone
from sslvision.cli.check_settings import parameters
from sslvision.methods.base import Clock
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.nn import compilation

FILES = Path(__file__).parent / "own_method"
SMALL = ["batch_size=8", "data.workers=0", "features=32", "predictor_hidden=8", "backbone.image_size=32"]
SMALL += ["trainer.accelerator=cpu", "evaluate_images=32", "overwrite=true", "output_dir=run"]
VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder: the three files, and 32 images of two classes with a CSV file."""
    folder = tmp_path_factory.mktemp("own")
    for file in FILES.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    rows = [("path", "label")]
    for index in range(32):
        pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray((pixels // (1 + index % 2)).numpy()).save(folder / f"{index}.png")
        rows.append((f"{index}.png", ("bright", "dark")[index % 2]))
    with (folder / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture
def simsiam(monkeypatch):
    """Build the user's method on a small ViT, in this process."""
    monkeypatch.syspath_prepend(FILES)
    module = importlib.import_module("simsiam")

    def build():
        torch.manual_seed(0)
        sizes = {"features": 32, "predictor_hidden": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
        return module.SimSiam(build_backbone(**VIT), lr=0.1, **sizes).train()

    return build


def test_a_method_and_a_source_of_ones_own_train_by_the_command_line(folder, warm_command):
    files = ["recipe=simsiam.yaml", "data.file=images.csv", "data.test_file=images.csv"]
    done = warm_command(*files, *SMALL, "dry_run=true", cwd=folder, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    run = next(path for path in folder.iterdir() if path.name.startswith("run"))
    assert (run / "export" / "model.safetensors").is_file()
    assert ",spread" in (run / "metrics.csv").read_text()
    groups = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    peak = 0.05 * 8 / 256
    for group in groups:
        assert (group["lr"] == peak) == bool(group.get("constant_lr"))  # the scheduled rate is below its peak by now
        assert group["weight_decay"] == (1e-4 if group["decayed"] else 0)


def test_a_typo_in_a_setting_of_ones_own_method_is_named(folder, warm_command):
    wrong = [word.replace("predictor_hidden", "predictor_hiden") for word in SMALL]
    done = warm_command("recipe=simsiam.yaml", "data.file=images.csv", *wrong, cwd=folder, PYTHONPATH=str(folder))
    assert done.returncode == 2
    assert "predictor_hiden" in done.stderr + done.stdout
    assert "Did you mean method.predictor_hidden?" in done.stderr + done.stdout


class Extended(MAE):
    """A method that passes the settings of another on."""

    def __init__(self, backbone, *, extra: int = 1, **options):
        super().__init__(backbone, mask_ratio=0.6, **options)


class Open(MAE):
    """A method with settings of any name."""

    def __init__(self, backbone, **options):
        super().__init__(backbone)
        self.options = options


def test_settings_that_a_subclass_passes_on_are_those_of_its_base():
    known = set(parameters(Extended))
    assert known == (set(parameters(MAE)) | {"extra"}) - {"mask_ratio"}
    assert None in parameters(Open)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo reads it and hides the warning
def test_heads_of_ones_own_method_are_compiled_without_a_line_for_it(simsiam, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    plain, method = simsiam(), simsiam()
    assert method.compilable_modules() == [method.projector, method.predictor]
    method.compile_blocks()
    assert [*method.state_dict()] == [*plain.state_dict()]
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    losses = [one.losses(views, Clock(0, 4, 2))["loss"] for one in (plain, method)]
    assert torch.allclose(*losses, atol=1e-6)
    for loss in losses:
        loss.backward()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(parameter.grad, method.get_parameter(name).grad, atol=1e-5), name
    torch._dynamo.reset()


def test_dinos_heads_are_found_and_maes_decoder_by_its_blocks(simsiam):
    dino = DINO(build_backbone(**VIT), prototypes=16, hidden=16, bottleneck=8, local_size=32)
    assert dino.compilable_modules() == [dino.student["head"], dino.teacher["head"]]
    mae = MAE(build_backbone(**VIT), decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=1)
    assert mae.compilable_modules() == list(mae.decoder_blocks)
