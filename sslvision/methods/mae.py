"""Masked autoencoders are scalable vision learners (He et al. 2021, arXiv:2111.06377).

Hide three quarters of an image's patches. A vision transformer encodes the visible ones alone; a light decoder, given
their encodings and a mask token at every hidden position, predicts the hidden pixels. The mean squared error on hidden
patches is the loss. Only the encoder is kept.

    image -> patches -> keep 25 % -> encoder -> [encodings | mask tokens] + positions -> decoder -> pixels of the hidden 75 %

The decoder works in the order [class | visible | hidden], its first block computes the queries, keys and values of a mask
token once for all images, and its last block computes hidden patches only: the same numbers as the authors' implementation,
without those that the loss never reads.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sslvision.augment.crops import Crop
from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.backbone import Backbone
from sslvision.backbones.released import released_mae, vit_like
from sslvision.backbones.visualize import visualize_features
from sslvision.backbones.vit import ViT, init_transformer
from sslvision.data.batch import Batch
from sslvision.errors import UsageError
from sslvision.methods.base import Clock, Method
from sslvision.nn.activation_checkpointing import run_checkpointed
from sslvision.nn.attention import block_after_qkv, block_part
from sslvision.nn.autocast import to_autocast_dtype
from sslvision.nn.masking import random_keep, visible_count
from sslvision.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from sslvision.nn.patches import gather_patches, gather_tokens, scatter_patches
from sslvision.nn.position import sincos_position
from sslvision.optim.schedules import warmup_cosine


class MAE(Method):
    """Masked autoencoder on a ViT or Swin.

    Args:
        backbone: The encoder. Its weights are initialized as in the paper, and a ViT gets fixed sine-cosine positions.
        mask_ratio: Share of patches to hide (section 3; 0.75).
        prediction_ratio: Share of patches to predict, drawn from the hidden ones: a quarter instead of three costs a
            third to a half of the decoder (CrossMAE, Fu et al. 2024, arXiv:2401.14391, section 3.3). Default: all hidden.
        norm_pix: Normalize the target pixels of each patch by its own mean and deviation (section 3, "Reconstruction target").
        decoder_embed_dim, decoder_depth, decoder_num_heads: Size of the decoder (table 1; 512, 8, 16).
        crop_scale: Share of the image's area that a random resized crop covers (appendix A.1; 0.2 to 1).
        flip: Mirror half of the images.
        lr: Peak learning rate of the whole batch (appendix A.1: 1.5e-4 x batch / 256).
        min_lr: Learning rate at the end.
        warmup_epochs: Epochs of linear warm-up, fractions allowed.
        weight_decay, betas: Weight decay and betas of AdamW.
        optimizer, optimizer_options: Any other timm optimizer by name, and its options. See Method.
        freeze_backbone_epochs: Epochs in which the decoder alone is updated. See Method.
        mean, std: Pixel statistics per channel, on the scale 0..1.
        seed: Seed for crops and masks.

    Raises:
        UsageError: A value is out of its range, or the backbone cannot encode visible patches alone.
    """

    decoder_pos_embed: Tensor
    compilable = ("error", "block_part", "block_with_mask_tokens")
    block_functions = ("block_part", "block_with_mask_tokens")
    capturable = True

    # B images, L patches, K visible, H hidden, P class and register tokens, D encoder width, E decoder width, p patch side,
    # h x w pixels of an image

    def __init__(
        self,
        backbone: Backbone,
        *,
        mask_ratio: float = 0.75,
        prediction_ratio: float | None = None,
        norm_pix: bool = True,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        flip: bool = True,
        lr: float = 1.5e-4,
        min_lr: float = 0.0,
        warmup_epochs: float = 40.0,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        optimizer: str = "adamw",
        optimizer_options: Mapping[str, Any] | None = None,
        freeze_backbone_epochs: float = 0.0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        seed: int = 0,
    ):
        check_settings(backbone, mask_ratio, prediction_ratio, decoder_embed_dim, decoder_depth, decoder_num_heads)
        crop = Crop(backbone.image_size, (crop_scale[0], crop_scale[1]), flip=flip)
        common: dict[str, Any] = {"mean": mean, "std": std, "betas": betas, "seed": seed}
        common |= {"optimizer": optimizer, "optimizer_options": optimizer_options}
        super().__init__(crops=[crop], freeze_backbone_epochs=freeze_backbone_epochs, **common)
        self.save_hyperparameters(ignore=["backbone"], logger=False)
        if min_lr < 0 or warmup_epochs < 0 or weight_decay < 0:
            raise UsageError(f"{min_lr=}, {warmup_epochs=} and {weight_decay=} must each be 0 or more.")
        self.backbone = backbone
        self.mask_ratio, self.norm_pix = mask_ratio, norm_pix
        self.predicted = predicted_count(backbone.grid[0] * backbone.grid[1], mask_ratio, prediction_ratio)
        self.schedule_lr = partial(warmup_cosine, peak=lr, end=min_lr, warmup_epochs=warmup_epochs)
        self.weight_decay = weight_decay

        patch, grid, prefix = backbone.stride, backbone.grid, backbone.num_prefix
        self.decoder_embed = nn.Linear(backbone.embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.register_buffer("decoder_pos_embed", sincos_position(decoder_embed_dim, grid, num_prefix=prefix))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_embed_dim, decoder_num_heads, qkv_bias=True, norm_layer=norm) for _ in range(decoder_depth))
        )
        self.decoder_norm = norm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch**2 * backbone.channels)
        self.block_part, self.block_with_mask_tokens = block_part, block_with_mask_tokens  # compiled ones replace them
        self.activation_checkpointing = False
        self.init_weights()

    def views(self, batch: Batch, rng: ImageRandom) -> list[Tensor]:
        """Return normalized images (B, C, h, w) and the noise (B, L) whose smallest values stay visible."""
        rows, columns = self.backbone.grid
        return [self.normalize(batch.crops[0]), rng.uniform("mask", rows * columns)]

    def losses(self, views: list[Tensor], clock: Clock | None) -> dict[str, Tensor]:
        """Return the mean squared error on hidden patches."""
        images, noise = views
        keep, hidden = random_keep(noise, self.mask_ratio)  # (B, K), (B, H)
        hidden = hidden[:, : self.predicted]  # (B, H'), random ones: they are in the order of their noise
        latent = self.backbone.encode(images, keep)  # (B, P+K, D)
        prediction = self.decode(latent, keep, hidden)  # (B, H, p*p*C)
        return {"loss": self.error(prediction, images, hidden)}

    def decode(self, latent: Tensor, keep: Tensor, hidden: Tensor) -> Tensor:
        """Predict the pixels of hidden patches (B, H, p*p*C) from the encoding (B, P+K, D) of the visible ones."""
        checkpointed, P = self.activation_checkpointing, self.backbone.num_prefix
        tokens = self.decoder_embed(latent)  # (B, P+K, E)
        position = self.decoder_pos_embed[:, P:]  # (1, L, E); class and register tokens have none
        visible = tokens[:, P:] + gather_tokens(position, keep)  # (B, K, E)
        tokens = to_autocast_dtype(torch.cat([tokens[:, :P], visible], dim=1))  # (B, P+K, E)
        masked = (self.mask_token + position).to(tokens.dtype)  # (1, L, E), the same for all images
        *blocks, last = self.decoder_blocks
        if blocks:
            first, *blocks = blocks
            tokens = run_checkpointed(
                self.block_with_mask_tokens, first, tokens, masked, hidden, enabled=checkpointed
            )  # (B, P+K+H, E)
        else:
            tokens = torch.cat([tokens, gather_tokens(masked, hidden)], dim=1)  # (B, P+K+H, E)
        for block in blocks:
            tokens = run_checkpointed(block, tokens, enabled=checkpointed)
        at_hidden = slice(P + keep.shape[1], None)
        tokens = run_checkpointed(self.block_part, last, tokens, at_hidden, enabled=checkpointed)  # (B, H, E)
        return self.decoder_pred(self.decoder_norm(tokens))

    def error(self, prediction: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
        """Return the mean squared error of predicted pixels (B, H, p*p*C)."""
        targets = self.targets(images, hidden)  # (B, H, p*p*C)
        return (prediction.to(targets.dtype) - targets).square().mean()

    def targets(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Return the pixels of hidden patches (B, H, p*p*C), channels last, normalized per patch if `norm_pix`."""
        pixels = gather_patches(images, hidden, self.backbone.stride).permute(0, 1, 3, 4, 2).flatten(2)
        if not self.norm_pix:
            return pixels
        centered = pixels - pixels.mean(dim=-1, keepdim=True)  # torch.var_mean takes ten times as long on a CPU
        variance = centered.square().sum(dim=-1, keepdim=True) / (
            pixels.shape[-1] - 1
        )  # unbiased, as in the authors' code
        return centered * (variance + 1e-6).rsqrt()

    def schedule(self, clock: Clock) -> dict[str, float]:
        """Return learning rate (linear warm-up, then half a cosine, per update; appendix A.1) and weight decay."""
        return {"lr": self.schedule_lr(clock.epoch, epochs=clock.epochs), "weight_decay": self.weight_decay}

    def pretrained(self) -> Backbone:
        """Return the encoder; the decoder is not kept."""
        return self.backbone

    def init_weights(self) -> None:
        """Initialize encoder and decoder as the paper does (appendix A.1)."""
        self.backbone.init_weights()
        if isinstance(self.backbone, ViT):  # a Swin knows positions by the biases of its windows
            self.backbone.use_sincos_positions()
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred):
            init_transformer(module)
        nn.init.normal_(self.mask_token, std=0.02)

    def enable_activation_checkpointing(self) -> None:
        """Recompute the activations of the decoder's blocks, too. See Method.enable_activation_checkpointing."""
        super().enable_activation_checkpointing()
        self.activation_checkpointing = True

    def compilable_modules(self) -> list[nn.Module]:
        """Return the decoder's blocks."""
        return list(self.decoder_blocks)

    @torch.no_grad()
    def pictures(self, images: Tensor) -> dict[str, list[tuple[str, Tensor]]]:
        """Return uint8 images (N, C, h, w), their visible patches, and reconstructions; and `visualize_features`.

        Where targets are normalized, a prediction is rescaled by the mean and deviation of the original patch, as in the
        authors' pictures: the reconstruction shows structure, not brightness.
        """
        seen = self.normalize(images)
        index = torch.arange(len(images), device=images.device)
        rows, columns = self.backbone.grid
        noise = ImageRandom(self.seed, torch.zeros_like(index), index).uniform("mask", rows * columns)
        keep, hidden = random_keep(noise, self.mask_ratio)
        prediction = self.decode(self.backbone.encode(seen, keep), keep, hidden).float()  # (N, H, p*p*C)
        patch = self.backbone.stride
        pixels = gather_patches(seen, hidden, patch)  # (N, H, C, p, p)
        if self.norm_pix:
            flat = pixels.flatten(2)
            prediction = prediction * (flat.var(-1, keepdim=True) + 1e-6).sqrt() + flat.mean(-1, keepdim=True)
        prediction = prediction.unflatten(2, (patch, patch, -1)).permute(0, 1, 4, 2, 3)  # (N, H, C, p, p)
        originals = self.normalize.undo(seen)
        masked = scatter_patches(originals, torch.full_like(pixels, 0.5), hidden)
        rebuilt = self.normalize.undo(scatter_patches(seen, prediction.to(seen.dtype), hidden))
        heading = f"{100 * hidden.shape[1] / noise.shape[1]:.3g} % hidden"
        reconstructions = [("original", originals), (heading, masked), ("reconstructed", rebuilt)]
        return {"reconstructions": reconstructions, **visualize_features(self.backbone, seen, originals)}

    def describe(self) -> dict[str, str]:
        """Return the exact mask ratio and the number of visible patches."""
        rows, columns = self.backbone.grid
        visible = visible_count(rows * columns, self.mask_ratio)
        hidden = rows * columns - visible
        fewer = {"predicted patches": f"{self.predicted} of {hidden} hidden ones"} if self.predicted < hidden else {}
        return {
            "mask ratio": f"{1 - visible / (rows * columns):.4f} (asked: {self.mask_ratio})",
            "visible patches": f"{visible} of {rows * columns}, {self.backbone.stride}x{self.backbone.stride} pixels each",
            **fewer,
        }

    @classmethod
    def from_official(
        cls,
        checkpoint: str | Path | Mapping[str, Any],
        *,
        heads: int | None = None,
        decoder_num_heads: int = 16,
        **settings: Any,
    ) -> "MAE":
        """Read a checkpoint that the authors released, encoder and decoder.

        Args:
            checkpoint: Its file, which is loaded with weights_only=True, or its state dict, with or without the "model" level.
            heads: Number of attention heads of the encoder, which weights do not tell; by default one per 64 channels (80
                for ViT-H).
            decoder_num_heads: Number of attention heads of the decoder.
            settings: Further arguments of MAE, such as norm_pix.

        Raises:
            UsageError: The state dict is not an MAE's.
        """
        state = released_mae(checkpoint)
        backbone = vit_like(state, heads=heads)
        channels = backbone.channels
        if channels != 3:
            settings = {"mean": (0.5,) * channels, "std": (0.5,) * channels} | settings
        method = cls(
            backbone,
            decoder_embed_dim=state["mask_token"].shape[-1],
            decoder_depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("decoder_blocks.")),
            decoder_num_heads=decoder_num_heads,
            **settings,
        )
        own = {name for name in state if name.startswith(("decoder_", "mask_token"))}
        method.load_state_dict(
            {(name if name in own else f"backbone.model.{name}"): value for name, value in state.items()}
            | {name: value for name, value in method.state_dict().items() if name.startswith("normalize.")}
        )
        return method


def block_with_mask_tokens(block: Block, visible: Tensor, masked: Tensor, hidden: Tensor) -> Tensor:
    """Run the first decoder block: the result of block([visible | masked[hidden]]).

    A mask token is the same in all images at the same position, so its queries, keys and values are computed once, and not
    for every image that hides this position.

    Args:
        block: A pre-norm timm Block, see `attention.divisible`.
        visible: (B, n, E) tokens of each image.
        masked: (1, L, E) mask tokens at all positions.
        hidden: (B, H) positions that each image hides.

    Returns:
        (B, n + H, E).
    """
    B, n = visible.shape[:2]
    qkv = block.attn.qkv(block.norm1(torch.cat([visible.flatten(0, 1), masked[0]])))  # (B * n + L, 3 * E)
    of_visible, of_masked = qkv.split([B * n, masked.shape[1]])
    of_visible = of_visible.unflatten(0, (B, n))  # (B, n, 3 * E)
    qkv = torch.cat([of_visible, gather_tokens(of_masked[None], hidden)], dim=1)  # (B, n + H, 3 * E)
    tokens = torch.cat([visible, gather_tokens(masked, hidden)], dim=1)  # (B, n + H, E)
    after = block_after_qkv(block, tokens.flatten(0, 1), qkv.flatten(0, 1), ((B, tokens.shape[1]),))
    return after.view(tokens.shape)


def predicted_count(patches: int, mask_ratio: float, prediction_ratio: float | None) -> int:
    """Return the number of patches to predict: all hidden ones, or a share of all patches, rounded, where there are more."""
    hidden = patches - visible_count(patches, mask_ratio)
    return hidden if prediction_ratio is None else min(hidden, max(1, round(patches * prediction_ratio)))


def check_settings(
    backbone: Backbone,
    mask_ratio: float,
    prediction_ratio: float | None,
    decoder_embed_dim: int,
    decoder_depth: int,
    decoder_num_heads: int,
) -> None:
    """Raise UsageError for settings that are impossible for MAE."""
    if not backbone.supports_masking:
        raise UsageError(
            f"MAE needs a backbone that encodes visible patches alone, which a {type(backbone.model).__name__} cannot: choose "
            "a plain ViT, such as vit_base_patch16_224, or a Swin, such as swin_tiny_patch4_window7_224; or recipe=dino."
        )
    if not 0 < mask_ratio < 1:
        raise UsageError(
            f"mask_ratio={mask_ratio} is out of range: it is the share of patches to hide, more than 0 and less than 1 "
            "(the paper's is 0.75)."
        )
    patches = backbone.grid[0] * backbone.grid[1]
    if not 0 < visible_count(patches, mask_ratio) < patches:
        raise UsageError(
            f"mask_ratio={mask_ratio} leaves {visible_count(patches, mask_ratio)} of {patches} patches visible: at least "
            "one must be visible and one hidden. Change mask_ratio, or make patches smaller (backbone.patch_size)."
        )
    if prediction_ratio is not None and not 0 < prediction_ratio <= 1:
        raise UsageError(
            f"{prediction_ratio=} is out of range: it is the share of an image's patches to predict, more than 0, such as "
            "0.25; null predicts all hidden ones."
        )
    if decoder_depth < 1:
        raise UsageError(f"decoder_depth={decoder_depth} is too small: the decoder has at least one block.")
    if decoder_num_heads < 1 or decoder_embed_dim % decoder_num_heads or decoder_embed_dim % 4:
        raise UsageError(
            f"decoder_embed_dim={decoder_embed_dim} must be a multiple of 4 and of decoder_num_heads={decoder_num_heads}."
        )
