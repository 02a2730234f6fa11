"""Loading weights with checks of names, shapes and finite values."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from sslvision.errors import UsageError


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
