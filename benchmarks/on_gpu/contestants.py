"""Who can be timed by the parts `bench` and `profile`: a table of names, each with how to build its step.

"Ours as a run is" lets the library choose (`choose_layers`); ablations turn off one thing, or change one.
"""

import contextlib
import copy
import importlib.util
from unittest import mock

import torch
from measure import autocast, one_step
from peers import CLOCK, PEERS, Ours
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.on_gpu.findings import DRY, device
from sslvision.methods.mae import MAE
from sslvision.nn import compilation, packed_attention
from sslvision.nn.patches import gather_tokens


def ours(
    *, compiled=None, captured=None, from_bytes=False, low_memory=False, change=None, around=contextlib.nullcontext
):
    """Return a function that builds a step of ours.

    Args:
        compiled, captured: as the settings `compile` and `cuda_graphs`; None: what a run does on this device.
        from_bytes: make the views in every step.
        low_memory: as activation_checkpointing=true.
        change: called with the method before it first runs, once its layers are chosen.
        around: entered around every step.
    """

    def build(name, method, batch, views, arch):
        if low_memory:
            method.enable_activation_checkpointing()
        batch = batch if from_bytes else None
        contestant = Ours(name, method, views, batch=batch, compiled=compiled, captured=captured)
        contestant.choose_layers()
        if change is not None:
            change(contestant.method)
        return stepper(contestant, around)

    return build


def peer(library, *, compiled=False):
    """Return a function that builds a step of another library at its best settings."""

    def build(name, method, batch, views, arch):
        contestant = PEERS[library, type(method)](
            name, method, views, arch=arch, fused_attention=True, compiled=compiled
        )
        contestant.choose_layers()
        return stepper(contestant)

    return build


def whole_step_captured(**settings):
    """Return a function that builds a step as one CUDA graph with its optimizer: what it takes if the host takes no time."""

    def build(name, method, batch, views, arch):
        if DRY:
            return ours(**settings, captured=False)(name, method, batch, views, arch)
        contestant = CapturedOptimizer(name, method, views, captured=False, **settings)
        contestant.choose_layers()
        step, stream = stepper(contestant), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    return build


class CapturedOptimizer(Ours):
    """Ours in a form that can be captured: rates on the device, and no new seed."""

    def __init__(self, *about, **settings):
        super().__init__(*about, **settings)
        for group in self.optimizer.param_groups:
            group |= {"lr": torch.tensor(1e-5, device=self.method.device), "capturable": True}

    def prepare(self):
        return self.views

    def update(self):
        self.method.prepare_update(self.optimizer, CLOCK)
        self.optimizer.step()
        self.optimizer.zero_grad()


def whole_graph(mode=None):
    """Return a change that compiles `losses` as one graph in place of block by block."""

    def change(method):
        backend = {"backend": compilation.BACKEND} if DRY else {"mode": mode}
        losses = torch.compile(method.losses, dynamic=False, **backend)

        def marked(*about):
            torch.compiler.cudagraph_mark_step_begin()
            return losses(*about)

        method.losses = marked if mode == "reduce-overhead" else losses

    return change


def unshared_first_block(method):
    """Have MAE's first decoder block treat hidden tokens as all other blocks do."""
    if isinstance(method, MAE):
        method.block_with_mask_tokens = lambda block, own, shared, indices: block(
            torch.cat([own, gather_tokens(shared, indices)], dim=1)
        )


def torch_attention(kernel=None):
    """Return what has attention computed by torch: by one of its kernels (in a dry run a CPU's), or the one it chooses."""

    @contextlib.contextmanager
    def around():
        chosen = sdpa_kernel([SDPBackend.MATH if DRY else kernel]) if kernel else contextlib.nullcontext()
        with mock.patch.object(packed_attention, "HAS_TRITON", False), chosen:
            yield

    return around


EAGER = {"compiled": False, "captured": False}
CONTESTANTS = {
    "run": ours(),  # as a run on this device is, from ready-made views
    "bytes": ours(from_bytes=True),  # the same, from the loader's bytes
    "eager": ours(**EAGER),
    "eagerbytes": ours(**EAGER, from_bytes=True),
    "blocks": ours(compiled=True, captured=False),  # compiled, no CUDA graphs
    "blocksbytes": ours(compiled=True, captured=False, from_bytes=True),
    "graphs": ours(compiled=False),  # CUDA graphs, nothing compiled
    "onegraph": whole_step_captured(),
    "low": ours(low_memory=True),
    "eagerlow": ours(**EAGER, low_memory=True),
    "noshare": ours(change=unshared_first_block),
    "torchattention": ours(around=torch_attention()),  # not by nn/packed_attention.py
    "flash": ours(around=torch_attention(SDPBackend.FLASH_ATTENTION)),
    "cudnn": ours(around=torch_attention(SDPBackend.CUDNN_ATTENTION)),
    "efficient": ours(around=torch_attention(SDPBackend.EFFICIENT_ATTENTION)),
    "whole": ours(**EAGER, change=whole_graph()),  # losses compiled as one graph
    "reduce": ours(**EAGER, change=whole_graph("reduce-overhead")),
    "max": ours(**EAGER, change=whole_graph("max-autotune-no-cudagraphs")),
    "hf": peer("hf"),
    "hfc": peer("hf", compiled=True),
    "lightly": peer("lightly"),
    "lightlyc": peer("lightly", compiled=True),
}
LIBRARIES = {"hf": "transformers", "hfc": "transformers", "lightly": "lightly", "lightlyc": "lightly"}  # of the peers


def available(names):
    """Return those of the names whose library is installed.

    Raises:
        SystemExit: there is no such contestant.
    """
    if unknown := set(names) - {*CONTESTANTS}:
        raise SystemExit(f"who: there is no {', '.join(sorted(unknown))}; there are {', '.join(CONTESTANTS)}")
    return [name for name in names if name not in LIBRARIES or importlib.util.find_spec(LIBRARIES[name])]


def build_step(name, method, batch, views, arch):
    """Return a function that makes one training step of a contestant on a copy of the method."""
    torch._dynamo.reset()
    return CONTESTANTS[name](name, copy.deepcopy(method).to(device()), batch, views, arch)


def stepper(contestant, around=contextlib.nullcontext):
    precision = autocast(device(), "bf16")

    def step():
        with around():
            one_step(contestant, precision)

    return step
