"""trainer.strategy=fsdp2: weights, gradients and the optimizer's state in shards over the processes, by torch's `fully_shard`.

A checkpoint is a folder into which each process writes its shards, by torch.distributed.checkpoint. A run goes on from it, and
from the file of one process or of DDP, with any number of processes and either strategy.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from sslvision.nn.shards import is_sharded, shard_like
from sslvision.runs.checkpoint import AtomicCheckpoints, same_everywhere
from sslvision.system.checkpoint_folders import OPTIMIZERS, STATE, read_folder


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy for modules that shard themselves in `configure_model`, with checkpoints whole or not at all.

    Args:
        timeout: How long a process waits for the others.
    """

    def __init__(self, timeout: timedelta):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=True, timeout=timeout)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning call `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """Shard over all processes, of whatever node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights as they are in each process, in shards."""
        assert self.lightning_module is not None
        return dict(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of the optimizer as it is in each process, in shards."""
        return getattr(optimizer, "optimizer", optimizer).state_dict()  # Lightning wraps it

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a folder, each process its shards."""
        self._checkpoints().save_shards(checkpoint, Path(self.broadcast(str(filepath))))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file in every process, or of a folder each process its shards."""
        if not Path(checkpoint_path).is_dir():
            return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)
        path = same_everywhere(checkpoint_path)
        without = () if self.optimizers else (OPTIMIZERS,)
        # It was verified when it was found.
        content = read_folder(path, without=without, place=self._shards_for(), verified="no")
        return self._checkpoints().for_this_run(content)

    def _checkpoints(self) -> AtomicCheckpoints:
        """Return the Trainer's plugin; in a Trainer of one's own one that leaves it to callbacks how many are kept."""
        io = self.checkpoint_io
        return io if isinstance(io, AtomicCheckpoints) else AtomicCheckpoints(keep=1)

    def _shards_for(self) -> Callable[[str, torch.Size, torch.dtype], Tensor | None]:
        """Return a function that makes room for this process's shards of a tensor in a checkpoint."""
        assert self.lightning_module is not None
        weights = self.lightning_module.state_dict()
        parameters = [
            [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for optimizer in self.optimizers
        ]

        def place(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor | None:
            key, _, rest = name.partition(".")
            if key == STATE:
                like = weights.get(rest)
            else:
                number, index, _ = rest.split(".", 2)
                known = parameters[int(number)] if int(number) < len(parameters) else []
                like = known[int(index)] if int(index) < len(known) else None
            if like is None or not is_sharded(like) or like.shape != size:
                return None
            return torch.empty_like(like, dtype=dtype, requires_grad=False)

        return place

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load weights, whole or in shards; of whole ones each process takes its shards."""
        assert self.lightning_module is not None
        own, given = self.lightning_module.state_dict(), checkpoint["state_dict"]
        state = {name: shard_like(value, own[name]) if name in own else value for name, value in given.items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the states of optimizers, whole or in shards; of whole ones each process takes its shards."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            cut = {index: _cut(values, parameters[index]) for index, values in state["state"].items()}
            optimizer.load_state_dict({**state, "state": cut})


def _cut(values: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return the state of a parameter with those tensors in shards that have its shape."""
    fits = is_sharded(parameter)
    return {
        key: shard_like(value, parameter)
        if fits and isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for key, value in values.items()
    }
