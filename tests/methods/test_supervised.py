"""Fine-tuning: what trains and what does not, at which rates, from which head, on which targets."""

import copy
import math

import pytest
import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.build import build_backbone
from sslvision.data.batch import Batch
from sslvision.errors import UsageError
from sslvision.methods.base import Clock
from sslvision.methods.supervised import Supervised

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*many workers"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
CLOCK = Clock(step=0, steps=10, steps_per_epoch=5)
SIDE, PER_BATCH = 16, 8
KINDS = {
    "ViT": ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": [2, 2, 1], "num_heads": [1, 2, 4]},
    ),
    "ResNet": ("resnet18", {}),
}
LABELS = torch.arange(64) % 3
# Three classes of images that are easy to tell apart: by where they are bright.
IMAGES = torch.randint(0, 60, (64, 1, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
for label, image in zip(LABELS.tolist(), IMAGES, strict=True):
    image[:, 5 * label : 5 * label + 5] += 150


def backbone_of(kind="ViT", **options):
    torch.manual_seed(0)
    name, own = KINDS[kind]
    return build_backbone(name, image_size=SIDE, channels=1, **{**own, **options})


def method_of(kind="ViT", *, backbone=None, **settings):
    fixed = {
        "classes": ["a", "b", "c"],
        "labels": LABELS,
        "mean": [0.4],
        "std": [0.3],
        "crop_scale": (1.0, 1.0),
        "flip": False,
    }
    return Supervised(backbone or backbone_of(kind), **{**fixed, **settings})


def batch_of(indices, epoch=0, shown=None):
    indices = torch.as_tensor(indices)
    seen = indices if shown is None else torch.as_tensor(shown)
    return Batch([IMAGES[seen]], indices, torch.full_like(indices, epoch), [], seen)


def batches(count=4):
    return [batch_of(torch.arange(PER_BATCH) + PER_BATCH * number) for number in range(count)]


class Collected(Logger):
    """Keeps what is logged."""

    name, version = "collected", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def fit(method, *, epochs=2, validate=False, callbacks=(), logger=False, **options):
    torch.manual_seed(1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=logger,
        callbacks=list(callbacks),
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    held_out = [(torch.arange(4), IMAGES[:4]), (torch.arange(4, 7), IMAGES[4:7])]
    loaders = DataLoader(batches(), batch_size=None), DataLoader(held_out, batch_size=None) if validate else None
    trainer.fit(method, *loaders)
    return trainer


def state_of(method):
    return copy.deepcopy(method.backbone.model.state_dict())


def test_fine_tuning_learns_to_tell_the_classes_apart():
    method = method_of(lr=3e-3, layer_decay=0.8, mixup=0.2, ema=0.5, validation_labels=LABELS)
    fit(method, epochs=8)
    assert (method.classify(IMAGES[32:]).argmax(dim=1) == LABELS[32:]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("kind", "settings", "frozen"),
    [
        ("ViT", {"freeze": 0.5}, ("cls_token", "pos_embed", "patch_embed", "blocks.0.", "blocks.1.")),
        ("Swin", {"freeze": 2}, ("patch_embed", "layers.0.")),
        ("Swin", {"freeze_stages": 2}, ("patch_embed", "layers.0.", "layers.1.")),
        ("ResNet", {"freeze_stages": 2}, ("conv1", "bn1", "layer1", "layer2")),
    ],
)
def test_frozen_means_frozen_to_the_last_bit_buffers_too_and_the_rest_trains(kind, settings, frozen):
    drop_path = {"drop_path_rate": 0.2}
    method = method_of(kind, backbone=backbone_of(kind, **drop_path), lr=1e-2, weight_decay=0.5, **settings)
    before = state_of(method)
    fit(method, epochs=1)
    after = state_of(method)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in changed if name.startswith(frozen)]
    assert {name for name in before if not name.startswith(frozen)} - changed == set()


def test_what_is_frozen_is_deterministic_in_training_despite_drop_path():
    method = method_of(backbone=backbone_of(drop_path_rate=0.5), freeze=3)
    method.eval()
    method.train()
    tokens = torch.randn(8, 17, 16)
    low = [method.backbone.model.blocks[:3](tokens) for _ in range(2)]
    high = [method.backbone.model.blocks[3](tokens) for _ in range(2)]
    assert torch.equal(*low)
    assert not torch.equal(*high)


def test_a_backbone_that_was_evaluated_between_epochs_stays_frozen():
    class Evaluates(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.pretrained().train(True)

    method = method_of("ResNet", freeze_stages=4)
    before = state_of(method)
    fit(method, callbacks=[Evaluates()])
    after = state_of(method)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}


def test_a_backbone_that_came_frozen_trains():
    method = method_of(backbone=backbone_of().requires_grad_(False).eval())
    assert all(parameter.requires_grad for parameter in method.backbone.parameters())
    assert all(module.training for module in method.backbone.modules())


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_training_starts_from_the_head_that_was_fitted_before(ema):
    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                seen.extend(copy.deepcopy(one.model.head) for one in (pl_module.backbone, pl_module.evaluated))

    seen, weight, bias = [], torch.randn(3, 16), torch.randn(3)
    method = method_of(ema=ema)
    method.start_head(weight, bias)
    fit(method, epochs=1, callbacks=[Looks()])
    assert len(seen) == 2
    for head in seen:
        assert torch.equal(head.weight, weight)
        assert torch.equal(head.bias, bias)
    assert not torch.equal(method.backbone.model.head.weight, weight)


def test_a_new_head_says_next_to_nothing():
    head = method_of(backbone=backbone_of(embed_dim=512)).backbone.model.head
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert not head.bias.any()
    loss = method_of().losses([torch.randn(4, 1, SIDE, SIDE), torch.eye(3)[[0, 1, 2, 0]]], CLOCK)["loss"].item()
    assert loss == pytest.approx(math.log(3), abs=1e-3)


def test_each_layer_has_its_own_rate_in_the_real_optimizer_at_every_step():
    class Looks(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            names = {id(parameter): name for name, parameter in pl_module.backbone.model.named_parameters()}
            rates.append({names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]})

    rates = []
    method = method_of(lr=0.1, layer_decay=0.5, warmup_epochs=0.5, min_lr=0.01, freeze=1)
    fit(method, epochs=2, callbacks=[Looks()])
    expected = [0.0, 0.05] + [0.01 + 0.09 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    for seen, lr in zip(rates, expected, strict=True):
        for name, height in {
            "head.weight": 0,
            "norm.bias": 0,
            "blocks.3.norm1.weight": 1,
            "blocks.1.mlp.fc1.weight": 3,
        }.items():
            assert seen[name] == pytest.approx(lr * 0.5**height, abs=1e-12)
        assert "blocks.0.norm1.weight" not in seen


def test_weight_decay_moves_matrices_alone():
    class NoGradients(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for parameter in pl_module.backbone.parameters():
                parameter.grad.zero_()

    method = method_of(lr=0.1, weight_decay=0.5)
    before = state_of(method)
    fit(method, epochs=1, callbacks=[NoGradients()])
    after = state_of(method)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = {name for name, p in method.backbone.model.named_parameters() if p.ndim > 1}
    assert changed == matrices - {"cls_token", "pos_embed"}


def test_the_running_mean_is_a_mean_of_parameters_and_buffers():
    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            states.append(state_of(pl_module))

    states = []
    method = method_of("ResNet", lr=1e-2, ema=0.6)
    fit(method, epochs=1, callbacks=[Looks()])
    mean = states[0]  # the first update counts in full
    for update, state in enumerate(states[1:], start=1):
        decay = min(0.6, 1 - (1 + update) ** (-2 / 3))
        mean = {
            name: decay * mean[name] + (1 - decay) * value if value.is_floating_point() else value
            for name, value in state.items()
        }
    assert method.evaluated is not method.backbone
    for name, value in method.evaluated.model.state_dict().items():
        assert torch.allclose(value, mean[name], atol=1e-6), name
    assert not any(parameter.requires_grad for parameter in method.evaluated.parameters())
    assert not method.evaluated.training


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["none", "balanced", [1.0, 0.5, 2.0]])
def test_the_loss_of_hard_labels_is_cross_entropy_per_image(smoothing, weights):
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    method = method_of(labels=labels, label_smoothing=smoothing, class_weights=weights)
    torch.nn.init.normal_(method.backbone.model.head.weight)
    images = torch.randn(6, 1, SIDE, SIDE)
    loss = method.losses([images, torch.eye(3)[labels]], CLOCK)["loss"]
    logits = method.backbone.model.head(method.backbone(images))
    weight = {"none": None, "balanced": torch.tensor([6 / 9, 2.0, 1.0])}.get(
        str(weights), torch.tensor([1.0, 0.5, 2.0])
    )
    expected = F.cross_entropy(logits, labels, weight, label_smoothing=smoothing, reduction="sum") / 6
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_balanced_weights_are_1_on_average_and_0_for_a_class_without_images():
    labels = torch.tensor([0] * 6 + [2] * 2)
    weights = method_of(labels=labels, class_weights="balanced").class_weights
    assert torch.allclose(weights, torch.tensor([8 / 12, 0.0, 2.0]))
    assert weights[labels].mean().item() == pytest.approx(1)


def test_views_are_normalized_images_and_the_labels_of_what_is_shown():
    method = method_of()
    batch = batch_of([3, 4, 5], shown=[3, 8, 5])  # a stand-in for image 4
    images, targets = method.views(batch, ImageRandom(0, batch.epoch, batch.indices))
    assert torch.equal(images, method.normalize(IMAGES[[3, 8, 5]]))
    assert targets.argmax(dim=1).tolist() == LABELS[[3, 8, 5]].tolist()
    assert torch.equal(targets.sum(dim=1), torch.ones(3))


def test_views_are_erased_and_mixed_by_each_image_and_epoch():
    method = method_of(mixup=0.8, cutmix=1.0, erase=1.0)

    def views(epoch):
        batch = batch_of([0, 1, 2, 3], epoch)
        return method.views(batch, ImageRandom(method.seed, batch.epoch, batch.indices))

    images, targets = views(0)
    assert torch.equal(views(0)[0], images)
    assert not torch.equal(views(1)[1], targets)
    assert torch.allclose(targets.sum(dim=1), torch.ones(4))
    assert ((targets > 0) & (targets < 1)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_noisy_weights_have_the_gradient_of_the_perturbed_network_and_stay_what_they_are(kind):
    share = 0.1
    noisy, perturbed = method_of(kind, weight_noise=share), method_of(kind)
    before = state_of(noisy)
    images, targets = noisy.views(batch_of(range(8)), ImageRandom(0, torch.zeros(8, dtype=torch.long), torch.arange(8)))
    torch.manual_seed(3)
    noisy.losses([images, targets], CLOCK)["loss"].backward()
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in perturbed.backbone.parameters():
            if weight.ndim >= 2:
                weight += share * weight.square().mean().sqrt() * torch.randn_like(weight)
    perturbed.losses([images, targets], CLOCK)["loss"].backward()
    for name, weight in noisy.backbone.named_parameters():
        wanted = perturbed.backbone.get_parameter(name).grad
        assert torch.allclose(weight.grad, wanted, rtol=1e-4, atol=1e-6), name
        assert torch.equal(weight, before[name.removeprefix("model.")])


def test_weights_that_are_frozen_have_no_noise():
    method = method_of(freeze=4, weight_noise=0.5)
    head = method.backbone.model.get_classifier()
    features = method.backbone(method.normalize(IMAGES[:8]))
    rng = ImageRandom(0, torch.zeros(8, dtype=torch.long), torch.arange(8))
    images, targets = method.views(batch_of(range(8)), rng)
    torch.manual_seed(3)
    loss = method.losses([images, targets], CLOCK)["loss"]
    torch.manual_seed(3)
    noise = 0.5 * head.weight.square().mean().sqrt() * torch.randn_like(head.weight)
    logits = F.linear(features, head.weight + noise, head.bias)
    assert torch.allclose(loss, F.cross_entropy(logits, targets), atol=1e-6)


@pytest.mark.e2e
def test_compiled_blocks_train_with_noisy_weights():
    losses = {}
    for compiled in (False, True):
        method = method_of(weight_noise=0.1)
        if compiled:
            method.compile_blocks()
        collected = Collected()
        fit(method, epochs=1, logger=collected)
        losses[compiled] = [row["loss"] for _, row in collected.rows if "loss" in row]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert len(losses[True]) == 4


def test_train_top1_is_the_share_of_images_whose_likeliest_class_is_right():
    method = method_of()
    torch.nn.init.zeros_(method.backbone.model.head.weight)
    method.backbone.model.head.bias.data = torch.tensor([0.0, 1.0, 0.0])
    targets = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.6, 0.4], [0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    assert method.losses([torch.randn(4, 1, SIDE, SIDE), targets], CLOCK)["train_top1"].item() == 50


def test_a_step_never_waits_for_the_device():
    method = method_of(
        mixup=0.8, cutmix=1.0, erase=0.5, label_smoothing=0.1, class_weights="balanced", ema=0.9, freeze=1
    )
    batch = batch_of(range(8))
    # There are no numbers on this device: whoever asks for one, or for a shape that depends on one, is refused.
    method, crops, indices = method.to("meta"), [batch.crops[0].to("meta")], batch.indices.to("meta")
    batch = Batch(crops, indices, indices, [], indices)
    loss = method.losses(method.views(batch, ImageRandom(0, batch.epoch, batch.indices)), CLOCK)["loss"]
    loss.backward()
    method.after_update(CLOCK)
    with pytest.raises(RuntimeError):
        loss.item()


def test_the_same_seed_trains_the_same_bits_and_another_does_not():
    settings = {"mixup": 0.8, "cutmix": 1.0, "erase": 0.5, "ema": 0.9, "layer_decay": 0.7}

    def trained(seed):
        method = method_of(backbone=backbone_of(drop_path_rate=0.1), seed=seed, **settings)
        fit(method, epochs=1)
        return {**state_of(method), **{f"mean.{name}": value for name, value in method.evaluated.state_dict().items()}}

    first, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_validation_measures_every_image_once_in_eval_mode_and_logs_it(ema):
    logger = Collected()
    method = method_of(backbone=backbone_of(drop_path_rate=0.5), ema=ema, validation_labels=LABELS[:7])
    trainer = fit(method, epochs=2, validate=True, logger=logger)
    logits = method.classify(IMAGES[:7])
    assert method.training
    top1 = 100 * (logits.argmax(dim=1) == LABELS[:7]).float().mean().item()
    loss = F.cross_entropy(logits, LABELS[:7]).item()
    assert trainer.callback_metrics["val_top1"].item() == pytest.approx(top1)
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(loss, rel=1e-5)
    validated = [(step, metrics) for step, metrics in logger.rows if "val_top1" in metrics]
    assert [(step, metrics["epoch"]) for step, metrics in validated] == [(4, 1.0), (8, 2.0)]
    assert validated[1][1]["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert [step for step, metrics in logger.rows if "train_top1" in metrics] == list(range(1, 9))


def test_mixed_precision_and_a_bound_of_the_gradient_go_together():
    logger = Collected()
    fit(method_of(lr=3e-3), epochs=6, logger=logger, precision="bf16-mixed", gradient_clip_val=1.0)
    losses = [metrics["loss"] for _, metrics in logger.rows]
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


def test_the_exported_network_is_one_timm_model_with_its_head():
    for kind in KINDS:
        method = method_of(kind).eval()
        torch.nn.init.normal_(method.backbone.model.get_classifier().weight)
        images = method.normalize(IMAGES[:4])
        assert torch.allclose(method.backbone.model(images), method.classify(IMAGES[:4]), atol=1e-5), kind


OPTIMIZERS = [
    "sgd",
    "muon",
    "momentum",
    "nadam",
    "adagrad",
    "adadelta",
    "rmsprop",
    "adam",
    "adamw",
    "lars",
    "lamb",
    "lion",
]


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_any_optimizer_of_timm_lowers_the_loss(optimizer):
    rate = {
        "sgd": 0.05,
        "momentum": 0.05,
        "adadelta": 1.0,
        "lars": 1.0,
        "lamb": 0.02,
        "lion": 5e-4,
        "adagrad": 0.01,
    }.get(optimizer, 2e-3)
    method = method_of(lr=rate, optimizer=optimizer, weight_decay=0.01, layer_decay=0.9)
    method.start_head(torch.randn(3, 16, generator=torch.Generator().manual_seed(2)) * 0.1, torch.zeros(3))
    logger = Collected()
    trainer = fit(method, epochs=3, logger=logger)
    losses = [metrics["loss"] for _, metrics in logger.rows]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(value.isfinite().all() for value in state_of(method).values())
    group = trainer.optimizers[0].param_groups[0]
    assert group["decayed"] is False
    assert group["lr_scale"] == pytest.approx(0.9**5)
    assert group["weight_decay"] == 0


def test_options_reach_the_optimizer():
    group = method_of(optimizer="sgd", optimizer_options={"momentum": 0.5}).configure_optimizers().param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.5, True)
    group = method_of(optimizer_options={"betas": [0.5, 0.9]}).configure_optimizers().param_groups[0]
    assert tuple(group["betas"]) == (0.5, 0.9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "adamv"}, "optimizer=adamv is not one of timm's. Near it: adam"),
        ({"optimizer": "adahessian"}, "second derivatives"),
        ({"optimizer": "sgd", "optimizer_options": {"betas": [0.9, 0.99]}}, "sgd has no option betas.* momentum"),
        ({"optimizer_options": {"lr": 1.0}}, "no option lr"),
        ({"optimizer_options": {"betas": [2.0, 0.9]}}, "Invalid beta"),
        ({"freeze": 5}, "freeze=5 .* 4 blocks"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"mixup": 2.0}, "mixup=2"),
        ({"cutmix": -1.0}, "cutmix=-1"),
        ({"erase": 1.5}, "erase=1.5 .* probability"),
        ({"cutout": 2.0}, "cutout=2 .* share of the image's side"),
        ({"weight_noise": -0.1}, "weight_noise=-0.1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1"),
        ({"ema": 1.0}, "ema=1"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"warmup_epochs": -1.0}, "warmup_epochs=-1"),
        ({"class_weights": "fair"}, "class_weights=fair"),
        ({"class_weights": [1.0, 2.0]}, "must be 3 numbers"),
        ({"class_weights": [1.0, 2.0, float("nan")]}, "must be 3 numbers"),
        ({"classes": ["a"]}, "1 classes"),
        ({"classes": ["a", "b"]}, "Labels from 0 to 2 do not number 2 classes"),
        ({"validation_labels": torch.tensor([-1, 0])}, "Labels from -1 to 0"),
        ({"crop_scale": (0.9, 0.2)}, "crop scale"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_words(settings, words):
    with pytest.raises(UsageError, match=words):
        method_of(**settings)


@pytest.mark.parametrize("name", ["efficientvit_m0", "deit_tiny_distilled_patch16_224"])
def test_a_model_whose_head_is_more_than_a_linear_layer_is_refused(name):
    with pytest.raises(UsageError, match="not one linear layer on one feature"):
        Supervised(build_backbone(name, image_size=224), classes=["a", "b"], labels=torch.tensor([0, 1]))


def test_the_configuration_tells_what_trains_and_how():
    rows = method_of(
        freeze=0.5, layer_decay=0.5, lr=1e-3, mixup=0.8, optimizer="sgd", optimizer_options={"momentum": 0.8}
    ).describe()
    assert rows["trained"].endswith("; stem and lowest 2 of 4 blocks frozen")
    assert rows["optimizer"] == "sgd, momentum 0.8"
    assert rows["layer-wise rates"].startswith("0.00025 (lowest) to 0.001 (head)")
    assert rows["regularization"] == "Mixup 0.8, weight decay 0.05"
    everything = method_of("ResNet").describe()
    assert everything["trained"] == "11.2 of 11.2 M parameters"
    assert "layer-wise rates" not in everything
    assert method_of("ResNet", freeze_stages=3).describe()["trained"].endswith("lowest 3 of 4 stages frozen")
