"""Loading weights with checks of names, shapes and finite values."""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.released import (
    INSTEAD_OF_TRANSFORMERS,
    OF_VIT,
    find_network,
    is_of_transformers,
    network_under,
    vit_arguments,
)
from sslvision.errors import UsageError

# Rows and columns that position embeddings and bias tables are for, by tensor name.
Grids = Mapping[str, tuple[int, int]]


def load_fitting(module: nn.Module, state: Mapping[str, Tensor], where: str | Path) -> None:
    """Load a state dict strictly. Raises UsageError that names differing names and shapes, or tensors with NaN or infinity."""
    check_fit(module.state_dict(), state, where)
    refuse_nonfinite(state, where)
    module.load_state_dict(state)


def refuse_nonfinite(state: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise UsageError if tensors contain NaN or infinity."""
    wrong = {name: int((~value.float().isfinite()).sum()) for name, value in state.items() if value.is_floating_point()}
    wrong = {name: count for name, count in wrong.items() if count}
    if wrong:
        some = ", ".join(f"{count:,} of {state[name].numel():,} in {name}" for name, count in list(wrong.items())[:5])
        more = f", and in {len(wrong) - 5} more tensors" if len(wrong) > 5 else ""
        raise UsageError(
            f"The weights of {where} are not all numbers (NaN or infinity): {some}{more}. They come from training that "
            "diverged or from a damaged file: use another one."
        )


def check_fit(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str | Path, *, shapes: bool = True
) -> None:
    """Raise UsageError if names or, unless `shapes` is False, shapes differ."""
    wrong = [f"{name} is missing" for name in own.keys() - state.keys()]
    wrong += [f"{name} is not in this model" for name in state.keys() - own.keys()]
    wrong += [
        f"{name} is {tuple(state[name].shape)} there and {tuple(value.shape)} here"
        for name, value in own.items()
        if shapes and name in state and state[name].shape != value.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UsageError(f"The weights of {where} do not fit this model: {'; '.join(sorted(wrong)[:5])}{more}.")


def grids_of(model: Any) -> dict[str, tuple[int, int]]:
    """Return rows and columns of patches that a timm model's position embeddings are for, and of windows of its bias tables."""
    grids = {
        f"{name}.relative_position_bias_table": tuple(module.window_size)
        for name, module in model.named_modules()
        if hasattr(module, "relative_position_bias_table") and isinstance(getattr(module, "window_size", None), tuple)
    }
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return grids if grid is None else {**grids, "pos_embed": tuple(grid)}


def backbone_weights(
    tensors: Mapping[str, Tensor], backbone: Backbone, where: str | Path, *, prefer: str, made_for: Grids
) -> tuple[dict[str, Tensor], set[str], list[str]]:
    """Find a backbone's weights among the tensors of a checkpoint, and resample positions made for another image size.

    Args:
        tensors: Tensors by dotted names, from `flat_tensors`.
        backbone: The backbone that gets them.
        where: The file, for messages.
        prefer: Word in the prefix of the network to use if there are several, such as "student".
        made_for: `grids_of` the network there, as far as they are known; others are taken for squares.

    Returns:
        The state dict of `backbone.model`, the names of the tensors it was made from, and what was changed, in words.

    Raises:
        UsageError: There is no such network, or it does not fit.
    """
    own = backbone.model.state_dict()
    prefix = find_network(tensors, [*own, *OF_VIT], prefer=prefer)
    if prefix is None:
        some = ", ".join(list(tensors)[:3]) or "no tensors"
        hint = f" {INSTEAD_OF_TRANSFORMERS}" if is_of_transformers(tensors) else ""
        raise UsageError(f"The weights of {where} do not fit this model: it has none of its names, but {some}.{hint}")
    state = network_under(tensors, prefix)
    parts = {name.partition(".")[0] for name in [*own, "reg_token"]}
    state = {name: value for name, value in state.items() if name in own or name.partition(".")[0] in parts}
    state = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")} | state
    state, changes = resampled(own, state, grids_of(backbone.model) | {"pos_embed": backbone.grid}, made_for)
    try:
        check_fit(own, state, where)
    except UsageError as error:
        hint = f" {INSTEAD_OF_TRANSFORMERS}" if is_of_transformers(tensors) else _what_it_is(state, own)
        raise UsageError(f"{error}{hint}") from None
    refuse_nonfinite(state, where)
    used = {
        name for name in tensors if name.startswith(prefix) and name.removeprefix(prefix) in {*state, "register_tokens"}
    }
    return state, used, changes


def resampled(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], grids: Grids, made_for: Grids
) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights whose position embeddings and tables of relative positions are interpolated to another image size.

    Args:
        own: Tensors of the shapes that are needed.
        state: The weights.
        grids, made_for: `grids_of` both; where they are not known, grids are squares.

    Returns:
        The weights, and what was changed, in words.
    """
    fitted, tables = dict(state), 0
    changes = []
    for name, here in own.items():
        there, grid = state.get(name), grids.get(name)
        if there is None or there.ndim != here.ndim or there.shape[-1:] != here.shape[-1:]:
            continue
        if name == "pos_embed" and there.ndim == 3 and grid is not None:
            prefix = here.shape[1] - grid[0] * grid[1]
            side = math.isqrt(max(0, there.shape[1] - prefix))
            rows, columns = made_for.get(name, (side, side))
            if (rows, columns) != grid and rows * columns == there.shape[1] - prefix:
                fitted[name] = resample_abs_pos_embed(there, [*grid], [rows, columns], num_prefix_tokens=prefix)
                changes.append(f"position embeddings interpolated from {rows}x{columns} to {grid[0]}x{grid[1]} patches")
        elif name.endswith("relative_position_bias_table") and (
            there.shape != here.shape or made_for.get(name, grid) != grid
        ):
            side = (math.isqrt(here.shape[0]) + 1) // 2
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about timm's interpolation
                fitted[name] = resize_rel_pos_bias_table(
                    there, grid or (side, side), tuple(here.shape), old_window_size=made_for.get(name)
                )
            tables += 1
    if tables:
        changes.append(f"{tables} tables of relative positions interpolated to the windows here")
    return fitted, changes


def _what_it_is(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return the settings under which a ViT of these weights is built, if it is one and this model is another ViT."""
    if any(name not in state for name in OF_VIT) or any(name not in own for name in OF_VIT):
        return ""
    try:
        arguments = vit_arguments(state, heads=1)[1]
    except UsageError:
        return ""
    keys = ("patch_size", "embed_dim", "depth", "reg_tokens", "no_embed_class", "init_values", "mlp_ratio")
    asked = [f"backbone.{key}={str(arguments[key]).lower()}" for key in keys if key in arguments]
    return f" Its network is a ViT with {' '.join(asked)} and data.channels={arguments['in_chans']}: set these."
