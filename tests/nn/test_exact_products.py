import pytest
import torch

from sslvision.nn.exact_products import exact_products

CUDA = torch.device("cuda")  # its flags are the host's, and there without one


@pytest.fixture(autouse=True)
def chosen():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_products_are_exact_for_as_long_as_the_context_lasts():
    assert torch.backends.cuda.matmul.allow_tf32
    with exact_products(CUDA):
        assert not torch.backends.cuda.matmul.allow_tf32
        with exact_products(CUDA):
            assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.get_float32_matmul_precision() == "high"


def test_what_was_chosen_comes_back_after_an_error():
    with pytest.raises(RuntimeError), exact_products(CUDA):
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_on_a_cpu_nothing_changes(precision):
    torch.set_float32_matmul_precision(precision)
    with exact_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == precision
    assert torch.get_float32_matmul_precision() == precision


def test_it_goes_into_a_graph_and_around_one():
    def square(x):
        with exact_products(x.device):
            return x @ x

    x = torch.rand(3, 3)
    compiled = torch.compile(square, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x @ x)
    with exact_products(CUDA):
        assert torch.equal(compiled(x), x @ x)
