"""Runs that continue from weights: whose backbone it is, what stands still first, and whether it gets better or worse."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from sslvision.backbones.build import build_backbone
from sslvision.backbones.load import backbone_of_weights, load_backbone
from sslvision.cli.compose import compose_settings
from sslvision.errors import UsageError
from sslvision.methods.mae import MAE
from sslvision.runs.metrics import read_metrics
from sslvision.training.callbacks.continued import Continued
from sslvision.workflows import pretraining

# As tiny as the runs of conftest.py.
WORDS = [
    *("data=digits", "batch_size=296", "epochs=2", "evaluate_images=50", "knn_every_epochs=1", "warmup_epochs=1"),
    *("trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1"),
]
OF = {
    "mae": ["recipe=mae_continue", "decoder_embed_dim=16", "decoder_depth=1", "decoder_num_heads=2"],
    "dino": [
        *("recipe=dino_continue", "prototypes=64", "hidden=32", "bottleneck=16", "local_crops=2", "local_size=16"),
    ],
}


@pytest.fixture(scope="session")
def keep_on(tiny_run):
    """Continue from the tiny run, by default of the method it was made with: keep_on(folder, words, method=) -> results."""

    def run(folder, *words, method="mae"):
        settings = compose_settings([*OF[method], *WORDS, f"init_from={tiny_run}", *words])
        return pretraining.pretrain(settings, folder, words)

    return run


@pytest.fixture(scope="module")
def kept_on(keep_on, tmp_path_factory):
    folder = tmp_path_factory.mktemp("continued") / "run"
    keep_on(folder)
    return folder


def test_the_backbone_is_that_of_the_weights(tiny_run, kept_on):
    settings = yaml.safe_load((kept_on / "config.yaml").read_text())["backbone"]
    assert settings == backbone_of_weights(tiny_run)
    assert {"image_size": 32, "embed_dim": 32, "depth": 1, "patch_size": 8, "pool": "avg"}.items() <= settings.items()
    built = build_backbone(**settings, channels=1).model.state_dict()
    assert {name: value.shape for name, value in built.items()} == {
        name: value.shape for name, value in load_backbone(tiny_run).backbone.model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_small_patch14_dinov2.lvd142m", {"name": "vit_small_patch14_dinov2.lvd142m", "image_size": 518}),
        ("vit_base_patch16_224.mae", {"name": "vit_base_patch16_224.mae", "image_size": 224}),
        ("resnet50.a1_in1k", {"name": "resnet50.a1_in1k", "image_size": 224}),
    ],
)
def test_of_a_name_of_timm_the_backbone_and_its_image_size_are_known_without_a_download(name, expected):
    assert backbone_of_weights(name) == expected


def test_without_weights_a_recipe_that_names_no_backbone_says_what_to_give():
    with pytest.raises(UsageError, match=r"names no backbone: give backbone.name, .* or init_from"):
        compose_settings(["recipe=mae_continue", "data=embedded"])


def test_the_score_of_the_start_is_measured_first_and_stands_beside_the_last(tiny_run, kept_on):
    results, metrics = json.loads((kept_on / "results.json").read_text()), read_metrics(kept_on / "metrics.csv")
    measured = [step for step, score in zip(metrics["step"], metrics["knn_top1"], strict=True) if score is not None]
    assert measured[:3] == [0, 4, 8]
    end_of_the_start = json.loads((tiny_run / "results.json").read_text())
    for score in ("knn_top1", "linear_top1"):  # the same network on the same images
        assert results[f"start_{score}"] == pytest.approx(end_of_the_start[score], abs=0.3)


@pytest.mark.parametrize("method", ["mae", pytest.param("dino", marks=pytest.mark.thorough)])
def test_while_the_backbone_is_frozen_only_the_rest_learns(method, keep_on, tiny_run, tmp_path):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "export_and_evaluate", lambda *_: {})
        keep_on(
            folder,
            "freeze_backbone_epochs=2",
            "freeze_prototypes_epochs=0" if method == "dino" else "lr=0.1",
            method=method,
        )
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    start = load_backbone(tiny_run).backbone.model.state_dict()
    for prefix in {"mae": ["backbone.model."], "dino": ["student.backbone.model.", "teacher.backbone.model."]}[method]:
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        assert own.keys() == start.keys()
        assert [name for name in start if not torch.equal(own[name], start[name])] == []


class Measured:
    """An evaluation with given scores, one for each epoch."""

    def __init__(self, *scores, images=2000, labeled=True):
        self.labeled, self.evaluated, self.scores = labeled, [(None, []), (None, range(images))], scores
        self.measured, self.measured_at = {}, -1

    def run(self, continued, trainer, method):
        for epoch, score in enumerate(self.scores):
            trainer.global_step, trainer.current_epoch = 4 * epoch, epoch - 1
            self.measured = {"knn_top1" if self.labeled else "rankme": score}
            self.measured_at = trainer.global_step
            method.pretrained().model.cls_token.data.fill_(epoch)
            (continued.on_train_epoch_end if epoch else continued.on_train_start)(trainer, method)


def continued_through(*scores, **about):
    from rich.console import Console

    measured = Measured(*scores, **about)
    console = Console(record=True, width=1000, quiet=False)
    continued = Continued(measured, console)
    backbone = build_backbone("vit_tiny_patch16_224", image_size=32, embed_dim=32, depth=1, num_heads=2, patch_size=8)
    method = MAE(backbone, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    trainer = SimpleNamespace(global_step=0, current_epoch=0, is_global_zero=True, callback_metrics={})
    measured.run(continued, trainer, method)
    return continued, console.export_text()


@pytest.mark.parametrize(
    ("scores", "told", "best"),
    [
        ((70.0, 71.0, 72.0), False, 2),
        ((70.0, 68.0, 71.0), False, 2),  # within the noise of 2,000 images, 2.9
        ((70.0, 72.0, 71.5), False, 1),
        ((70.0, 72.0, 60.0, 55.0), True, 1),
        ((70.0, 66.0, 71.0), True, 2),  # told while it happens, though it recovers
        ((70.0, 20.0), True, 0),
    ],
)
def test_a_fall_beyond_noise_is_told_once_while_it_happens_and_the_best_weights_are_kept(scores, told, best):
    continued, printed = continued_through(*scores)
    assert printed.count("is below that of the weights the run started from") == told
    assert (continued.best, continued.improved_until_the_end) == (best, best == len(scores) - 1)
    assert (continued.weights["model.cls_token"] == best).all()
    if told:
        assert f"{scores[0]:.1f} % at the start" in printed
        assert "freeze_backbone_epochs" in printed


def test_the_fewer_images_the_larger_the_noise():
    noises = [continued_through(70.0, images=images)[0].noise for images in (10, 100, 2000, 50_000)]
    assert noises == sorted(noises, reverse=True)
    assert noises[2] == pytest.approx(200 * (2 * 0.7 * 0.3 / 2000) ** 0.5)
    assert continued_through(0.0, images=10)[0].noise > 0


def test_without_labels_rankme_is_compared():
    continued, printed = continued_through(30.0, 29.0, 20.0, labeled=False)
    assert "RankMe is below that of the weights the run started from: 20.0 after epoch 2, 30.0 at the start" in printed
    assert continued.best == 0


def test_a_resumed_run_knows_its_start_and_its_best_weights():
    continued, _ = continued_through(70.0, 72.0, 60.0)
    resumed = Continued(Measured())
    resumed.load_state_dict(continued.state_dict())
    assert (resumed.scores, resumed.best) == (continued.scores, continued.best)
    assert torch.equal(resumed.weights["model.cls_token"], continued.weights["model.cls_token"])
    assert resumed.found


def test_a_run_that_gets_worse_exports_its_best_weights_beside_its_last(keep_on, tmp_path):
    results = keep_on(tmp_path / "run", "lr=1.0", "freeze_backbone_epochs=0")
    (finding,) = [one for one in results["findings"] if "below that of the weights" in one]
    assert "exported to export-best/" in finding
    assert results["best_knn_top1"] > results["knn_top1"]
    best, last = (
        load_backbone(tmp_path / "run" / name).backbone.model.state_dict() for name in ("export-best", "export")
    )
    assert not torch.equal(best["cls_token"], last["cls_token"])
    assert "export-best" in (tmp_path / "run" / "README.md").read_text()
