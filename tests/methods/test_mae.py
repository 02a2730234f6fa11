"""MAE against the authors' numbers, and the properties the paper states."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.build import build_backbone
from sslvision.data.batch import Batch
from sslvision.errors import UsageError
from sslvision.methods.base import Clock
from sslvision.methods.mae import MAE
from sslvision.nn.masking import random_keep

CLOCK = Clock(step=0, steps=10, steps_per_epoch=5)


@pytest.fixture(scope="module")
def golden():
    with safe_open(Path(__file__).parents[1] / "golden" / "mae_vit.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["config"])


def official(golden, **settings):
    tensors, config = golden
    state = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    return MAE.from_official(
        state, heads=config["num_heads"], decoder_num_heads=config["decoder_num_heads"], **settings
    )


@pytest.mark.parametrize("target", ["raw_pix", "norm_pix"])
def test_the_loss_and_every_gradient_equal_the_authors(golden, target):
    tensors, _ = golden
    method = official(golden, norm_pix=target == "norm_pix")
    loss = method.losses([tensors["input.images"], tensors["input.noise"]], CLOCK)["loss"]
    expected = tensors[f"expected.{target}.loss"].item()
    assert abs(loss.item() - expected) / expected <= 1e-6
    loss.backward()
    ours = {name.removeprefix("backbone.model."): p.grad for name, p in method.named_parameters() if p.requires_grad}
    prefix = f"expected.{target}.grad."
    theirs = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() <= 1e-5, name
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_mask_encoding_and_prediction_equal_the_authors(golden):
    tensors, config = golden
    method = official(golden)
    keep, hidden = random_keep(tensors["input.noise"], config["mask_ratio"])
    mask = torch.ones_like(tensors["expected.mask"]).scatter(1, keep, 0.0)
    assert torch.equal(mask, tensors["expected.mask"])
    assert torch.equal(torch.cat([keep, hidden], dim=1).argsort(dim=1), tensors["expected.ids_restore"])
    latent = method.backbone.encode(tensors["input.images"], keep)
    assert (latent - tensors["expected.latent"]).abs().max() <= 1e-5
    prediction = method.decode(latent, keep, hidden)
    theirs = tensors["expected.pred"].gather(1, hidden[..., None].expand_as(prediction))
    assert (prediction - theirs).abs().max() <= 1e-5


def tiny(**settings):
    torch.manual_seed(0)
    backbone = build_backbone(
        "vit_tiny_patch16_224", image_size=16, channels=1, patch_size=4, embed_dim=32, depth=2, num_heads=2
    )
    return MAE(
        backbone,
        **{
            "decoder_embed_dim": 16,
            "decoder_depth": 2,
            "decoder_num_heads": 2,
            "mean": [0.5],
            "std": [0.5],
            **settings,
        },
    )


def test_the_loss_reads_hidden_patches_only():
    method = tiny(norm_pix=False).double()
    images, noise = torch.rand(1, 1, 16, 16, dtype=torch.float64, requires_grad=True), torch.rand(1, 16)
    keep, hidden = random_keep(noise, 0.75)
    targets = method.targets(images, hidden)
    targets.sum().backward()
    touched = images.grad.view(4, 4, 4, 4).permute(0, 2, 1, 3).flatten(2).any(-1).flatten()
    assert set(touched.nonzero().flatten().tolist()) == set(hidden[0].tolist())
    assert not set(keep[0].tolist()) & set(hidden[0].tolist())


def test_a_share_of_the_patches_is_predicted_each_as_likely_as_any_other():
    torch.manual_seed(0)
    method, whole = tiny(prediction_ratio=0.25), tiny(prediction_ratio=1.0)
    whole.load_state_dict(method.state_dict())
    images, noise = torch.rand(400, 1, 16, 16), torch.rand(400, 16)
    keep, hidden = random_keep(noise, 0.75)
    assert torch.equal(method.losses([images, noise], CLOCK)["loss"], tiny_loss(method, images, keep, hidden[:, :4]))
    assert hidden[:, :4].flatten().bincount(minlength=16).min() > 60  # 100 expected, with a deviation of 9
    assert torch.equal(whole.losses([images, noise], CLOCK)["loss"], tiny_loss(whole, images, keep, hidden))
    assert method.describe()["predicted patches"] == "4 of 12 hidden ones"
    assert "predicted patches" not in whole.describe()


def tiny_loss(method, images, keep, hidden):
    """The loss of these hidden patches."""
    return method.error(method.decode(method.backbone.encode(images, keep), keep, hidden), images, hidden)


def test_a_prediction_belongs_to_its_place_whatever_the_order_of_the_patches():
    method = tiny().double().eval()
    images = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    keep, hidden = random_keep(torch.rand(1, 16), 0.75)
    shuffle_keep, shuffle_hidden = torch.randperm(keep.shape[1]), torch.randperm(hidden.shape[1])
    straight = method.decode(method.backbone.encode(images, keep), keep, hidden)
    keep, hidden = keep[:, shuffle_keep], hidden[:, shuffle_hidden]
    shuffled = method.decode(method.backbone.encode(images, keep), keep, hidden)
    assert torch.allclose(shuffled, straight[:, shuffle_hidden], atol=1e-12)


def test_views_are_normalized_bytes_and_masks_of_each_image_and_epoch():
    method = tiny(mean=[0.25], std=[0.5])
    crops = torch.full((2, 1, 16, 16), 255, dtype=torch.uint8)
    index = torch.tensor([4, 9])

    def views(epoch):
        epochs = torch.full_like(index, epoch)
        return method.views(Batch([crops], index, epochs, [], index), ImageRandom(0, epochs, index))

    images, noise = views(0)
    assert torch.allclose(images, torch.full_like(images, 1.5))
    assert (noise[0] != noise[1]).any()
    assert (views(1)[1] != noise).any()
    assert torch.equal(views(0)[1], noise)


def test_position_embeddings_are_not_trained():
    method = tiny()
    assert not method.backbone.model.pos_embed.requires_grad
    assert "decoder_pos_embed" not in dict(method.named_parameters())


def test_predicting_nothing_costs_the_variance_of_normalized_targets():
    method = tiny(norm_pix=True)
    torch.nn.init.zeros_(method.decoder_pred.weight)
    loss = method.losses([torch.randn(64, 1, 16, 16), torch.rand(64, 16)], CLOCK)["loss"].item()
    assert abs(loss - 15 / 16) < 1e-4  # 16 pixels of unit unbiased variance


def test_pictures_show_the_visible_patches_as_they_are_and_the_mask_where_it_is():
    method = tiny(norm_pix=True)
    images = torch.randint(0, 256, (3, 1, 16, 16), dtype=torch.uint8)
    (_, originals), (_, masked), (_, rebuilt) = method.pictures(images)["reconstructions"]
    assert torch.allclose(originals, images / 255, atol=1e-6)
    hidden = (masked == 0.5).view(3, 4, 4, 4, 4).permute(0, 1, 3, 2, 4).flatten(3).all(-1)  # (3, 4, 4)
    assert hidden.flatten(1).sum(1).tolist() == [12, 12, 12]
    visible = ~hidden.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    assert torch.equal(rebuilt[visible], originals[visible])
    assert torch.equal(masked[visible], originals[visible])
    assert (rebuilt[~visible] != originals[~visible]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_ratio": 1.5}, "mask_ratio=1.5 is out of range"),
        ({"mask_ratio": 0.0}, "mask_ratio=0.0 is out of range"),
        ({"mask_ratio": 0.99}, "leaves 0 of 16 patches visible"),
        ({"prediction_ratio": 0.0}, r"prediction_ratio=0\.0 is out of range"),
        ({"decoder_depth": 0}, "decoder_depth=0"),
        ({"decoder_num_heads": 3}, "decoder_embed_dim=16"),
        ({"crop_scale": (0.9, 0.2)}, r"crop scale of \[0.9, 0.2\]"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1"),
        ({"betas": (0.9, 1.5)}, "betas"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_words(settings, words):
    with pytest.raises(UsageError, match=words):
        tiny(**settings)


def test_a_released_checkpoint_without_decoder_is_refused_with_the_way_to_load_it(golden):
    tensors, _ = golden
    state = {
        name.removeprefix("param."): value
        for name, value in tensors.items()
        if name.startswith("param.") and "decoder" not in name and "mask_token" not in name
    }
    with pytest.raises(UsageError, match="checkpoint_path"):
        MAE.from_official(state)


def test_a_released_checkpoint_is_read_from_its_file(golden, tmp_path):
    tensors, _ = golden
    state = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    torch.save({"model": state, "args": Namespace(lr=1.5e-4), "epoch": 799}, tmp_path / "mae.pth")
    method = MAE.from_official(tmp_path / "mae.pth", heads=3, decoder_num_heads=4)
    assert torch.equal(method.backbone.model.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])
    assert torch.equal(method.decoder_pred.weight, state["decoder_pred.weight"])


KINDS = {
    "ViT": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": [2, 2, 2], "num_heads": [1, 2, 4]},
    ),
}


def on(kind):
    torch.manual_seed(0)
    name, options = KINDS[kind]
    backbone = build_backbone(name, image_size=32, drop_path_rate=0.0, **options)
    method = MAE(backbone, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2, norm_pix=False).double().eval()
    for parameter in method.parameters():
        if parameter.dim() > 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return method


@pytest.mark.parametrize("kind", KINDS)
def test_every_visible_token_is_decoded_at_its_own_position_whatever_the_order(kind):
    method = on(kind)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    keep, hidden = random_keep(torch.rand(2, 16), 0.75)
    order = torch.tensor([2, 0, 3, 1])
    prediction = method.decode(method.backbone.encode(images, keep), keep, hidden)
    shuffled = method.decode(method.backbone.encode(images, keep[:, order]), keep[:, order], hidden)
    assert torch.allclose(prediction, shuffled, atol=1e-10)
    misplaced = method.decode(method.backbone.encode(images, keep), keep[:, order], hidden)
    assert not torch.allclose(prediction, misplaced, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_hidden_patch_is_predicted_at_its_own_position_and_compared_with_its_own_pixels(kind):
    method = on(kind)
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    keep, hidden = random_keep(torch.rand(1, 16), 0.75)
    order = torch.randperm(12)
    latent = method.backbone.encode(images, keep)
    assert torch.allclose(
        method.decode(latent, keep, hidden[:, order]), method.decode(latent, keep, hidden)[:, order], atol=1e-10
    )
    row, column = divmod(int(hidden[0, 5]), 4)
    own = images[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    assert torch.equal(method.targets(images, hidden)[0, 5], own.permute(1, 2, 0).flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_reads_hidden_pixels_only_as_targets(kind):
    method = on(kind)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    noise = torch.rand(2, 16)
    keep, hidden = random_keep(noise, 0.75)
    other = images.clone()
    for image in range(2):
        row, column = divmod(int(hidden[image, 0]), 4)
        other[image, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0.5
    first, second = (method.decode(method.backbone.encode(one, keep), keep, hidden) for one in (images, other))
    assert torch.equal(first, second)
    assert method.losses([images, noise], CLOCK)["loss"] != method.losses([other, noise], CLOCK)["loss"]
