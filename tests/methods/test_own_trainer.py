"""Methods in a script: a Trainer, callbacks and a DataLoader of one's own, and methods from their checkpoints."""

import sys
import warnings
from pathlib import Path

import pytest
import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.methods.supervised import Supervised

VIT = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def backbone(**options):
    return build_backbone("vit_tiny_patch16_224", image_size=32, **VIT, **options)


def small_mae(**options):
    return MAE(backbone(), decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, warmup_epochs=0, **options)


def small_dino(**options):
    sizes = {"prototypes": 16, "hidden": 8, "bottleneck": 4, "local_crops": 1, "local_size": 16, "warmup_epochs": 0}
    return DINO(backbone(), **sizes, **options)


def pixels(count=24, size=40):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def trainer(folder, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{"max_epochs": 2, **quiet, **options})


def fit(fitting, method, loader):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers and logging
        fitting.fit(method, loader)


def same(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_example_of_the_manual_trains_and_returns_its_best_checkpoint(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import own_trainer

        method = own_trainer.fit(str(tmp_path))
    sys.modules.pop("own_trainer")
    assert type(method) is MAE
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in method.state_dict().items())
    assert method.decoder_embed.out_features == 64


@pytest.mark.thorough
@pytest.mark.parametrize("build", [small_mae, small_dino])
@pytest.mark.parametrize(
    "batches",
    [
        lambda images: TensorDataset(images),
        lambda images: TensorDataset(images / 255, torch.zeros(len(images))),
        lambda images: [{"image": image, "name": "x"} for image in images],
        lambda images: list(images),
    ],
    ids=["uint8 in a tuple", "floats with labels", "dictionary", "alone"],
)
def test_batches_of_any_usual_form_train_and_floats_give_the_same_as_bytes(build, batches, tmp_path):
    losses = []
    for dataset in (batches(pixels()), TensorDataset(pixels())):
        torch.manual_seed(0)
        method, fitting = build(lr=1e-3), trainer(tmp_path)
        fit(fitting, method, DataLoader(dataset, batch_size=8))
        losses.append(float(fitting.callback_metrics["loss"]))
    assert losses[0] == losses[1]


def test_each_image_gets_another_mask_in_every_epoch(tmp_path, monkeypatch):
    seen, views = [], MAE.views

    def look(self, batch, rng):
        found = views(self, batch, rng)
        seen.append(found[1])
        return found

    monkeypatch.setattr(MAE, "views", look)
    fit(trainer(tmp_path), small_mae(), DataLoader(TensorDataset(pixels()), batch_size=8))
    noise = torch.cat(seen)
    assert noise.shape == (48, 16)
    assert len(noise.unique(dim=0)) == 48


def test_the_monitored_loss_is_the_mean_of_the_epoch_however_seldom_the_log_is_written(tmp_path):
    losses = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            losses.append(float(module.latest["loss"]))

    best, fitting = ModelCheckpoint(tmp_path, monitor="loss"), trainer(tmp_path, Watch(), log_every_n_steps=50)
    fitting.callbacks.append(best)
    fit(fitting, small_mae(lr=1e-2), DataLoader(TensorDataset(pixels()), batch_size=8))
    means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
    assert float(fitting.callback_metrics["loss"]) == pytest.approx(means[1], rel=1e-5)
    assert float(best.best_model_score) == pytest.approx(min(means), rel=1e-5)


def test_early_stopping_on_the_loss_ends_training(tmp_path):
    fitting = trainer(tmp_path, EarlyStopping("loss", patience=1, min_delta=100.0), max_epochs=20)
    fit(fitting, small_mae(), DataLoader(TensorDataset(pixels()), batch_size=8))
    assert fitting.current_epoch == 2


def test_training_goes_on_from_a_checkpoint_of_ones_own_trainer_as_if_it_had_not_stopped(tmp_path):
    loader = DataLoader(TensorDataset(pixels()), batch_size=8)
    torch.manual_seed(0)
    whole = small_mae(lr=1e-3)
    fit(trainer(tmp_path, max_epochs=2), whole, loader)
    torch.manual_seed(0)
    first, saved = small_mae(lr=1e-3), ModelCheckpoint(tmp_path, filename="epoch-{epoch}", save_top_k=-1)
    fit(trainer(tmp_path, saved, max_epochs=2), first, loader)
    again = small_mae(lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path).fit(again, loader, ckpt_path=tmp_path / "epoch-epoch=0.ckpt", weights_only=True)
    assert same(again, whole)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(8, 3, 32, 32) * 4 - 2, r"float32 of shape \(8, 3, 32, 32\) with values from -2.*ToTensor"),
        (torch.zeros(8, 1, 32, 32, dtype=torch.uint8), r"shape \(8, 1, 32, 32\): give images \(B, 3, H, W\)"),
        (torch.zeros(8, 32, 32, 3, dtype=torch.uint8), r"shape \(8, 32, 32, 3\): give images"),
        (torch.zeros(8, 3, 32, 32, dtype=torch.int64), "int64 of shape"),
    ],
)
def test_batches_that_are_no_images_are_refused_in_words(images, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        fit(trainer(tmp_path), small_mae(), DataLoader(TensorDataset(images), batch_size=8))


def test_a_method_loads_from_the_last_checkpoint_of_a_run(tiny_run):
    method = MAE.load_from_checkpoint(tiny_run / "checkpoints" / "last.ckpt")
    content = torch.load(tiny_run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in method.state_dict().items())
    assert method.mask_ratio == content["sslvision"]["settings"]["method"]["mask_ratio"]
    assert method.normalize.mean.tolist() != [0.5]


def test_a_checkpoint_of_an_earlier_version_is_built_from_the_settings_of_its_run(tiny_run, tmp_path):
    content = torch.load(tiny_run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(
        {key: value for key, value in content.items() if key not in ("method", "hyper_parameters")}, tmp_path / "a"
    )
    one, other = (
        MAE.load_from_checkpoint(tmp_path / "a"),
        MAE.load_from_checkpoint(tiny_run / "checkpoints" / "last.ckpt"),
    )
    assert same(one, other)
    assert one.mask_ratio == other.mask_ratio


def test_dino_and_a_classifier_load_with_their_settings_and_others_replace_them(tmp_path):
    classifier = Supervised(backbone(), classes=["ant", "bee"], labels=torch.tensor([0, 1]), ema=0.9)
    for method in (small_dino(momentum=0.9), classifier):
        fitting = trainer(tmp_path)
        fitting.strategy.connect(method)
        method.trainer = fitting
        fitting.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
        loaded = type(method).load_from_checkpoint(tmp_path / "x.ckpt", lr=0.25)
        assert same(loaded, method)
        assert loaded.hparams["lr"] == 0.25
    assert loaded.classes == ("ant", "bee")


def test_a_checkpoint_of_another_method_or_of_none_is_refused_with_what_to_use(tiny_run, tmp_path):
    with pytest.raises(UsageError, match=r"is a checkpoint of MAE: use MAE\.load_from_checkpoint"):
        DINO.load_from_checkpoint(tiny_run / "checkpoints" / "last.ckpt")
    torch.save({"model": {"cls_token": torch.zeros(1)}}, tmp_path / "mae.pth")
    with pytest.raises(UsageError, match=r"no checkpoint of a method.*from_official"):
        MAE.load_from_checkpoint(tmp_path / "mae.pth")
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "bare.ckpt")
    with pytest.raises(UsageError, match=r"what its backbone is: give backbone="):
        MAE.load_from_checkpoint(tmp_path / "bare.ckpt")
    with pytest.raises(UsageError, match="do not fit"):
        MAE.load_from_checkpoint(tmp_path / "bare.ckpt", backbone=backbone())


def test_settings_that_are_not_plain_are_left_out_of_a_checkpoint_so_that_it_loads_without_trust(tmp_path):
    import numpy as np

    method, fitting = small_mae(mean=np.array([0.1, 0.2, 0.3])), trainer(tmp_path)
    fitting.strategy.connect(method)
    method.trainer = fitting
    fitting.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    loaded = MAE.load_from_checkpoint(tmp_path / "x.ckpt")
    assert "mean" not in torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    assert loaded.normalize.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("lion", {}, "Lion"),
        ("sgd", {"momentum": 0.9}, "SGD"),
        ("lamb", {}, "Lamb"),
        ("muon", {"momentum": 0.9}, "Muon"),
        ("adamw", {"eps": 1e-6}, "AdamW"),
    ],
)
def test_any_timm_optimizer_pretrains_under_the_methods_schedule(name, options, kind, tmp_path):
    method, fitting = small_mae(lr=1e-3, optimizer=name, optimizer_options=options), trainer(tmp_path)
    before = method.decoder_pred.weight.detach().clone()
    fit(fitting, method, DataLoader(TensorDataset(pixels()), batch_size=8))
    (optimizer,) = fitting.optimizers
    assert type(optimizer).__name__ == kind
    assert all(optimizer.param_groups[0][key] == value for key, value in options.items())
    assert [group["weight_decay"] for group in optimizer.param_groups][-2:] == [0.05, 0.0]
    assert not torch.equal(before, method.decoder_pred.weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adamv"}, "optimizer=adamv is not one of timm's. Near it: adam"),
        ({"optimizer": "sgd", "optimizer_options": {"moment": 1}}, "sgd has no option moment"),
        ({"optimizer": "adahessian"}, "second derivatives"),
        ({"optimizer_options": {"lr": 1}}, "adamw has no option lr"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_when_the_method_is_built(options, words):
    with pytest.raises(UsageError, match=words):
        small_dino(**options)
