"""The layers of a timm model in order of depth, and freezing the lowest of them."""

from typing import Any

from timm.models import group_parameters
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import nn

from sslvision.errors import UsageError


def layers(model: Any, *, stages: bool = False) -> list[list[str]]:
    """Return the names of a timm model's parameters, layer by layer from the input to the head.

    Args:
        model: A timm model with its head.
        stages: Group by whole stages instead of single blocks; a plain ViT has no stages and is grouped by blocks.

    Returns:
        First the stem (patch embedding, class token, positions), then the blocks or stages, last the head. Layers after the
        last block, such as the final norm, belong to the head, as in MAE's layer-wise decay; timm assigns some of them to
        the last block.

    Raises:
        UsageError: timm does not know the model's layers.
    """
    try:
        matcher = model.group_matcher(coarse=stages)
    except (AttributeError, AssertionError) as error:
        raise UsageError(
            f"timm does not list the {'stages' if stages else 'blocks'} of a {type(model).__name__}, so they cannot be "
            "frozen or have learning rates of their own: set freeze=0, freeze_stages=0 and layer_decay=1, or choose "
            "another backbone."
        ) from error
    groups = [names for _, names in sorted(group_parameters(model, matcher).items())]
    last = _unmatched(model, matcher)
    top = max(number for number, names in enumerate(groups) if not last.issuperset(names))  # the last block
    body = [*groups[:top], [name for name in groups[top] if name not in last]]
    return [*body, [name for names in groups[top:] for name in names if name in last]]


def _unmatched(model: Any, matcher: Any) -> set[str]:
    """Return the names that belong to no block when parameters assigned to "the previous group" are not."""
    if isinstance(matcher, dict):
        matcher = {
            part: [one for one in patterns if one[1] != MATCH_PREV_GROUP] if isinstance(patterns, list) else patterns
            for part, patterns in ((part, list(p) if isinstance(p, tuple) else p) for part, p in matcher.items())
        }
    groups = group_parameters(model, matcher)
    return set(groups[max(groups)])


def freeze_lowest(model: Any, *, blocks: float = 0, stages: int = 0) -> list[str]:
    """Freeze the stem and the lowest blocks or stages. 0 freezes nothing, not even the stem.

    Args:
        model: A timm model with its head, which always trains.
        blocks: Number of blocks to freeze; below 1, the share of them (0.5 for the lower half), rounded, at least one.
        stages: Number of stages to freeze, instead.

    Returns:
        The names of the frozen parameters.

    Raises:
        UsageError: A number is out of range, or both are given.
    """
    if blocks and stages:
        raise UsageError(f"freeze={blocks:g} and freeze_stages={stages} exclude each other: leave one of them 0.")
    if not blocks and not stages:
        return []
    setting, unit, asked = ("freeze_stages", "stages", stages) if stages else ("freeze", "blocks", blocks)
    *body, _ = layers(model, stages=bool(stages))
    there = len(body) - 1
    count = max(1, round(asked * there)) if 0 < asked < 1 and not stages else asked
    if not 0 < count <= there or count != int(count):
        share = " or a share below 1" if not stages else ""
        raise UsageError(
            f"{setting}={asked:g} is out of range: this {type(model).__name__} has {there} {unit}, so it must be a whole "
            f"number from 0 to {there}{share}."
        )
    frozen = [name for names in body[: int(count) + 1] for name in names]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def eval_frozen(model: nn.Module) -> None:
    """Put every module whose parameters are all frozen into eval mode. Call it after every `model.train()`.

    This also freezes the running statistics of batch norms, and disables dropout and drop-path.
    """
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
