"""Loading weights of any format, and the export that plain timm loads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import Tensor

from sslvision.augment.crops import CROP_PCT
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

    timm loads it in two ways, the first without knowledge of the model:
        timm.create_model("local-dir:<folder>", pretrained=True, num_classes=K)
        timm.create_model(name, num_classes=0, checkpoint_path="<folder>/model.safetensors", **model_args)
    where name and model_args are in config.json. The file of a classifier contains its head; the first way loads it if
    num_classes is omitted. timm.data.create_transform(**timm.data.resolve_model_data_config(model)) is how images were
    evaluated: `backbone.crop_pct`, `mean` and `std`.

    Args:
        backbone: Pretrained backbone, or a classifier: one whose `model.reset_classifier` was called.
        folder: Folder, created if it does not exist.
        mean, std: Pixel statistics of pretraining per channel, which are stored in the file.
        classes: Class names of a classifier, one for each output.
    """
    names = list(classes or ())
    assert backbone.model.num_classes == len(names), "a classifier is exported with its class names"
    size, known = (backbone.channels, *backbone.image_size), backbone.model.pretrained_cfg
    pretrained = {
        "tag": "sslvision",
        "input_size": size,
        "mean": mean,
        "std": std,
        "interpolation": "bicubic",
        "crop_pct": backbone.crop_pct or CROP_PCT,
        "crop_mode": "center",  # exports without it were written when crop_pct was not yet recorded
        "first_conv": known.get("first_conv"),
        "classifier": known.get("classifier"),
        "num_classes": len(names),
    }
    model = backbone.model
    model.pretrained_cfg = {"architecture": known["architecture"], **pretrained}  # where timm looks for the name
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
    config["model_args"].pop("num_classes", None)  # chosen when loading
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _part_tensors(module: Any, state: dict[str, Tensor], *_: Any) -> None:
    """Copy tensors that share memory, as in CoaT: the file format requires it."""
    for name, tensor in state.items():
        state[name] = tensor.detach().clone()


def load_weights(method: Method, path: str | Path) -> str:
    """Start `method` from existing weights, without optimizer state: `init_from=`.

    Args:
        method: Method whose weights are replaced.
        path: A run folder, a Lightning checkpoint of the same method, or backbone weights with timm's names (.safetensors,
            .pth, an export folder).

    Returns:
        What was loaded, in words.

    Raises:
        UsageError: The file does not exist, is damaged, contains more than weights, or the weights do not match; the message
            lists some of the differing names and shapes.
    """
    file = find_weights(Path(path))
    state = _read(file)
    if "state_dict" in state:
        load_fitting(method, state["state_dict"], file)
        return f"all weights of {file}"
    tensors = {name: value for name, value in state.get("model", state).items() if isinstance(value, Tensor)}
    own = method.pretrained().model.state_dict()
    for module in method.modules():
        if isinstance(module, Backbone):  # DINO has two: student and teacher
            load_fitting(module.model, {name: value for name, value in tensors.items() if name in own}, file)
    left = len(tensors) - len(own)
    return f"the backbone's weights of {file}" + (f" ({left} other tensors ignored)" if left > 0 else "")


def _read(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return dict(load_file(file))
    if is_archive(file):
        verify(file)
    return load_plain(file)


def find_weights(path: Path) -> Path:
    """Return the weight file of a run folder, an export folder or a path; of several checkpoints the newest intact one.

    Raises:
        UsageError: There is none, or none that is intact.
    """
    if path.is_file():
        return path
    found = newest_good(path / "checkpoints")
    if found.path is not None:
        return found.path
    if found.damaged:
        raise UsageError(f"No checkpoint in {path} is intact. {' '.join(found.damaged.values())}")
    for candidate in (path / "model.safetensors", path / "export" / "model.safetensors"):
        if candidate.is_file():
            return candidate
    raise UsageError(f"{path} has no weights: give a run folder, a .ckpt, a .safetensors or a .pth file.")
