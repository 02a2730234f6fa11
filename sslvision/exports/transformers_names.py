"""Classes of transformers that compute what a timm model computes, and the names of its weights there.

The names are those of the files on the hub, which transformers 5 renames when it loads them.
"""

from typing import Any, NamedTuple

from timm.layers import Mlp
from torch import Tensor, nn

from sslvision.backbones.load import Loaded
from sslvision.backbones.swin import Swin
from sslvision.backbones.vit import ViT
from sslvision.nn.attention import divisible


class Counterpart(NamedTuple):
    """A network of transformers.

    Attributes:
        kind: "ViT", "Dinov2" or "Swin": the beginning of the names of its classes.
        config: Its configuration, without labels.
        state: Its weights without a head, under the names of ...Model.
    """

    kind: str
    config: dict[str, Any]
    state: dict[str, Tensor]

    @property
    def prefix(self) -> str:
        """Return what names begin with in a classifier."""
        return f"{self.kind.lower()}."


def counterpart(loaded: Loaded) -> Counterpart | str:
    """Return the network of transformers' own classes that equals a backbone; or why there is none, in words."""
    backbone = loaded.backbone
    if backbone.image_size[0] != backbone.image_size[1]:
        return "images are not square"
    if isinstance(backbone, ViT):
        why = differs_from_vit(backbone)
        return why or (dinov2(backbone) if scales_layers(backbone.model) else vit(backbone))
    if isinstance(backbone, Swin):
        return differs_from_swin(backbone) or swin(backbone)
    return f"transformers' own classes of a {type(backbone.model).__name__} have other layers"


def differs_from_vit(backbone: ViT) -> str:
    """Return in what a ViT differs from those of transformers; "" if in nothing."""
    model, blocks = backbone.model, list(backbone.model.blocks)
    if model.global_pool != "token" or model.cls_token is None:
        return "its feature is a mean of patches, and that of transformers' ViT the class token"
    if model.reg_token is not None:
        return "it has register tokens"
    if model.pos_embed is None or model.pos_embed.shape[1] != backbone.grid[0] * backbone.grid[1] + 1:
        return "its class token has no position"
    if not all(divisible(block) and type(block.mlp) is Mlp for block in blocks):
        return "its blocks are not plain"
    parts = [model.norm_pre, model.patch_embed.norm, model.fc_norm]
    parts += [
        part for block in blocks for part in (block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm)
    ]
    if not all(isinstance(part, nn.Identity) for part in parts):
        return "it has more norms"
    attention, width = blocks[0].attn, backbone.embed_dim
    if attention.qkv.bias is None or attention.num_heads * attention.head_dim != width:
        return "its attention has no biases, or heads of another width"
    if not all(is_gelu(block.mlp.act) for block in blocks) or len({norm.eps for norm in norms(model)}) != 1:
        return "it has another activation than GELU, or norms that differ"
    return ""


def differs_from_swin(backbone: Swin) -> str:
    """Return in what a Swin differs from that of transformers; "" if in nothing."""
    blocks = [block for stage in backbone.model.layers for block in stage.blocks]
    if not backbone.windows_divide:
        return "its windows do not divide the maps, which transformers pads"
    if len({tuple(block.attn.window_size) for block in blocks}) != 1 or len(set(blocks[0].attn.window_size)) != 1:
        return "its stages have different windows"
    if any(block.attn.qkv.weight.shape[0] != 3 * block.attn.qkv.weight.shape[1] for block in blocks):
        return "its heads have another width"
    if not all(is_gelu(block.mlp.act) for block in blocks) or {norm.eps for norm in norms(backbone.model)} != {1e-5}:
        return "it has another activation than GELU, or norms that differ"
    return ""


def is_gelu(activation: Any) -> bool:
    """Return whether an activation is the exact GELU."""
    return isinstance(activation, nn.GELU) and activation.approximate == "none"


def norms(model: Any) -> list[nn.LayerNorm]:
    """Return the layer norms of a network."""
    return [module for module in model.modules() if isinstance(module, nn.LayerNorm)]


def scales_layers(model: Any) -> bool:
    """Return whether a ViT has LayerScale, as DINOv2."""
    return not isinstance(model.blocks[0].ls1, nn.Identity)


def vit(backbone: ViT) -> Counterpart:
    """Return ViTModel. Its pooler, of a matrix and an activation, is the identity: pooler_output is the class token."""
    model = backbone.model
    config = of_transformer(backbone) | {"model_type": "vit", "pooler_act": "linear", "encoder_stride": backbone.stride}
    config["intermediate_size"] = model.blocks[0].mlp.fc1.out_features
    state = embeddings(model)
    for number, block in enumerate(model.blocks):
        at = f"encoder.layer.{number}."
        state |= attention(block.attn, at, "attention.attention", "attention.output.dense")
        state |= named(block.norm1, f"{at}layernorm_before") | named(block.norm2, f"{at}layernorm_after")
        state |= named(block.mlp.fc1, f"{at}intermediate.dense") | named(block.mlp.fc2, f"{at}output.dense")
    return Counterpart("ViT", config, state | named(model.norm, "layernorm") | identity(backbone.embed_dim))


def dinov2(backbone: ViT) -> Counterpart:
    """Return Dinov2Model, a ViT with LayerScale."""
    model = backbone.model
    ratio = model.blocks[0].mlp.fc1.out_features // backbone.embed_dim
    config = of_transformer(backbone) | {"model_type": "dinov2", "mlp_ratio": ratio, "use_mask_token": False}
    state = embeddings(model)
    for number, block in enumerate(model.blocks):
        at = f"encoder.layer.{number}."
        state |= attention(block.attn, at, "attention.attention", "attention.output.dense")
        state |= named(block.norm1, f"{at}norm1") | named(block.norm2, f"{at}norm2")
        state |= named(block.mlp.fc1, f"{at}mlp.fc1") | named(block.mlp.fc2, f"{at}mlp.fc2")
        state |= {f"{at}layer_scale1.lambda1": block.ls1.gamma, f"{at}layer_scale2.lambda1": block.ls2.gamma}
    return Counterpart("Dinov2", config, state | named(model.norm, "layernorm"))


def swin(backbone: Swin) -> Counterpart:
    """Return SwinModel. timm merges patches at the beginning of a stage, transformers at the end of the one before."""
    model = backbone.model
    first = model.layers[0].blocks[0]
    config = {
        "model_type": "swin",
        "image_size": backbone.image_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": backbone.channels,
        "embed_dim": model.embed_dim,
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in model.layers],
        "window_size": first.attn.window_size[0],
        "mlp_ratio": first.mlp.fc1.out_features / first.mlp.fc1.in_features,
        "qkv_bias": first.attn.qkv.bias is not None,
        "drop_path_rate": 0.0,
        "encoder_stride": backbone.stride,
        "layer_norm_eps": 1e-5,
    }
    state = named(model.patch_embed.proj, "embeddings.patch_embeddings.projection")
    state |= named(model.patch_embed.norm, "embeddings.norm")
    for level, stage in enumerate(model.layers):
        if level:
            before = f"encoder.layers.{level - 1}.downsample"
            state |= named(stage.downsample.reduction, f"{before}.reduction") | named(
                stage.downsample.norm, f"{before}.norm"
            )
        for number, block in enumerate(stage.blocks):
            at = f"encoder.layers.{level}.blocks.{number}."
            state |= attention(block.attn, at, "attention.self", "attention.output.dense")
            state[f"{at}attention.self.relative_position_bias_table"] = block.attn.relative_position_bias_table
            state |= named(block.norm1, f"{at}layernorm_before") | named(block.norm2, f"{at}layernorm_after")
            state |= named(block.mlp.fc1, f"{at}intermediate.dense") | named(block.mlp.fc2, f"{at}output.dense")
    return Counterpart("Swin", config, state | named(model.norm, "layernorm"))


def of_transformer(backbone: ViT) -> dict[str, Any]:
    """Return what the configurations of ViT and DINOv2 have in common."""
    model = backbone.model
    return {
        "hidden_size": backbone.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm.eps,
        "image_size": backbone.image_size[0],
        "patch_size": backbone.stride,
        "num_channels": backbone.channels,
        "qkv_bias": True,
    }


def embeddings(model: Any) -> dict[str, Tensor]:
    """Return the weights before the blocks of a ViT."""
    state = {"embeddings.cls_token": model.cls_token, "embeddings.position_embeddings": model.pos_embed}
    return state | named(model.patch_embed.proj, "embeddings.patch_embeddings.projection")


def attention(module: Any, at: str, inside: str, projection: str) -> dict[str, Tensor]:
    """Return queries, keys and values apart, and the projection after them."""
    state = named(module.proj, f"{at}{projection}")
    for kind, tensor in module.qkv.named_parameters():
        for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            state[f"{at}{inside}.{name}.{kind}"] = part
    return state


def named(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the parameters of a module under another name."""
    return {f"{name}.{kind}": tensor for kind, tensor in module.named_parameters()}


def identity(width: int) -> dict[str, Tensor]:
    """Return the weights of a pooler that changes nothing."""
    layer = nn.Linear(width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return named(layer, "pooler.dense")
