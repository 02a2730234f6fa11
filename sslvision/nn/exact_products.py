"""Matrix products in full fp32 while training uses TF32, which keeps 10 of the 23 bits of the mantissa."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def exact_products(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which CUDA multiplies fp32 matrices in fp32; on other devices it does nothing.

    The precision is chosen on the host when a product is launched or captured. Compiled code chooses it at compile time: inside
    it the context does nothing and has to be put around the call.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return nullcontext()
    return _in_full()


@contextmanager
def _in_full() -> Iterator[None]:
    # Not torch.backends.cuda.matmul: torch raises an error if the two interfaces are mixed.
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
