"""Which options of a timm model are settings, and what is used instead of those of timm's factory. Imports no timm."""

from collections.abc import Mapping
from typing import Any

from sslvision.errors import UsageError

# Arguments of timm's factory, which are not the model's, and what is used instead.
WEIGHTS_ELSEWHERE = (
    "init_from=PATH or a timm name, to start from weights (probe, finetune: run=; in Python: load_backbone)"
)
FEATURES_ONLY = "nothing: a backbone returns its last features"
FOR_EXPORT = "nothing: it is an option for deployment, which the exported model takes when it is loaded"
FACTORY = {
    **dict.fromkeys(("pretrained", "checkpoint_path", "cache_dir"), WEIGHTS_ELSEWHERE),
    **dict.fromkeys(("scriptable", "exportable", "no_jit"), FOR_EXPORT),
    **dict.fromkeys(("features_only", "feature_cfg", "feature_cls", "out_indices"), FEATURES_ONLY),
    **dict.fromkeys(("model_cfg", "kwargs_filter"), "the model's own options"),
    "model_name": "backbone.name",
    "img_size": "backbone.image_size",
    "in_chans": "data.channels",
    "num_classes": "nothing: methods have heads of their own, and fine-tuning makes one for the classes of the data",
}


def check_options_of_timm(options: Mapping[str, Any]) -> None:
    """Check the settings of a backbone that need no model to be checked.

    Args:
        options: Options of the timm model.

    Raises:
        UsageError: An argument of timm's factory, which would load weights or wrap the model.
    """
    instead: dict[str, list[str]] = {}
    for key in options:
        if key in FACTORY or str(key).startswith("pretrained_"):
            instead.setdefault(FACTORY.get(key, WEIGHTS_ELSEWHERE), []).append(f"backbone.{key}")
    if instead:
        shown = ". ".join(f"Instead of {' and '.join(keys)} use {use}" for use, keys in instead.items())
        raise UsageError(f"These are arguments of timm.create_model and not options of a model. {shown}.")
