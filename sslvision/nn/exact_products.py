"""Matrix products in fp32 where training has chosen TF32, whose numbers have 10 bits of 23."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def exact_products(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which CUDA multiplies fp32 matrices in fp32; on other devices it does nothing.

    The choice is made on the host when a product is called for, be it for a CUDA graph. What is compiled has made it when
    it was: there the context does nothing, and belongs around the call.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return nullcontext()
    return _in_full()


@contextmanager
def _in_full() -> Iterator[None]:
    # Not torch.backends.cuda.matmul: whoever asks for the precision by the one way after it was set by the other gets an error.
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
