"""trainer.strategy=fsdp2: weights, gradients and the optimizer's state in shards over the processes, by torch's `fully_shard`.

A checkpoint is one plain file with whole tensors, the same as that of one process or of DDP, so that a run goes on with any
number of processes and either strategy.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from sslvision.nn.shards import is_sharded, shard_like, whole_tensor


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy for modules that shard themselves in `configure_model`, with checkpoints of whole tensors.

    Args:
        timeout: How long a process waits for the others.
    """

    def __init__(self, timeout: timedelta):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, timeout=timeout)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning call `load_optimizer_state_dict`."""
        return True

    def setup_environment(self) -> None:
        """Shard over all processes, of whatever node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights in the first process, nothing in others. All call this."""
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the whole state of the optimizer in the first process, nothing in others. All call this."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning wraps it
        return self._gathered(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint in every process."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load whole weights; each process takes its shards."""
        assert self.lightning_module is not None
        own, given = self.lightning_module.state_dict(), checkpoint["state_dict"]
        state = {name: shard_like(value, own[name]) if name in own else value for name, value in given.items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the whole states of optimizers; each process takes its shards."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            cut = {index: _cut(values, parameters[index]) for index, values in state["state"].items()}
            optimizer.load_state_dict({**state, "state": cut})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write the file in the first process."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, Path(filepath), storage_options=storage_options)

    @torch.no_grad()
    def _gathered(self, state: Any) -> Any:
        """Return nested containers with whole tensors on the CPU; empty ones in all processes but the first."""
        if isinstance(state, dict):
            gathered = {key: self._gathered(value) for key, value in state.items()}
            return gathered if self.is_global_zero else {}
        if isinstance(state, list | tuple):
            return type(state)([self._gathered(value) for value in state])
        if not isinstance(state, Tensor):
            return state
        whole = whole_tensor(state)
        return whole.cpu() if self.is_global_zero else None


def _cut(values: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return the state of a parameter with those tensors in shards that have its shape."""
    fits = is_sharded(parameter)
    return {
        key: shard_like(value, parameter)
        if fits and isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for key, value in values.items()
    }
