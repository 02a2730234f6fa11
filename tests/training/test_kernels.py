"""What training chooses for the whole process, in a process of its own."""

import platform
import subprocess
import sys

import pytest
import torch

FAULTS = """
import resource, torch
from sslvision.training.trainer import configure_torch
torch.set_num_threads(1)
if {chosen}:
    configure_torch("cpu")

def step():  # tensors of 40 MB, made and freed as activations are
    kept = [torch.ones(10_000_000) for _ in range(4)]
    del kept

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

PRODUCT_AND_UPDATE = """
import torch
from sslvision.training.trainer import configure_torch
configure_torch("cpu")
torch.manual_seed(0)
a, b = torch.randn(2, 300, 300)
print(((a @ b).double() - a.double() @ b.double()).abs().max().item())
torch.cuda.device_count = lambda: print("NVIDIA's driver is looked for") or 0
weight = torch.nn.Parameter(torch.ones(3))
weight.grad = torch.ones(3)
torch.optim.AdamW([weight]).step()
"""


def told(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


@pytest.mark.e2e
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_step_finds_the_memory_that_the_one_before_it_freed():
    """Else the system takes it back, and maps every page anew at its first touch: 160 MB are 40,000 pages of 4 KB."""
    without, chosen = (int(told(FAULTS.format(chosen=chosen))) for chosen in (False, True))
    assert without > 300  # huge pages are fewer
    assert chosen < without / 2


def test_products_of_fp32_numbers_stay_fp32_and_an_update_on_a_cpu_does_not_look_for_a_gpus_driver(warm_python):
    error, *looked = warm_python(PRODUCT_AND_UPDATE).splitlines()
    assert float(error) < 1e-3  # bf16 would be off by 0.1
    assert torch.cuda.is_available() or looked == []
