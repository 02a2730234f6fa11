"""Backward passes on fake tensors of a GPU, on machines that have none, where torch's engine has no streams for them.

Nodes of autograd's graph are called one after another, as torch's engine does: a node when all gradients that it gets are
there, and what it had saved is free as soon as it has run. Gradients that meet are added in place.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Node = Any  # torch.autograd.graph.Node; nodes of Python functions are no instances of it


@torch.no_grad()
def run_backward(losses: list[Tensor], follow: Callable[[Tensor], None]) -> None:
    """Accumulate the gradients of a loss in `grad` of the parameters.

    Args:
        losses: The loss (), the only one. It is taken out of the list: nobody else may hold it, or the graph stays in memory.
        follow: Called with each parameter whose gradient has become larger in memory.
    """
    loss = losses.pop()
    root: Any = loss.grad_fn
    waiting = _count_edges(root)  # a node and the number of gradients that it still waits for; holds the nodes
    arrived: dict[Node, list[Tensor | None]] = {root: [torch.ones_like(loss)]}
    del loss
    ready = [root]
    del root
    while ready:
        node = ready.pop()
        del waiting[node]
        edges, found = node.next_functions, _call(node, arrived.pop(node))
        del node  # and what it had saved
        for (following, index), gradient in zip(edges, found, strict=True):
            if following is None:
                continue
            if gradient is not None:
                _add(arrived, following, index, gradient)
            del gradient
            waiting[following] -= 1
            if waiting[following] == 0 and hasattr(following, "variable"):  # a parameter
                del waiting[following]
                if following in arrived:
                    _accumulate(following.variable, arrived.pop(following), follow)
            elif waiting[following] == 0:
                arrived.setdefault(following, [None] * len(following._input_metadata))
                ready.append(following)
        del edges, found, following


def _count_edges(root: Node) -> Counter[Node]:
    """Return each node of the graph with the number of edges that lead to it."""
    counts, open_nodes = Counter({root: 0}), [root]
    while open_nodes:
        for node, _ in open_nodes.pop().next_functions:
            if node is not None:
                if node not in counts:
                    open_nodes.append(node)
                counts[node] += 1
    return counts


def _call(node: Node, gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Return the gradient for each edge of a node."""
    if not hasattr(node, "needs_input_grad"):
        found = node(*gradients)
        return list(found) if isinstance(found, tuple) else [found]
    whole = [
        torch.zeros(of.shape, dtype=of.dtype, device=of.device) if one is None else one
        for one, of in zip(gradients, node._input_metadata, strict=True)
    ]
    found = node.apply(*whole)
    found = found if isinstance(found, tuple) else (found,)
    needed = iter([one for one, needs in zip(found, node.needs_input_grad, strict=False) if needs])
    return [None if following is None else next(needed) for following, _ in node.next_functions]


def _add(arrived: dict[Node, list[Tensor | None]], node: Node, index: int, gradient: Tensor) -> None:
    """Add a gradient to those that have arrived at an input of a node."""
    of = node._input_metadata[index]
    if gradient.shape != torch.Size(of.shape):
        gradient = gradient.sum_to_size(of.shape)
    gradient = gradient.to(of.dtype)
    gradients = arrived.setdefault(node, [None] * len(node._input_metadata))
    before = gradients[index]
    gradients[index] = gradient if before is None else before.add_(gradient)


def _accumulate(parameter: Tensor, gradients: list[Tensor | None], follow: Callable[[Tensor], None]) -> None:
    """Add a gradient to that of a parameter."""
    (gradient,) = gradients
    if gradient is None:
        return
    if parameter.grad is not None:
        parameter.grad.add_(gradient)
        return
    fits = gradient.is_contiguous() and gradient.untyped_storage().nbytes() == gradient.nbytes
    gradients.clear()
    parameter.grad = gradient.detach() if fits else gradient.contiguous().clone()
    follow(parameter)
