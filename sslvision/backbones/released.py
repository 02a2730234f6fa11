"""Reading checkpoints in the formats of MAE's and DINO's authors."""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError
from sslvision.system.checkpoint_folders import is_folder_of_shards, read_folder
from sslvision.system.torch_files import is_archive, load_plain, refuse_other_kinds, verify

NO_WEIGHTS = ("optim", "scaler", "loops", "callbacks", "lr_scheduler")  # keys of a checkpoint
PREFERRED = ("ema", "encoder_q", "base_encoder", "online", "student")
HEADS = ("decoder", "mask_token", "head", "fc.", "projection_head", "prototypes", "projector", "predictor", "queue")
OF_VIT = ("patch_embed.proj.weight", "cls_token", "pos_embed", "blocks.0.norm1.weight", "blocks.0.mlp.fc1.weight")
OF_RESNET = ("layer1.0.conv1.weight", "conv1.weight", "bn1.weight", "layer4.0.conv1.weight")
INSTEAD_OF_TRANSFORMERS = (
    "Give the timm model with the same weights, such as vit_base_patch16_224.mae or vit_small_patch14_dinov2.lvd142m "
    "(timm.list_pretrained() lists all), or the checkpoint that its authors published."
)
RESNETS = {  # kind, blocks, channels of the first block
    ("basic", (2, 2, 2, 2), 64): "resnet18",
    ("basic", (3, 4, 6, 3), 64): "resnet34",
    ("bottleneck", (3, 4, 6, 3), 64): "resnet50",
    ("bottleneck", (3, 4, 23, 3), 64): "resnet101",
    ("bottleneck", (3, 8, 36, 3), 64): "resnet152",
    ("bottleneck", (3, 4, 6, 3), 128): "wide_resnet50_2",
    ("bottleneck", (3, 4, 23, 3), 128): "wide_resnet101_2",
}


def read_released(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint, given as a file, a folder of shards or its content. Nothing in a file is executed.

    Of a folder the state of optimizers is left on the disk.

    Raises:
        UsageError: The file does not exist, is damaged, or contains more than weights and plain containers.
    """
    if not isinstance(checkpoint, (str, Path)):
        return dict(checkpoint)
    file = Path(checkpoint)
    if is_folder_of_shards(file):
        return read_folder(file, without=NO_WEIGHTS)
    if not file.is_file():
        raise UsageError(f"{file} does not exist: give a .pth file or a .safetensors file.")
    refuse_other_kinds(file)
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        if is_archive(file):
            verify(file)
        content: Any = load_plain(file)
        if isinstance(content, Mapping):
            return dict(content)
        raise ValueError(f"it holds a {type(content).__name__}, and not weights by name.")
    except UsageError:
        raise
    except Exception as error:  # other and damaged files raise many types of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{file} cannot be read as weights: {reason} Give a .pth file of tensors in plain containers, or a "
            ".safetensors file."
        ) from error


def flat_tensors(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, but for optimizers, under dotted names: "teacher.module.backbone.cls_token"."""
    found: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping) and not str(key).startswith(NO_WEIGHTS):
            found |= flat_tensors(value, f"{prefix}{key}.")
    return found


def find_network(tensors: Mapping[str, Tensor], names: Collection[str], *, prefer: str = "teacher") -> str | None:
    """Return the prefix under which most of `names` are found among the tensors of a checkpoint; None if none are.

    Of several that have as many, it is the one that contains `prefer`, and then the order of PREFERRED: a teacher or average
    before a student, the encoder that is trained before the one that follows it.
    """
    known = set(names)
    counts: Counter[str] = Counter()
    for full in tensors:
        parts = full.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in known:
                counts[".".join([*parts[:start], ""]) if start else ""] += 1
    if not counts:
        return None
    order = [prefer, *PREFERRED]

    def rank(prefix: str) -> tuple[int, int]:
        return counts[prefix], -next((place for place, word in enumerate(order) if word in prefix), len(order))

    return max(counts, key=rank)


def network_under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix, with timm's names; those of DINOv2 (registers, SwiGLU) are translated."""
    state = part_of(tensors, prefix)
    if "register_tokens" in state:  # in timm neither class nor register tokens have a position
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    return {name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v for name, v in state.items()}


def is_of_transformers(tensors: Collection[str]) -> bool:
    """Return whether weights have the names that the library transformers gives them."""
    return any(".attention.attention." in name or "patch_embeddings" in name for name in tensors)


def released_network(
    file: str | Path, *, heads: int | None = None, image_size: tuple[int, int] | None = None
) -> tuple[str, dict[str, Tensor], dict[str, Any], str]:
    """Return the ViT or ResNet in a checkpoint that others published: timm's model name, weights, arguments, and what it is.

    That is MAE's encoder, DINO's teacher, a DINOv2 with or without registers, the ResNets of DINO, SwAV and MoCo, or the plain
    state dict of such a model, under any prefix. Heads, projections and decoders are left out.

    Args:
        file: A .pth or .safetensors file.
        heads: Number of attention heads, which weights do not tell; by default one per 64 channels (80 for ViT-H).
        image_size: Height and width of the images of a ViT whose positions are not those of a square.

    Raises:
        UsageError: The file cannot be read, or contains no such network.
    """
    content = read_released(file)
    if "pytorch-lightning_version" in content:
        raise UsageError(
            f"{file} is the checkpoint of a run: give the run's folder, whose export/ contains the backbone."
        )
    tensors = flat_tensors(content)
    for anchors in (OF_VIT, OF_RESNET):
        prefix = find_network(tensors, anchors)
        if prefix is None or f"{prefix}{anchors[0]}" not in tensors:
            continue
        state = network_under(tensors, prefix)
        state = {name: value for name, value in state.items() if not name.startswith(HEADS)}
        if missing := [name for name in anchors if name not in state]:
            raise UsageError(f"{file} is no whole network: it has {anchors[0]}, and no {', '.join(missing)}.")
        name, arguments = (
            vit_arguments(state, heads, image_size) if anchors is OF_VIT else resnet_arguments(state, file)
        )
        left = len(tensors) - len(state)
        words = ([f"under {prefix[:-1]}"] if prefix else []) + ([f"{left} other tensors left out"] if left else [])
        return name, state, arguments, f" ({', '.join(words)})" if words else ""
    if is_of_transformers(tensors):
        raise UsageError(f"{file} names its weights as transformers does. {INSTEAD_OF_TRANSFORMERS}")
    raise UsageError(
        f"{file} is no checkpoint of a ViT or ResNet as they are published for MAE, DINO, DINOv2, SwAV or MoCo: it has neither "
        f"{', '.join(OF_VIT[:2])} nor {OF_RESNET[0]}. For another network give a folder with config.json beside the weights "
        "(timm's save_for_hf), or in pretraining its backbone.name and init_from=."
    )


def vit_arguments(
    state: Mapping[str, Tensor], heads: int | None, image_size: tuple[int, int] | None = None
) -> tuple[str, dict[str, Any]]:
    """Return timm's name and arguments for a ViT with these weights. See vit_sizes."""
    sizes = vit_sizes(state, heads=heads, image_size=image_size)
    arguments = {"in_chans": sizes.pop("channels"), "img_size": sizes.pop("image_size"), **sizes}
    if "fc_norm.weight" in state:  # fine-tuned MAE has its final norm after pooling
        arguments |= {"global_pool": "avg", "fc_norm": True}
    if "blocks.0.ls1.gamma" in state:
        arguments |= {"init_values": 1e-5}
    if "reg_token" in state:
        arguments |= {"reg_tokens": state["reg_token"].shape[1], "no_embed_class": True}
    hidden, width = state["blocks.0.mlp.fc1.weight"].shape
    if state["blocks.0.mlp.fc2.weight"].shape[1] != hidden:
        raise UsageError(
            "The blocks of this ViT are of a kind (SwiGLU) whose weights do not tell timm's arguments: use timm's name, such "
            "as vit_giant_patch14_reg4_dinov2.lvd142m."
        )
    return "vit_base_patch16_224", arguments | ({"mlp_ratio": hidden / width} if hidden != 4 * width else {})


def resnet_arguments(state: Mapping[str, Tensor], file: str | Path) -> tuple[str, dict[str, Any]]:
    """Return timm's name and arguments for a ResNet with these weights."""
    blocks = tuple(len({name.split(".")[1] for name in state if name.startswith(f"layer{n}.")}) for n in range(1, 5))
    kind = ("bottleneck" if "layer1.0.conv3.weight" in state else "basic", blocks, len(state["layer1.0.conv2.weight"]))
    if kind not in RESNETS or len(state["conv1.weight"]) != 64:
        raise UsageError(
            f"{file} is a ResNet of {kind[0]} blocks {list(blocks)}, {kind[2]} channels wide in the first, which is none of "
            f"{', '.join(RESNETS.values())}: give an export folder instead."
        )
    return RESNETS[kind], {"in_chans": state["conv1.weight"].shape[1]}


def released_mae(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of an MAE with its decoder, under the names of the released checkpoints.

    Raises:
        UsageError: It is no MAE checkpoint, or has no decoder.
    """
    content = read_released(checkpoint)
    state: dict[str, Tensor] = dict(content.get("model", content))
    required = ("patch_embed.proj.weight", "decoder_pred.weight", "mask_token")
    if missing := [name for name in required if name not in state]:
        raise UsageError(
            f"This is no MAE checkpoint of the released format: it has no {', '.join(missing)}. Checkpoints without a "
            "decoder (such as mae_pretrain_vit_base.pth) load in timm itself: timm.create_model(..., checkpoint_path=...)."
        )
    return state


def released_dino(checkpoint: str | Path | Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], Tensor | None]:
    """Return the weights of "student" and "teacher" of a DINO checkpoint, and the center if there is one.

    Names are those of DINO here: "backbone.model..." and "head...". A checkpoint of a backbone alone is used for both.

    Raises:
        UsageError: It is not a DINO checkpoint of a ViT.
    """
    content = read_released(checkpoint)
    states = {}
    for whose in ("student", "teacher"):
        state = {name.removeprefix("module."): value for name, value in content.get(whose, content).items()}
        states[whose] = {
            name if name.startswith("head.") else f"backbone.model.{name.removeprefix('backbone.')}": value
            for name, value in state.items()
        }
    if "backbone.model.patch_embed.proj.weight" not in states["teacher"]:
        raise UsageError("This is no DINO checkpoint on a ViT: it has no patch_embed.proj.weight.")
    return states, content["dino_loss"]["center"] if "dino_loss" in content else None


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries of a state dict whose names start with `prefix`, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def vit_like(state: Mapping[str, Tensor], *, heads: int | None) -> Backbone:
    """Build a ViT with random weights, of the size that a state dict with timm's names has.

    Args:
        state: Weights with a class token and position embeddings of a square grid.
        heads: Number of attention heads, which weights do not tell; by default one per 64 channels (80 for ViT-H).
    """
    return build_backbone("vit_base_patch16_224", **vit_sizes(state, heads=heads))


def vit_sizes(
    state: Mapping[str, Tensor], *, heads: int | None, image_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return the arguments of `build_backbone` for a ViT with these weights. See vit_like.

    Raises:
        UsageError: `heads` is not given and cannot be inferred from this width; or the positions are not those of a square,
            nor of `image_size`.
    """
    width, channels, patch = state["patch_embed.proj.weight"].shape[:3]
    usual = 80 if width == 1280 else 64
    if heads is None and width % usual:
        raise UsageError(
            f"The width {width} of this ViT is not a multiple of the usual {usual} channels per head, and weights do not tell "
            "the number of its attention heads: set num_heads."
        )
    return {
        "image_size": _size_of_positions(state, patch, image_size),
        "channels": channels,
        "patch_size": patch,
        "embed_dim": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_heads": heads or width // usual,
    }


def _size_of_positions(
    state: Mapping[str, Tensor], patch: int, image_size: tuple[int, int] | None
) -> int | tuple[int, int]:
    """Return the image size that position embeddings are for: of a square, or `image_size` if it has as many patches."""
    positions = state["pos_embed"].shape[1] - ("reg_token" not in state)
    side = math.isqrt(positions)
    if side**2 == positions:
        return side * patch
    if image_size is None or image_size[0] // patch * (image_size[1] // patch) != positions:
        raise UsageError(
            f"The {positions} positions of this ViT are not those of a square, and weights do not tell rows and columns: give "
            f"the size that it was made for, backbone.image_size=[height,width], of patches of {patch}x{patch} pixels."
        )
    return image_size
