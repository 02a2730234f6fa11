"""Vision transformers (Dosovitskiy et al. 2021): any timm `VisionTransformer`, which can encode visible patches only."""

from collections.abc import Iterable

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from sslvision.backbones.backbone import Backbone
from sslvision.errors import UsageError
from sslvision.nn.activation_checkpointing import run_checkpointed
from sslvision.nn.attention import attention_weights, block_joined, block_part, divisible
from sslvision.nn.autocast import to_autocast_dtype
from sslvision.nn.compilation import compile_module, compiled, share_graphs
from sslvision.nn.image_size import indivisible
from sslvision.nn.patches import gather_patches, gather_tokens, patchify
from sslvision.nn.position import sincos_position


class ViT(Backbone):
    """A timm ViT of any size, patch and image size, with or without class and register tokens.

    Raises:
        UsageError: The image size is not a multiple of the patch size.
    """

    supports_masking = True
    block_functions = ("block_part", "block_joined")

    # B images, L patches of an image, K of them visible, P class and register tokens, D width, p patch side

    def __init__(self, model: VisionTransformer):
        super().__init__()
        embed = model.patch_embed
        self.model = model
        self.image_size, self.grid = embed.img_size, embed.grid_size
        self.channels, self.embed_dim = model.in_chans, model.embed_dim
        self.stride = embed.patch_size[0]
        self.num_prefix = model.num_prefix_tokens
        self.block_part, self.block_joined = block_part, block_joined
        wrong = indivisible(self.image_size, self.stride)
        if embed.patch_size[0] != embed.patch_size[1] or wrong:
            raise UsageError(
                f"Images of {self.image_size[0]}x{self.image_size[1]} pixels cannot be divided into patches of "
                f"{embed.patch_size[0]}x{embed.patch_size[1]}: give square patches, and a backbone.image_size with each side "
                f"a multiple of backbone.patch_size{wrong}."
            )

    def encode(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encode all patches, or only the visible patches `keep` (B, K). See Backbone.encode.

        Without `keep`, images may differ in size from `image_size`: position embeddings are then resampled.
        """
        return self.model.norm(self._attend(self.model.blocks, self._embed(images, keep)))  # (B, P+L or P+K, D)

    def forward(self, *images: Tensor) -> Tensor:
        """Return features (B, D) of images, all sizes at once. The last block computes class tokens only."""
        *blocks, last = self.model.blocks
        if self.model.global_pool != "token" or not all(map(divisible, self.model.blocks)):
            return super().forward(*images)
        embedded = [self._embed(one) for one in images]  # each (B, P+L, D)
        sizes = tuple((tokens.shape[0], tokens.shape[1]) for tokens in embedded)
        checkpointed = self.activation_checkpointing and self.training
        joined = torch.cat([tokens.flatten(0, 1) for tokens in embedded])  # (T, D)
        for block in blocks:
            joined = run_checkpointed(self.block_joined, block, joined, sizes, enabled=checkpointed)
        of_size = joined.split([B * N for B, N in sizes])
        features = [
            run_checkpointed(
                self.block_part,
                last,
                tokens.view(B, N, -1),
                slice(0, 1),
                enabled=checkpointed,
            )  # (B, 1, D)
            for tokens, (B, N) in zip(of_size, sizes, strict=True)
        ]
        return self.pool(self.model.norm(torch.cat(features)))

    def _embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the input of the first block (B, P+L or P+K, D)."""
        model, projection = self.model, self.model.patch_embed.proj
        images = to_autocast_dtype(images)  # as the projection would convert its patches
        # (B, L or K, C * p * p)
        patches = (
            patchify(images, self.stride) if keep is None else gather_patches(images, keep, self.stride).flatten(2)
        )
        # A convolution with stride = kernel size is a matrix product.
        tokens = F.linear(patches, projection.weight.flatten(1), projection.bias)  # (B, L or K, D)
        grid = (images.shape[2] // self.stride, images.shape[3] // self.stride)
        tokens = self._add_prefix(model.patch_embed.norm(tokens), keep, grid)  # (B, P+L or P+K, D)
        return to_autocast_dtype(model.norm_pre(model.patch_drop(model.pos_drop(tokens))))

    def blocks(self) -> list[nn.Module]:
        """See Backbone.blocks."""
        return list(self.model.blocks)

    def compile_blocks(self) -> None:
        """See Backbone.compile_blocks."""
        share_graphs(self.model)
        for block in self.model.blocks:
            compile_module(block)
        self.block_part, self.block_joined = compiled(block_part), compiled(block_joined)

    def _attend(self, blocks: Iterable[nn.Module], tokens: Tensor) -> Tensor:
        """Run blocks on tokens (B, N, D), with activation checkpointing if enabled."""
        for block in blocks:
            tokens = run_checkpointed(block, tokens, enabled=self.activation_checkpointing and self.training)
        return tokens

    def _add_prefix(self, tokens: Tensor, keep: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Add position embeddings and prepend class and register tokens, in timm's order."""
        model, B = self.model, tokens.shape[0]
        prefix = [token.expand(B, -1, -1) for token in (model.cls_token, model.reg_token) if token is not None]
        if model.pos_embed is None:
            return torch.cat([*prefix, tokens], dim=1)
        first = model.pos_embed.shape[1] - self.grid[0] * self.grid[1]  # P, or 0 when prefix tokens have no position
        position = model.pos_embed
        if tuple(grid) != tuple(self.grid):
            position = resample_abs_pos_embed(position, list(grid), list(self.grid), num_prefix_tokens=first)
        indices = position[:, first:]  # (1, rows * columns, D)
        tokens = tokens + (indices if keep is None else gather_tokens(indices, keep))
        tokens = torch.cat([*prefix, tokens], dim=1)
        if first:
            tokens = torch.cat([tokens[:, :first] + position[:, :first], tokens[:, first:]], dim=1)
        return tokens

    @property
    def has_attention_maps(self) -> bool:
        """Return whether the class token is the feature, and the last block's attention can be computed."""
        return self.model.global_pool == "token" and divisible(self.model.blocks[-1])

    def attention_maps(self, images: Tensor) -> Tensor:
        """Return the attention weights of the class token to patches in the last block, (B, heads, rows, columns).

        Over the patches they sum to 1 less the attention to class and register tokens.
        """
        assert self.has_attention_maps
        *blocks, last = self.model.blocks
        tokens = self._attend(blocks, self._embed(images))
        return attention_weights(last, tokens, slice(0, 1))[:, :, 0, self.num_prefix :].unflatten(2, self.grid)

    def encode_with_attention(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of `encode` and the `attention_maps` of images, computed in one pass."""
        assert self.has_attention_maps
        *blocks, last = self.model.blocks
        tokens = self._attend(blocks, self._embed(images))
        maps = attention_weights(last, tokens, slice(0, 1))[:, :, 0, self.num_prefix :].unflatten(2, self.grid)
        return self.model.norm(self._attend([last], tokens)), maps

    def pool(self, tokens: Tensor) -> Tensor:
        """Pool as the timm model does (`global_pool` "token" or "avg"), so that exported models give the same features."""
        return self.model.forward_head(tokens, pre_logits=True)  # (B, D)

    def use_sincos_positions(self) -> None:
        """Replace the position embeddings by fixed 2-D sine-cosine embeddings, which are not trained."""
        position = self.model.pos_embed
        if position is None:
            raise UsageError(
                "This ViT has no absolute position embeddings; MAE needs them: choose another backbone.name."
            )
        first = position.shape[1] - self.grid[0] * self.grid[1]
        with torch.no_grad():
            position.copy_(sincos_position(self.embed_dim, self.grid, num_prefix=first))
        position.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialize as in the MAE paper (appendix A.1): Xavier-uniform matrices, tokens normal with deviation 0.02."""
        init_transformer(self.model)
        nn.init.xavier_uniform_(self.model.patch_embed.proj.weight.view(self.embed_dim, -1))
        for token in (self.model.cls_token, self.model.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)


def init_transformer(module: nn.Module) -> None:
    """Initialize linear layers Xavier-uniform with zero bias, and norms as the identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm) and layer.elementwise_affine:
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
