"""The training of one classifier: how long it is, how fast it learns, and what it starts from."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.batchnorm import _BatchNorm

from sslvision.data.source import UnreadableImage
from sslvision.data.subsets import Subset
from sslvision.nn.normalize import Normalize
from sslvision.training.trainer import resolve_machine
from sslvision.workflows.classifier_training import (
    adapt_batch_norms,
    build_classifier,
    build_network,
    count_updates,
    fit_head,
    from_scratch,
    plan_training,
)
from sslvision.workflows.labeled_data import open_labeled_data, pretraining_base_lr, untrained_backbone


def planned(settings, labeled, *, pretrained=True):
    """The plan of a fine-tuning with these settings."""
    machine = resolve_machine(settings.trainer)
    options = {"folder": Path("unused"), "lr_ratio": 0.1, "seed": 0, "pretrained": pretrained, "head_first": False}
    return plan_training(settings, labeled, machine, **options)


@pytest.fixture
def resnet(settings_of):
    """A small ResNet and its labeled images: resnet("freeze=0.5") -> settings, labeled, method."""

    def made(*words):
        timm = ("run=test_resnet", "backbone.pretrained=false", "backbone.image_size=32", "backbone.channels=1")
        settings = settings_of("finetune", *timm, "data=digits", *words)
        labeled = open_labeled_data(settings)
        return settings, labeled, build_classifier(planned(settings, labeled), labeled)

    return made


def norms_of(method):
    return [module for module in method.backbone.modules() if isinstance(module, _BatchNorm)]


@pytest.mark.thorough
def test_norms_that_train_take_the_images_statistics_and_frozen_ones_keep_theirs(resnet):
    _, labeled, method = resnet("freeze=0.5")
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms_of(method)]
    assert adapt_batch_norms(method.backbone, labeled, seed=0)
    for (mean, variance), norm in zip(before, norms_of(method), strict=True):
        frozen = not any(parameter.requires_grad for parameter in norm.parameters())
        assert torch.equal(norm.running_mean, mean) == frozen
        assert torch.equal(norm.running_var, variance) == frozen
        assert norm.momentum == pytest.approx(0.1)
    seen = []
    norm = next(norm for norm in norms_of(method) if any(p.requires_grad for p in norm.parameters()))
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean((0, 2, 3))))
    with torch.no_grad():
        method.backbone.eval()(Normalize(labeled.mean, labeled.std)(labeled.train.images))
    torch.testing.assert_close(norm.running_mean, seen[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("broken", "adapts"), [(1, True), (15, False)])
def test_images_that_cannot_be_read_leave_norms_the_statistics_of_the_others_or_their_own(
    resnet, monkeypatch, broken, adapts
):
    settings, labeled, method = resnet("labels_per_class=2", "holdout=0")  # 20 images: a batch
    whole = build_network(settings, labeled, pretrained=True, seed=0)
    assert adapt_batch_norms(whole, labeled, seed=0)

    def read(index):
        if index < broken:
            raise UnreadableImage("broken")
        return Subset.read(labeled.train, index)

    monkeypatch.setattr(labeled.train, "images", None)
    monkeypatch.setattr(labeled.train, "read", read)
    before = [norm.running_mean.clone() for norm in norms_of(method)]
    assert adapt_batch_norms(method.backbone, labeled, seed=0) == adapts
    after = [norm.running_mean for norm in norms_of(method)]
    if adapts:
        full = [module.running_mean for module in whole.modules() if isinstance(module, _BatchNorm)]
        torch.testing.assert_close(after[0], full[0], rtol=0.2, atol=0.05)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True)) != adapts


@pytest.mark.thorough
def test_a_head_fitted_first_fits_the_first_step_of_a_network_that_learnt_other_images(resnet):
    _, labeled, method = resnet()
    for norm in norms_of(method):
        norm.running_mean.normal_(0, 3)
        norm.running_var.fill_(30.0)

    def first_loss():
        head, _ = fit_head(labeled, method.backbone, precision=torch.float32, seed=0)
        method.start_head(*head)
        method.train()
        images, labels = Normalize(labeled.mean, labeled.std)(labeled.train.images[:256]), labeled.train.labels[:256]
        with torch.no_grad():
            logits = method.backbone.model.get_classifier()(method.backbone(images))
        return float(torch.nn.functional.cross_entropy(logits, labels))

    fitted = first_loss()
    assert adapt_batch_norms(method.backbone, labeled, seed=0)
    assert first_loss() < 1 < fitted  # chance is 2.3


def test_a_network_without_batch_norms_has_none_to_adapt(settings_of, tiny_run):
    settings = settings_of("finetune", f"run={tiny_run}", "data=digits")
    labeled = open_labeled_data(settings)
    assert not adapt_batch_norms(build_network(settings, labeled, pretrained=True, seed=0), labeled, seed=0)


def test_a_small_set_is_gone_through_more_often_and_the_last_validation_is_at_the_end(settings_of, tiny_run):
    settings = settings_of(
        "finetune", f"run={tiny_run}", "data=digits", "epochs=20", "min_updates=300", "evaluations=20"
    )
    assert count_updates(settings, 10, 10) == (300, 15)
    assert count_updates(settings, 6400, 64) == (2000, 100)
    for images in (10, 333, 1000, 64_000):
        updates, every = count_updates(settings, images, min(64, images))
        assert updates % every == 0
        assert updates >= max(300, 20 * (images // min(64, images)))
    longer, _ = count_updates(from_scratch(settings), 6400, 64)
    assert longer == 6000


def test_a_network_from_scratch_warms_up_for_a_tenth_of_its_updates_or_as_asked_and_a_pretrained_one_as_asked(
    settings_of, tiny_run
):
    words = ("finetune", f"run={tiny_run}", "data=digits", "labels_per_class=20", "holdout=0")  # 200 images, 3 batches
    labeled = open_labeled_data(settings_of(*words))

    def epochs(*more, pretrained=False):
        settings = settings_of(*words, *more)
        plan = planned(settings if pretrained else from_scratch(settings), labeled, pretrained=pretrained)
        return plan.settings.method["warmup_epochs"]

    assert epochs() == pytest.approx(0.1 * 900 / 3)
    assert epochs("scratch_warmup=0") == 0
    assert epochs("warmup_epochs=20") == 60  # of three times as many
    assert epochs("warmup_epochs=20", pretrained=True) == 20
    assert epochs(pretrained=True) == 0


def test_a_batch_is_never_larger_than_the_set_and_divides_among_devices(settings_of, tiny_run):
    words = ("finetune", f"run={tiny_run}", "data=digits", "labels_per_class=1", "holdout=0")
    settings = settings_of(*words)
    assert planned(settings, open_labeled_data(settings)).batch_size == 10
    several = settings_of(*words, "trainer.devices=4", "trainer.strategy=ddp")
    assert planned(several, open_labeled_data(several)).batch_size == 8


def test_untrained_is_the_network_as_its_method_begins_it(tiny_run):
    exported = load_file(tiny_run / "export" / "model.safetensors")
    one, again, other = (untrained_backbone(str(tiny_run), seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert torch.equal(one["pos_embed"], exported["pos_embed"])  # MAE's are fixed
    name = "blocks.0.attn.qkv.weight"
    limit = (6 / sum(one[name].shape)) ** 0.5
    assert one[name].abs().max() <= limit  # Xavier-uniform, as MAE's
    assert one[name].std() == pytest.approx(limit / 3**0.5, rel=0.05)
    assert not torch.equal(one[name], exported[name])
    assert all(torch.equal(value, again[key]) for key, value in one.items())
    assert not torch.equal(one[name], other[name])
    assert untrained_backbone("resnet18", seed=0) is None


def test_pretrainings_rate_is_told_by_its_run_however_it_was_given(tiny_run, tmp_path):
    assert pretraining_base_lr(str(tiny_run)) == pytest.approx(16e-3)
    assert pretraining_base_lr(str(tiny_run / "export")) == pytest.approx(16e-3)
    (tmp_path / "config.yaml").write_text("lr: 0.001\nbase_lr: 0.00015\nbatch_size: 64\n")
    assert pretraining_base_lr(str(tmp_path)) == pytest.approx(4e-3)
    assert pretraining_base_lr("resnet18") == pytest.approx(1e-3)
