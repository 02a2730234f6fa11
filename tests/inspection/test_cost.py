"""Parameters, FLOPs, saved activations and peak memory, compared with arithmetic by hand."""

import torch
from torch import nn

from sslvision.inspection.cost import count_flops, count_parameters, count_saved_bytes
from sslvision.inspection.peak_memory import peak_memory
from sslvision.inspection.throughput import forward_rates, training_rates


def test_a_linear_layer_multiplies_and_adds_once_for_each_weight():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 7))
    assert count_flops(model, (3, 4, 5)) == {"": 2 * 60 * 7, "1": 2 * 60 * 7}


def test_a_convolution_does_so_at_every_position():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=4))
    first = 2 * (3 * 3 * 3) * 8 * 16 * 16  # W2 = (32 - 3 + 2) / 2 + 1 = 16
    second = 2 * (2 * 3 * 3) * 8 * 16 * 16  # each filter reads 2 of the 8 channels
    assert count_flops(model, (3, 32, 32)) == {"": first + second, "0": first, "2": second}


def test_counting_leaves_the_network_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_flops(model, (3, 8, 8))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_parameters_that_are_shared_count_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared, nn.Linear(4, 2)))
    assert count_parameters(model) == {"": 20 + 10, "0": 20, "1": 0, "2": 30, "2.1": 10}


def test_saved_activations_are_those_that_gradients_need_and_each_storage_counts_once():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 5))
    # The first layer keeps its input, the images; the ReLU its output, which is also the second layer's input and is not
    # counted again. Weights are parameters.
    images, hidden = 4 * 48 * 4, 4 * 10 * 4
    assert count_saved_bytes(model, torch.randn(4, 3, 4, 4)) == {"": images + hidden, "1": images, "2": hidden}


def test_a_batch_norm_keeps_its_input_and_two_statistics_for_each_channel():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6))
    saved = count_saved_bytes(model, torch.randn(2, 3, 4, 4))
    convolution, norm = 2 * 3 * 16 * 4, 2 * 6 * 16 * 4 + 2 * 6 * 4
    assert saved == {"": convolution + norm, "0": convolution, "1": norm}


def test_the_peak_of_two_layers_is_that_of_arithmetic():
    a, b, c, batch = 100, 1000, 10, 8
    model = nn.Sequential(nn.Linear(a, b, bias=False), nn.ReLU(inplace=True), nn.Linear(b, c, bias=False))
    weights, images, hidden = 4 * (a * b + b * c), 4 * batch * a, 4 * batch * b
    # When the first weight's gradient is made there are: the weights, the images, the gradient of the second weight, that of
    # the hidden layer, and the gradient itself. The hidden activations have just been used by the ReLU.
    at_least = weights + images + 4 * b * c + hidden + 4 * a * b
    found = peak_memory(model, torch.randn(batch, a))
    assert at_least <= found <= at_least + hidden + 3 * 4 * batch * c
    assert all(p.grad is None for p in model.parameters())


def test_inference_in_place_needs_no_more_than_one_activation_beside_its_input():
    from sslvision.inspection.peak_memory import LiveTensors

    x = torch.randn(1000)
    with LiveTensors([x]) as live:
        for _ in range(5):
            y = x * 2
            y += 1
            del y
    assert (live.peak, live.bytes) == (4000, 0)


def test_as_many_rates_as_repetitions_and_no_gradient_is_left():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    images = torch.randn(4, 3, 4, 4)
    for rates in (forward_rates(model, images, repeats=3), training_rates(model, images, repeats=3)):
        assert len(rates) == 3
        assert min(rates) > 0
    assert model[1].weight.grad is None
