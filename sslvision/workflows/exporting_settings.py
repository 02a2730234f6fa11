"""The settings of `export`."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sslvision.errors import UsageError
from sslvision.settings import Sections, check_folder_name, option

OUTPUTS = ("features", "logits", "tokens", "attention")
OPSET = 20  # of ONNX, if none is given
OPSETS = (18, 23)  # what torch's exporter writes without converting


@dataclass
class Export:
    """All settings of an export to the format of another library."""

    sections: ClassVar[Sections] = {}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    run: str | None = option(
        None,
        "what to export: a run folder, one that stopped, an export/, a fine-tuned classifier, or published weights",
    )
    format: Literal["timm", "transformers", "onnx", "program"] = option(
        "timm",
        "timm | transformers (a folder that each loads) | onnx (model.onnx) | program (torch.export, model.pt2)",
    )
    outputs: list[str] = option(
        [],
        "onnx, program: what it returns, such as outputs=features,tokens,attention (default: features; of a classifier logits "
        "too)",
    )
    normalize: Literal["inside", "beside"] = option(
        "inside", "onnx, program: subtract mean and divide by deviation inside, or leave it to the caller (beside)"
    )
    pixels: Literal["uint8", "float"] = option(
        "uint8", "onnx, program with normalize=inside: pixels that it reads, uint8 of 0 to 255 or float of 0 to 1"
    )
    opset: int | None = option(
        None, f"onnx: version of the operator set, {OPSETS[0]} to {OPSETS[1]} (default: {OPSET})"
    )
    image_size: Any = option(None, "side of the images, or [height,width] (default: that of the weights)")
    batch_sizes: list[int] = option([1, 2, 7], "batch sizes at which the export is compared with the original")
    tolerance: float = option(
        1e-5, "largest deviation, relative to the root mean square of an output; an export beyond it is not written"
    )
    license: str | None = option(None, "license of the weights for the model card, such as mit or cc-by-nc-4.0")
    push: str | None = option(
        None, "user/name of a repository on the Hugging Face hub to upload to; without a token, files are only listed"
    )
    push_dry_run: bool = option(False, "list the files that push would upload, also where there is a token")
    private: bool = option(True, "push: make the repository private if it does not exist")
    name: str | None = option(None, "name of the folder in outputs/ (default: export, run and format)")
    output_dir: str | None = option(None, "path of the folder, instead of outputs/<name>")
    overwrite: bool = option(False, "replace an earlier export in the folder")

    def __post_init__(self) -> None:
        if self.run is None:
            raise UsageError("run is not given: say run=outputs/<name>, an export folder, or a timm model name.")
        check_folder_name(self.name)
        self._check_outputs()
        if not self.batch_sizes or any(size < 1 for size in self.batch_sizes):
            raise UsageError(
                f"batch_sizes={self.batch_sizes} must be whole numbers above 0, such as batch_sizes=[1,8]."
            )
        if not self.tolerance > 0:
            raise UsageError(f"tolerance={self.tolerance} must be a number above 0, such as 1e-5.")
        if self.opset is not None and not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise UsageError(f"opset={self.opset} must be a whole number from {OPSETS[0]} to {OPSETS[1]}.")
        if self.push is not None and not _is_repository(self.push):
            raise UsageError(f"push={self.push} is not the name of a repository on the hub: say push=user/name.")

    def _check_outputs(self) -> None:
        for one in self.outputs:
            if one not in OUTPUTS:
                raise UsageError(f"outputs={one} is unknown: it is one or more of {', '.join(OUTPUTS)}.")
            if self.outputs.count(one) > 1:
                raise UsageError(f"outputs={','.join(self.outputs)}: {one} is given twice; give it once.")
        of_graphs: dict[str, Any] = {"outputs": [], "normalize": "inside", "pixels": "uint8", "opset": None}
        given = [key for key, default in of_graphs.items() if getattr(self, key) != default]
        if self.format in ("timm", "transformers") and given:
            raise UsageError(
                f"{given[0]}={_written(getattr(self, given[0]))} has no meaning for format={self.format}, whose libraries have "
                "outputs and preprocessing of their own: leave it out, or say format=onnx or format=program."
            )
        if self.format == "program" and self.opset is not None:
            raise UsageError(
                f"opset={self.opset} is of format=onnx, and has no meaning for format=program: leave it out."
            )
        if self.normalize == "beside" and self.pixels != "uint8":
            raise UsageError(
                f"pixels={self.pixels} has no meaning with normalize=beside: the input is normalized by the caller, as float."
            )


def _is_repository(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(
        part and part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in parts
    )


def _written(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
