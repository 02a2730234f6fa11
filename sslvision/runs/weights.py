"""Loading weights of any format, and the export that plain timm loads."""

import difflib
import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf
from torch import Tensor

from sslvision.augment.crops import CROP_PCT
from sslvision.backbones.backbone import Backbone
from sslvision.backbones.fitting import Grids, backbone_weights, grids_of, refuse_nonfinite
from sslvision.backbones.load import load_backbone
from sslvision.backbones.released import flat_tensors, read_released
from sslvision.backbones.weight_sources import WEIGHTS, elsewhere, made_for
from sslvision.errors import UsageError
from sslvision.methods.base import Method
from sslvision.runs.checkpoint import newest_good
from sslvision.runs.config import read_settings
from sslvision.system.checkpoint_folders import is_folder_of_shards


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
    # safetensors writes for the owner alone; others shall read it as they can read every other file of the run.
    (folder / "model.safetensors").chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))


def _part_tensors(module: Any, state: dict[str, Tensor], *_: Any) -> None:
    """Copy tensors that share memory, as in CoaT: the file format requires it."""
    for name, tensor in state.items():
        state[name] = tensor.detach().clone()


def load_weights(method: Method, path: str | Path | None) -> tuple[str, list[str]]:
    """Start `method` from existing weights, without optimizer state: `init_from=`.

    Whatever `run=` reads is read: every backbone of the method gets the weights of the network in the file, DINO's student
    those of the student if there is one. Decoder or heads are taken too if all of them are there and fit.

    Args:
        method: Method whose weights are replaced.
        path: A run folder, a checkpoint, an export, a file of weights that others published, or a timm model name. None
            leaves the random weights.

    Returns:
        What was loaded, in words, and findings: what was changed or left out.

    Raises:
        UsageError: The file does not exist, is damaged, contains more than weights, or the weights do not match; the message
            lists some of the differing names and shapes.
    """
    if path is None:
        return "random", []
    own, notes = method.state_dict(), list[str]()
    where, tensors, grids = _tensors_of(method, Path(path).expanduser())
    found, used = dict[str, Tensor](), set[str]()
    for name, backbone in method.named_modules():
        if isinstance(backbone, Backbone):
            prefer = "student" if "student" in name else "teacher"
            state, taken, changes = backbone_weights(tensors, backbone, where, prefer=prefer, made_for=grids)
            found |= {f"{name}.model.{key}": value for key, value in state.items()}
            used |= taken
            notes += [change for change in changes if change not in notes]
    rest = {_plain(name): name for name in tensors if name not in used}
    heads = [name for name, _ in method.named_parameters() if name not in found]
    differing = [name for name in heads if name not in rest or tensors[rest[name]].shape != own[name].shape]
    if not differing:
        fitting = [name for name in own if name in rest and tensors[rest[name]].shape == own[name].shape]
        more = {name: tensors[rest[name]] for name in fitting if name not in found}
        # Fixed positions of a decoder are those of the grid here, if as many patches lie in other rows there.
        fixed = {name for name in more if name.endswith("pos_embed") and not more[name].allclose(own[name], atol=1e-4)}
        found |= {name: value for name, value in more.items() if name not in fixed}
        used |= {rest[name] for name in fitting}
    elif there := [name for name in heads if name in rest]:
        name = next((name for name in differing if name in rest), differing[0])
        shapes = [tuple(own[name].shape), tuple(tensors[rest[name]].shape) if name in rest else "missing"]
        notes.append(
            f"the {len(there)} tensors of its head or decoder do not fit and start random ({name} is {shapes[0]} here and "
            f"{shapes[1]} there)"
        )
    refuse_nonfinite({name: found[name] for name in heads if name in found}, where)
    method.load_state_dict({**own, **found})
    if left := len(tensors) - len(used):
        notes.append(f"{left} other tensors ignored")
    what = "the backbone's weights" if differing and heads else "all weights"
    if not notes:
        return f"{what} of {where}", []
    return f"{what} of {where} ({'; '.join(notes)})", [f"init_from={path}: {'; '.join(notes)}."]


def _tensors_of(method: Method, path: Path) -> tuple[str, dict[str, Tensor], Grids]:
    """Return where weights come from, in words, their tensors under dotted names, and what grids they are `made_for`."""
    name, backbone = str(path), method.pretrained()
    if path.exists() or not timm.is_model(name):
        file = find_weights(path)
        content = read_released(file)
        return str(file), flat_tensors(content), made_for(file, content)
    size, channels = backbone.image_size, backbone.channels
    loaded = load_backbone(name, image_size=size, channels=channels, head=False, setting="init_from")
    network = loaded.backbone.model
    return loaded.weights, dict(network.state_dict()), grids_of(network)


def _plain(name: str) -> str:
    """Return the name that a head's tensor in a checkpoint has in the methods here."""
    kept = [part for part in name.split(".") if part not in ("module", "state_dict", "model")]
    plain = ".".join(kept).removeprefix("dino_loss.")
    for theirs, ours in (("original0", "weight_g"), ("original1", "weight_v")):  # torch's new names for weight norm
        plain = plain.replace(f"parametrizations.weight.{theirs}", ours)
    return plain


def find_weights(path: Path) -> Path:
    """Return the weight file of a run folder, an export folder or a path; of several checkpoints the newest intact one.

    Raises:
        UsageError: There is none, or none that is intact.
    """
    if path.is_file() or is_folder_of_shards(path):
        return path
    found = newest_good(path / "checkpoints")
    if found.path is not None:
        return found.path
    if found.damaged:
        raise UsageError(f"No checkpoint in {path} is intact. {' '.join(found.damaged.values())}")
    for candidate in [folder / name for folder in (path, path / "export") for name in WEIGHTS]:
        if candidate.is_file():
            return candidate
    if not path.exists() and (told := elsewhere(path, "init_from")) is not None:
        raise UsageError(told)
    near = difflib.get_close_matches(str(path), timm.list_models(), n=3, cutoff=0.6)
    what = (
        f"{path} has no weights"
        if path.exists()
        else f"There is no file or folder {path}, and no timm model of that name"
    )
    raise UsageError(
        f"{what}: give a run folder, an export folder, a .ckpt, .safetensors or .pth file, or a timm model name."
        + (f" Near it in timm: {', '.join(near)}." if near else "")
    )


def record_value_range(export: Path, value_range: Any) -> None:
    """Keep the setting data.value_range in an export, so that later images are read as those of training; None: not at all."""
    if value_range not in (None, "auto"):
        file = export / "config.json"
        config = json.loads(file.read_text()) | {"value_range": value_range}
        file.write_text(json.dumps(config, indent=2) + "\n")


def recorded_value_range(run: str | Path) -> Any:
    """Return the setting data.value_range of the images that weights were trained on, given a run or its export; or None."""
    for file in (Path(run) / "export" / "config.json", Path(run) / "config.json"):
        if file.is_file():
            config = json.loads(file.read_text())
            return config.get("value_range") if isinstance(config, dict) else None
    recorded = Path(run) / "config.yaml"  # of a run that has not ended
    return read_settings(recorded, ("data",))["data"].get("value_range") if recorded.is_file() else None
