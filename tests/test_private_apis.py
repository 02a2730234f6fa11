"""Everything the package uses of torch, torchvision, timm, Lightning and Hydra that these do not promise to keep.

Each row of the table has a check that fails when a new version changes what we rely on; before one is added to pyproject.toml,
these tests say what has to be looked at. The last test finds private names in the package, so that the table is complete.
"""

import ast
import importlib
import inspect
import re
import tempfile
import warnings
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import pytest
import pytorch_lightning as L
import timm
import torch
import torch.distributed.checkpoint as dcp
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from torch import nn
from torchvision import datasets

from sslvision.system.checkpoint_folders import NAMES, _Index

PACKAGE = Path(__file__).parents[1] / "sslvision"


def check_foreach():
    tensors = [torch.ones(2), torch.full((3,), 2.0)]
    assert [norm.item() for norm in torch._foreach_norm(tensors)] == pytest.approx([2**0.5, 12**0.5])
    torch._foreach_mul_(tensors, [torch.tensor(2.0), torch.tensor(3.0)])
    torch._foreach_add_(tensors, [torch.ones(2), torch.ones(3)])
    assert [tensor.tolist() for tensor in tensors] == [[3, 3], [7, 7, 7]]
    torch._foreach_lerp_(tensors, [torch.zeros(2), torch.zeros(3)], 0.5)
    assert [tensor.tolist() for tensor in tensors] == [[1.5, 1.5], [3.5, 3.5, 3.5]]
    assert torch._foreach_lerp([torch.zeros(1)], [torch.ones(1)], 0.25)[0].item() == 0.25


def check_claims_of_optuna():
    optuna = pytest.importorskip("optuna")
    study, states = optuna.create_study(), optuna.trial.TrialState
    space = {"x": optuna.distributions.FloatDistribution(0, 1)}
    study.add_trial(optuna.trial.create_trial(state=states.WAITING, params={"x": 0.5}, distributions=space))
    number = study.trials[0]._trial_id
    claims = [study._storage.set_trial_state_values(number, state=states.RUNNING) for _ in range(2)]
    assert claims == [True, False]
    assert optuna.trial.Trial(study, number).params == {"x": 0.5}


def check_batch_norm():
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert issubclass(kind, nn.modules.batchnorm._BatchNorm)
    assert not issubclass(nn.LayerNorm, nn.modules.batchnorm._BatchNorm)


def check_graph_task():
    seen, x = [], torch.ones((), requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append(torch._C._current_graph_task_id()))
    assert torch._C._current_graph_task_id() == -1
    y.backward()
    assert len(seen) == 1
    assert seen[0] != -1


def check_dynamo():
    assert hasattr(torch._dynamo.config, "optimize_ddp")
    per_function = "recompile_limit" in inspect.signature(torch.compile).parameters
    assert per_function or hasattr(torch._dynamo.config, "recompile_limit")


def check_mkldnn():
    assert torch.ops.mkldnn._is_mkldnn_bf16_supported() in (True, False)
    x, weight, bias = torch.randn(6, 4), torch.randn(5, 4), torch.randn(5)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 6)
    product = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    torch.testing.assert_close(product, nn.functional.linear(x, weight, bias))


def check_softmax_backward():
    x = torch.randn(3, 4, requires_grad=True)
    p, gradient = x.softmax(dim=-1), torch.randn(3, 4)
    p.backward(gradient)
    torch.testing.assert_close(torch._softmax_backward_data(gradient, p.detach(), -1, p.dtype), x.grad)


def check_buffers():
    module = nn.Module()
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("constant", torch.ones(1), persistent=False)
    assert list(module._buffers) == ["kept", "constant"]
    assert module._non_persistent_buffers_set == {"constant"}


def check_new_shared():
    storage = torch.UntypedStorage._new_shared(16)
    assert storage.nbytes() == 16
    assert storage.is_shared()


def check_amp_scaling():
    from pytorch_lightning.plugins.precision.amp import _optimizer_handles_unscaling

    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], fused=True)
    assert _optimizer_handles_unscaling(optimizer)  # Lightning then refuses to clip, see the row's reason
    optimizer._step_supports_amp_scaling = False
    assert not _optimizer_handles_unscaling(optimizer)


def check_found_inf():
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.full((1,), torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert weight.item() == 1
    assert optimizer.state[weight]["step"].item() == 0


def check_torchvision():
    source = "\n".join(inspect.getsource(kind) for kind in vars(datasets).values() if inspect.isclass(kind))
    for name in ("_samples", "_image_files", "_images", "_labels"):
        assert f"self.{name} =" in source or f"self.{name}:" in source or f"self.{name}." in source, name
    pcam = inspect.getsource(datasets.PCAM)
    for use in ("self._FILES[self._split]", "self._base_folder", '["targets"][0]'):
        assert use in pcam, use
    assert datasets.PCAM._FILES["train"]["targets"][0].endswith(".h5")


def check_manipulate():
    from timm.models._manipulate import MATCH_PREV_GROUP

    matcher = timm.create_model("vit_tiny_patch16_224", depth=1).group_matcher()
    assert any(pattern[1] == MATCH_PREV_GROUP for pattern in matcher["blocks"])


def check_accelerator_connector():
    from pytorch_lightning.trainer.connectors.accelerator_connector import _AcceleratorConnector

    options = {"accelerator": "cpu", "devices": 2, "num_nodes": 1, "strategy": "ddp", "precision": "bf16-mixed"}
    strategy = _AcceleratorConnector(**options, plugins=None).strategy
    assert (strategy.root_device.type, strategy.world_size) == ("cpu", 2)
    assert strategy.precision_plugin.precision == "bf16-mixed"
    assert "_AcceleratorConnector(" in inspect.getsource(L.Trainer.__init__)


def check_start_method():
    for name, method in (("ddp", "popen"), ("ddp_fork", "fork"), ("ddp_spawn", "spawn"), ("ddp_notebook", "fork")):
        assert L.strategies.StrategyRegistry.get(name)._start_method == method


def check_timeout():
    waits = timedelta(seconds=7)
    assert L.strategies.DDPStrategy(timeout=waits)._timeout == waits
    assert "self._timeout" in inspect.getsource(L.strategies.DDPStrategy.setup_distributed)


def check_signal_connector():
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert callable(trainer._signal_connector.register_signal_handlers)
    assert "self._signal_connector.register_signal_handlers()" in inspect.getsource(L.Trainer._run)


def check_epoch_loop():
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert isinstance(trainer.fit_loop.epoch_loop, _TrainingEpochLoop)
    assert trainer.fit_loop._data_fetcher is None  # until training begins
    assert list(inspect.signature(_TrainingEpochLoop._should_check_val_fx).parameters) == ["self", "data_fetcher"]
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(_TrainingEpochLoop)
    assert list(inspect.signature(_TrainingEpochLoop._broadcast_sigterm_tensor).parameters) == ["self"]


def check_wandb_logger():
    source = inspect.getsource(WandbLogger)
    for use in ("self._experiment = experiment", "if self._experiment is None", "wandb.init(**self._wandb_init)"):
        assert use in source, use
    assert re.search(r"self\._wandb_init: .*=|self\._wandb_init =", source)


def check_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    attention = torch.ops.aten
    with FakeTensorMode():
        q = torch.empty(2, 3, 5, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        flash = attention._scaled_dot_product_flash_attention(q, q, q, 0.0, False, scale=1.0)[0]
        efficient = attention._scaled_dot_product_efficient_attention(q, q, q, None, True, 0.0, False, scale=1.0)[0]
        assert flash.shape == efficient.shape == q.shape
        assert flash.device.type == "cuda"
        (of,) = (flash + efficient).grad_fn._input_metadata
        assert (torch.Size(of.shape), of.dtype) == (q.shape, q.dtype)


def check_recomputation():
    from torch.utils import checkpoint

    parameters = [*inspect.signature(checkpoint._checkpoint_without_reentrant_generator).parameters]
    assert parameters[:2] == ["fn", "preserve_rng_state"]


def check_parameters():
    layer = torch.nn.Linear(2, 2)
    layer._parameters["weight"] = new = torch.nn.Parameter(torch.zeros(2, 2))
    assert layer.weight is new


def check_dispatch_mode():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    weight = torch.ones(3, requires_grad=True)
    with Mode():
        (weight * 2).sum().backward()  # the backward pass is seen, too
    assert seen[0] == torch.ops.aten.mul
    assert len(seen) > 2


def check_operations():
    aten = torch.ops.aten
    for name in OPERATIONS:
        assert getattr(aten, name).overloads()
    assert torch.Tag.pointwise in aten.relu.default.tags
    assert torch.Tag.pointwise not in aten.mm.default.tags


OPERATIONS = (
    *("_adaptive_avg_pool2d", "_native_batch_norm_legit_no_training", "_reshape_alias", "_to_copy", "_unsafe_view"),
    "_scaled_dot_product_flash_attention_for_cpu",
)


# What is used, where, why, and the check.
def check_names_in_metadata():
    for module, names in NAMES.items():
        if not module.startswith("pathlib"):  # which of them there are depends on Python
            assert [name for name in names if not hasattr(importlib.import_module(module), name)] == []
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it saves alone
            dcp.save({"weight": torch.zeros(3), "step": 1}, checkpoint_id=folder, no_dist=True)
        with open(Path(folder) / ".metadata", "rb") as file:
            assert set(_Index(file).load().state_dict_metadata) == {
                "weight",
                "step",
            }  # raises for a name that is not listed


TABLE = [
    *(
        (
            f"torch.ops.aten.{name}",
            "inspection/receptive_field.py",
            "what its result reads of the image",
            check_operations,
        )
        for name in OPERATIONS
    ),
    *(
        (name, "system/checkpoint_folders.py", "what the index of a folder of shards names", check_names_in_metadata)
        for name in (
            "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
            "torch.distributed.checkpoint.filesystem._StorageInfo",
            "torch.serialization._get_layout",
        )
    ),
    (
        "torch.utils._python_dispatch",
        "inspection/peak_memory.py",
        "sees every operation: the bytes that it makes, and what it reads",
        check_dispatch_mode,
    ),
    *(
        (name, f"inspection/{file}.py", "runs a step without data, memory and the device", check_fake_tensors)
        for name, file in (
            ("torch._subclasses", "fake_update"),
            ("torch.ops.aten._scaled_dot_product_flash_attention", "fake_update"),
            ("torch.ops.aten._scaled_dot_product_efficient_attention", "fake_update"),
            ("torch.autograd.graph.Node._input_metadata", "fake_backward"),
        )
    ),
    (
        "torch.utils.checkpoint._checkpoint_without_reentrant_generator",
        "inspection/fake_update.py",
        "recomputes without the random state of a device that is not there",
        check_recomputation,
    ),
    ("torch.nn.Module._parameters", "inspection/fake_update.py", "puts fake parameters in place", check_parameters),
    ("torch._foreach_norm", "nn/shards.py", "norms of all gradients in one pass", check_foreach),
    ("torch._foreach_mul_", "methods/dino.py", "clips each gradient in one pass", check_foreach),
    ("torch._foreach_add_", "nn/cuda_graphs.py", "adds the gradients of accumulated batches", check_foreach),
    ("torch._foreach_lerp", "optim/muon.py", "looks ahead along the momentum in one pass", check_foreach),
    ("torch._foreach_lerp_", "nn/ema.py", "moves all parameters of a teacher in one pass", check_foreach),
    ("torch.nn.modules.batchnorm._BatchNorm", "nn/ema.py", "tells batch norms of all kinds", check_batch_norm),
    (
        "torch._C._current_graph_task_id",
        "nn/activation_checkpointing.py",
        "batch norms count a batch once though it is computed twice",
        check_graph_task,
    ),
    ("torch._dynamo", "nn/compilation.py", "graphs that DDP does not split, and their number", check_dynamo),
    ("torch.ops.mkldnn._is_mkldnn_bf16_supported", "nn/cpu.py", "whether oneDNN multiplies bf16", check_mkldnn),
    ("torch.ops.mkldnn._reorder_linear_weight", "nn/cpu.py", "lays a weight out once", check_mkldnn),
    ("torch.ops.mkldnn._linear_pointwise", "nn/cpu.py", "multiplies by such a weight", check_mkldnn),
    ("torch._softmax_backward_data", "nn/cpu.py", "backward pass of attention", check_softmax_backward),
    ("torch.nn.Module._buffers", "nn/ema.py", "copies persistent buffers only", check_buffers),
    ("torch.nn.Module._non_persistent_buffers_set", "nn/ema.py", "copies persistent buffers only", check_buffers),
    ("torch.UntypedStorage._new_shared", "data/buffer_pool.py", "shared memory to reuse", check_new_shared),
    (
        "torch.optim.Optimizer._step_supports_amp_scaling",
        "methods/lightning.py",
        "Lightning refuses to clip with optimizers that unscale fp16 gradients, in bf16 too",
        check_amp_scaling,
    ),
    ("torchvision.datasets.PCAM._base_folder", "data/sources/torchvision_sets.py", "labels", check_torchvision),
    ("torchvision.datasets.PCAM._FILES", "data/sources/torchvision_sets.py", "labels", check_torchvision),
    ("torchvision.datasets.PCAM._split", "data/sources/torchvision_sets.py", "labels", check_torchvision),
    ("torchvision.datasets._samples", "data/sources/torchvision_sets.py", "paths and labels", check_torchvision),
    ("torchvision.datasets._image_files", "data/sources/torchvision_sets.py", "paths", check_torchvision),
    ("torchvision.datasets._images", "data/sources/torchvision_sets.py", "paths", check_torchvision),
    ("torchvision.datasets._labels", "data/sources/torchvision_sets.py", "labels", check_torchvision),
    (
        "timm.models._manipulate",
        "nn/freezing.py",
        "which parameters timm groups with the block before",
        check_manipulate,
    ),
    (
        "pytorch_lightning.Trainer._signal_connector",
        "training/callbacks/stop_on_signal.py",
        "signals are handled by the callback: Lightning's handlers save in mid-update",
        check_signal_connector,
    ),
    (
        "pytorch_lightning.trainer.connectors.accelerator_connector._AcceleratorConnector",
        "training/trainer.py",
        "device, processes and precision are known before the Trainer is built",
        check_accelerator_connector,
    ),
    (
        "pytorch_lightning.strategies.DDPStrategy._start_method",
        "training/trainer.py",
        "in a notebook Lightning chooses processes that end with training, before export and evaluation",
        check_start_method,
    ),
    (
        "pytorch_lightning.strategies.DDPStrategy._timeout",
        "training/processes.py",
        "the timeout of a strategy that Lightning chooses itself, which has no argument for it",
        check_timeout,
    ),
    (
        "pytorch_lightning.loops._TrainingEpochLoop._broadcast_sigterm_tensor",
        "training/callbacks/stop_on_signal.py",
        "waits for the device in every batch (Lightning issue 21487)",
        check_epoch_loop,
    ),
    (
        "pytorch_lightning.loops._TrainingEpochLoop._should_check_val_fx",
        "training/callbacks/stop_on_signal.py",
        "whether a validation follows this batch",
        check_epoch_loop,
    ),
    (
        "pytorch_lightning.loops._FitLoop._data_fetcher",
        "training/callbacks/stop_on_signal.py",
        "argument of _should_check_val_fx",
        check_epoch_loop,
    ),
    (
        "pytorch_lightning.loggers.WandbLogger._wandb_init",
        "runs/loggers.py",
        "online or offline is known when logging begins",
        check_wandb_logger,
    ),
    (
        "pytorch_lightning.loggers.WandbLogger._experiment",
        "runs/loggers.py",
        "whether the W&B run has started",
        check_wandb_logger,
    ),
    (
        "optuna.study.Study._storage",
        "workflows/studies.py",
        "claims a waiting trial: only one process succeeds",
        check_claims_of_optuna,
    ),
    (
        "optuna.trial.FrozenTrial._trial_id",
        "workflows/studies.py",
        "the storage's number of a trial",
        check_claims_of_optuna,
    ),
]
# Not private by name, but documented nowhere.
UNDOCUMENTED = [("torch.optim.Optimizer.found_inf", "optim/nonfinite.py", "skips a fused update", check_found_inf)]

PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit"}  # of named tuples and os: documented
WORDS = {"_top1", "_top5", "_target_"}  # strings that name no attribute


def private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_"


def names_in(tree):
    """Yield (name, whether `self` has it) of attributes, imports and strings given to getattr."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("sslvision"):
            yield from ((part, False) for part in (node.module or "").split("."))
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((part, False) for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Tuple) or (isinstance(node, ast.Call) and "attr" in ast.unparse(node.func)):
            texts = getattr(node, "elts", []) or getattr(node, "args", [])  # ("_a", "_b") or getattr(x, "_a")
            yield from ((str(one.value), False) for one in texts if isinstance(one, ast.Constant))


def defined_in(tree):
    """Yield the private names that a file defines itself: functions, classes, and attributes of its objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" else ""
            yield node.id if isinstance(node, ast.Name) else ""


def foreign_private_names():
    """Return the private names of other libraries that the package uses, each with its files."""
    trees = {file: ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}
    own = {name for tree in trees.values() for name in defined_in(tree)}
    found = defaultdict(set)
    for file, tree in trees.items():
        for name, of_self in names_in(tree):
            if private(name) and name not in PUBLIC | WORDS and not (of_self and name in own):
                found[name].add(file.relative_to(PACKAGE).as_posix())
    return found


@pytest.mark.parametrize("check", sorted({row[-1] for row in TABLE + UNDOCUMENTED}, key=lambda one: one.__name__))
def test_what_we_use_is_as_we_expect(check):
    check()


def test_the_table_is_complete():
    listed = {part for name, *_ in TABLE for part in name.split(".") if private(part)}
    found = foreign_private_names()
    assert not found.keys() - listed, "Private names of other libraries: add a row with a check, or avoid them."
    for name, file, _, _ in TABLE:
        assert file in found.get(name.split(".")[-1], ()), (
            f"{name} is no longer used in {file}: correct the row or delete it."
        )
