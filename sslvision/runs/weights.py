"""Weights in from anywhere, and the export that plain timm loads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.fitting import load_fitting
from sslvision.errors import UsageError
from sslvision.methods.base import Method
from sslvision.runs.checkpoint import newest_good
from sslvision.runs.torch_files import is_archive, load_plain, verify


def export_backbone(
    backbone: Backbone, folder: Path, *, mean: list[float], std: list[float], classes: Sequence[str] | None = None
) -> None:
    """Write model.safetensors and config.json, in timm's own format and under timm's parameter names.

    Both ways of timm load it, the first without knowing anything of the model:
        timm.create_model("local-dir:<folder>", pretrained=True, num_classes=K)
        timm.create_model(name, num_classes=0, checkpoint_path="<folder>/model.safetensors", **model_args)
    where name and model_args stand in config.json. A classifier has its head in the file, and the first way loads it whole
    where num_classes is left out.

    Args:
        backbone: the pretrained backbone, or a classifier: one whose `model.reset_classifier` was called.
        folder: is made if need be.
        mean, std: of the pixels in pretraining, per channel; they go into the file, so users need not guess.
        classes: what the outputs of a classifier stand for, as many as it has.
    """
    names = list(classes or ())
    assert backbone.model.num_classes == len(names), "a classifier is exported with the names of its classes"
    size, known = (backbone.channels, *backbone.image_size), backbone.model.pretrained_cfg
    pretrained = {
        "tag": "sslvision",
        "input_size": size,
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "first_conv": known.get("first_conv"),
        "classifier": known.get("classifier"),
        "num_classes": len(names),
    }
    model = backbone.model
    model.pretrained_cfg = {"architecture": known["architecture"], **pretrained}  # timm looks for the name here
    apart = model.register_state_dict_post_hook(_part_tensors)
    try:
        save_for_hf(
            model,
            str(folder),
            model_config=pretrained | ({"label_names": names} if names else {}),
            model_args=dict(backbone.arguments),
            safe_serialization=True,
        )
    finally:
        apart.remove()
    config = json.loads((folder / "config.json").read_text())
    config["model_args"].pop("num_classes", None)  # the reader's to choose
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _part_tensors(module: Any, state: dict[str, Tensor], *_: Any) -> None:
    """Give tensors that share memory, as CoaT's do, each their own: the file format asks for it."""
    for name, tensor in state.items():
        state[name] = tensor.detach().clone()


def load_weights(method: Method, path: str | Path) -> str:
    """Start `method` from other weights (not from another run's optimizer or position): `init_from=`.

    Args:
        method: whose weights are replaced.
        path: a run folder, a Lightning checkpoint of the same method, or backbone weights under timm's names (.safetensors,
            .pth, an export folder).

    Returns:
        What was loaded, in words.

    Raises:
        UsageError: no such file; it is damaged; it holds more than weights; or these do not fit: some of the differing names
            and shapes are told.
    """
    file = find_weights(Path(path))
    state = _read(file)
    if "state_dict" in state:
        load_fitting(method, state["state_dict"], file)
        return f"all weights of {file}"
    tensors = {name: value for name, value in state.get("model", state).items() if isinstance(value, Tensor)}
    own = method.pretrained().model.state_dict()
    for module in method.modules():
        if isinstance(module, Backbone):  # DINO has two: the student's and the teacher's
            load_fitting(module.model, {name: value for name, value in tensors.items() if name in own}, file)
    left = len(tensors) - len(own)
    return f"the backbone's weights of {file}" + (f" ({left} other tensors left aside)" if left > 0 else "")


def _read(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return dict(load_file(file))
    if is_archive(file):
        verify(file)
    return load_plain(file)


def find_weights(path: Path) -> Path:
    """Return the weight file that a run folder, an export folder or a path means; of checkpoints the newest whole one.

    Raises:
        UsageError: there is none, or none that is whole.
    """
    if path.is_file():
        return path
    found = newest_good(path / "checkpoints")
    if found.path is not None:
        return found.path
    if found.damaged:
        raise UsageError(f"No checkpoint in {path} is whole. {' '.join(found.damaged.values())}")
    for candidate in (path / "model.safetensors", path / "export" / "model.safetensors"):
        if candidate.is_file():
            return candidate
    raise UsageError(f"{path} holds no weights: give a run folder, a .ckpt, a .safetensors or a .pth file.")
