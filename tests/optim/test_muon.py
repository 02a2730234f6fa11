import copy

import pytest
import timm
import torch
from timm.optim.muon import Muon as TimmMuon
from torch import nn

from sslvision.errors import UsageError
from sslvision.optim.muon import Muon, orthogonal, split_matrices
from sslvision.optim.nonfinite import skip_nonfinite
from sslvision.optim.optimizers import build_optimizer
from sslvision.optim.param_groups import decay_groups, layer_groups


def filled(*layers, seed=0):
    """The layers, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    return layers


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_singular_values_become_one_and_singular_vectors_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    (result,) = orthogonal([matrix])
    between = U.T @ result @ V.T  # (n, n)
    strong = 0.1 * S.max() < S
    assert (between.diagonal()[strong] - 1).abs().max() < 0.2
    assert (between - between.diagonal().diag()).abs().max() < 1e-4


def test_each_matrix_is_orthogonalized_alone_though_those_of_one_shape_are_multiplied_together():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(*shape, generator=generator) for shape in ((8, 24), (24, 8), (8, 8), (8, 24))]
    for together, matrix in zip(orthogonal(matrices), matrices, strict=True):
        torch.testing.assert_close(together, orthogonal([matrix])[0])


def test_three_updates_equal_those_of_timm_up_to_its_bf16():
    ours, theirs = nn.Linear(48, 24, bias=False), nn.Linear(48, 24, bias=False)
    theirs.load_state_dict(ours.state_dict())
    start = ours.weight.detach().clone()
    optimizer = Muon([{"params": [ours.weight], "parts": 1}], lr=0.02, weight_decay=0.1, momentum=0.9)
    options = {"ns_coefficients": "quintic", "safety_factor": 1.02, "adjust_lr_fn": "match_rms_adamw", "nesterov": True}
    reference = TimmMuon([theirs.weight], lr=0.02, weight_decay=0.1, momentum=0.9, **options)
    for step in range(3):
        filled(ours, seed=step), filled(theirs, seed=step)
        optimizer.step(), reference.step()
    moved = (theirs.weight - start).norm()
    assert (ours.weight - theirs.weight).norm() < 0.02 * moved
    assert 0.5 < moved / (3 * 0.02 * 0.2 * 48**0.5 * 24**0.5) < 1.1  # as large as updates of AdamW: lr x 0.2 a weight


def test_a_step_that_is_to_be_skipped_changes_no_bit_and_the_next_is_as_if_it_had_not_been():
    steady, skipping = (nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12)) for _ in range(2))
    skipping.load_state_dict(steady.state_dict())
    optimizers = [
        Muon(
            [{"params": [net[0].weight], "parts": 1}, {"params": [net[0].bias, *net[1].parameters()]}], weight_decay=0.1
        )
        for net in (steady, skipping)
    ]
    for step in range(3):
        for net, optimizer in zip((steady, skipping), optimizers, strict=True):
            filled(net, seed=step)
            skip_nonfinite(optimizer, [parameter.grad for parameter in net.parameters()])
            optimizer.step()
        filled(skipping, seed=10)
        skipping[0].weight.grad[0, 0] = float("nan")
        skip_nonfinite(optimizers[1], [parameter.grad for parameter in skipping.parameters()])
        optimizers[1].step()
        assert all(map(torch.equal, steady.parameters(), skipping.parameters()))
        for one, other in zip(*(optimizer.state_dict()["state"].values() for optimizer in optimizers), strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_queries_keys_and_values_are_three_matrices():
    layer = nn.ModuleDict({"qkv": nn.Linear(16, 48, bias=False)})
    (group,) = split_matrices([{"params": list(layer.parameters())}], layer)
    assert group["parts"] == 3
    filled(layer)
    gradient, before = layer["qkv"].weight.grad.clone(), layer["qkv"].weight.detach().clone()
    Muon([group], lr=1.0, momentum=0.0).step()
    moved = before - layer["qkv"].weight
    for part, of_gradient in zip(moved.chunk(3), gradient.chunk(3), strict=True):
        torch.testing.assert_close(part.detach(), 0.2 * 16**0.5 * orthogonal([of_gradient])[0])


def test_all_other_parameters_get_adamw_to_the_bit():
    model = timm.create_model("test_vit", num_classes=5)
    twin = copy.deepcopy(model)
    groups = split_matrices(decay_groups(model), model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon = {names[id(p)] for group in groups if group["parts"] for p in group["params"]}
    assert {"blocks.0.attn.qkv.weight", "blocks.5.mlp.fc2.weight"} <= by_muon
    assert not by_muon & {"head.weight", "patch_embed.proj.weight", "pos_embed", "cls_token", "blocks.0.norm1.weight"}
    assert sum(len(group["params"]) for group in groups) == len(names)
    ours = Muon(groups, lr=0.01, betas=(0.9, 0.95))
    reference = torch.optim.AdamW(decay_groups(twin), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(2):
        filled(model, seed=step), filled(twin, seed=step)
        ours.step(), reference.step()
    for (name, parameter), of_twin in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, of_twin) != (name in by_muon), name


def test_keys_of_groups_are_kept_and_the_classifier_of_a_fine_tuned_model_gets_adamw():
    model = timm.create_model("test_vit", num_classes=5)
    groups = split_matrices(layer_groups(model, weight_decay=0.05, layer_decay=0.5), model)
    assert len({group["lr_scale"] for group in groups if group["parts"]}) == 6  # one for each block
    assert all(not group["parts"] for group in groups if any(p is model.head.weight for p in group["params"]))


def test_a_saved_optimizer_goes_on_as_if_it_had_never_stopped():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    optimizer = build_optimizer("muon", decay_groups(model), lr=0.01, options={}, module=model)
    filled(model), optimizer.step()
    again = copy.deepcopy(model)
    resumed = build_optimizer("muon", decay_groups(again), lr=0.5, options={}, module=again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network, of_it in ((model, optimizer), (again, resumed)):
        filled(network, seed=1), of_it.step()
    for parameter, same in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, same)


def test_a_matrix_without_a_gradient_stays_as_it_is():
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    build_optimizer("muon", decay_groups(layer), lr=0.1, options={}, module=layer).step()
    assert torch.equal(layer.weight, before)


def test_shards_and_a_momentum_out_of_range_are_refused():
    with pytest.raises(UsageError, match=r"whole matrices.*trainer\.strategy=ddp"):
        Muon([{"params": [nn.Parameter(torch.zeros(12))], "parts": 1}])
    with pytest.raises(UsageError, match=r"momentum=1\.5 of optimizer=muon"):
        build_optimizer("muon", decay_groups(nn.Linear(4, 4)), lr=0.1, options={"momentum": 1.5})
