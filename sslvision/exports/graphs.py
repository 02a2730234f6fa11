"""Exports to a graph that needs no code of the network: torch.export's program, and ONNX."""

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvision.backbones.load import Loaded
from sslvision.errors import SSLVisionError
from sslvision.exports.network import ExportedNetwork, Interface, preprocessing

PROGRAM, ONNX, PREPROCESSING = "model.pt2", "model.onnx", "preprocessing.json"
LARGEST_PROTOBUF = 1_900_000_000  # bytes; a file of ONNX holds 2 GiB, and larger weights go to a file beside it


def write_program(network: ExportedNetwork, loaded: Loaded, folder: Path) -> None:
    """Write torch.export's program with a batch of any size, and what its input is.

    Raises:
        SSLVisionError: torch cannot export this network.
    """
    program = _trace(network, loaded)
    about = _about(loaded, network.interface)
    torch.export.save(program, folder / PROGRAM, extra_files={PREPROCESSING: about})
    (folder / PREPROCESSING).write_text(about + "\n", encoding="utf-8", errors="backslashreplace")


def read_program(folder: Path) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Return the outputs of the program in a folder, as a function of its input."""
    with _quiet():
        return torch.export.load(folder / PROGRAM).module()


def write_onnx(network: ExportedNetwork, loaded: Loaded, folder: Path, *, opset: int) -> None:
    """Write a model of ONNX with a batch of any size, and what its input is: in a file beside it, and in its metadata.

    Raises:
        SSLVisionError: torch cannot export this network, or an operation has no counterpart.
    """
    import onnx

    program, interface = _trace(network, loaded), network.interface
    with _quiet():
        try:
            exported: Any = torch.onnx.export(
                program,
                (_example(network, loaded),),
                dynamo=True,
                input_names=["images"],
                output_names=[*interface.outputs],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:  # torch wraps those of every operation
            raise _cannot("torch.onnx", loaded, error, "format=program or format=timm") from error
        exported.model.metadata_props.update(
            {
                key: value if isinstance(value, str) else json.dumps(value)
                for key, value in json.loads(_about(loaded, interface)).items()
            }
        )
        size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
        exported.save(str(folder / ONNX), external_data=size > LARGEST_PROTOBUF)
        onnx.checker.check_model(str(folder / ONNX))
    (folder / PREPROCESSING).write_text(_about(loaded, interface) + "\n", encoding="utf-8", errors="backslashreplace")


def read_onnx(folder: Path, outputs: tuple[str, ...]) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Return the outputs of the model in a folder, computed by onnxruntime on the CPU, as a function of its input."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / ONNX), providers=["CPUExecutionProvider"])

    def run(values: Tensor) -> dict[str, Tensor]:
        found = session.run([*outputs], {"images": values.numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}

    return run


def _trace(network: ExportedNetwork, loaded: Loaded) -> Any:
    """Return torch's program of a network with a batch of any size."""
    try:
        with torch.no_grad(), _quiet():
            dynamic = {"images": {0: torch.export.Dim("batch")}}
            return torch.export.export(network.eval(), (_example(network, loaded),), dynamic_shapes=dynamic)
    except Exception as error:  # of the layers of any timm model
        raise _cannot("torch.export", loaded, error, "format=timm") from error


def _example(network: ExportedNetwork, loaded: Loaded) -> Tensor:
    """Return an input of two images: torch would take a batch of one for a constant."""
    backbone = loaded.backbone
    shape = (2, backbone.channels, *backbone.image_size)
    return torch.zeros(shape, dtype=torch.uint8 if network.interface.reads_bytes else torch.float32)


def _about(loaded: Loaded, interface: Interface) -> str:
    return json.dumps(preprocessing(loaded, interface), indent=2, ensure_ascii=False)


def _cannot(tool: str, loaded: Loaded, error: Exception, instead: str) -> SSLVisionError:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
    return SSLVisionError(
        f"{tool} cannot export a {type(loaded.backbone.model).__name__} with a batch of any size: {said} Say {instead} instead."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what exporters print and warn of their own workings: outputs are compared afterwards."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
