"""DINO against the authors' numbers, and the properties the paper states."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.build import build_backbone
from sslvision.data.batch import Batch
from sslvision.errors import UsageError
from sslvision.methods.base import Clock
from sslvision.methods.dino import DINO, cross_entropy_of_pairs, embed


@pytest.fixture(scope="module")
def golden():
    with safe_open(Path(__file__).parents[1] / "golden" / "dino_vit.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["config"])


def tiny(**settings):
    torch.manual_seed(0)
    backbone = build_backbone(
        "vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, drop_path_rate=0.0
    )
    small = {"prototypes": 96, "hidden": 64, "bottleneck": 32, "local_crops": 2, "local_size": 32}
    return DINO(backbone, **{**small, **settings})


def named(network):
    return {name.replace("backbone.model.", "backbone."): p for name, p in network.named_parameters()}


@pytest.fixture(scope="module")
def followed(golden):
    """Our four steps beside theirs: per step, what both saw."""
    tensors, config = golden
    method = tiny(
        teacher_temp=config["teacher_temp"],
        warmup_teacher_temp=config["warmup_teacher_temp"],
        warmup_teacher_temp_epochs=config["warmup_teacher_temp_epochs"],
        momentum=0.9,
        clip_gradient=config["clip_grad_per_param"],
        freeze_prototypes_epochs=config["freeze_last_layer_epochs"],
        lr=5e-4,
        min_lr=1e-6,
        warmup_epochs=1,
    )
    for network in (method.student, method.teacher):
        for name, parameter in named(network).items():
            parameter.data.copy_(tensors[f"student.{name}"])
    optimizer = method.configure_optimizers()
    names = [name for name in config["param_names_in_order"] if name != "head.last_layer.weight_g"]
    steps = []
    for step in range(4):
        clock = Clock(step, config["epochs"] * config["steps_per_epoch"], config["steps_per_epoch"])
        rates = method.schedule(clock)
        for group in optimizer.param_groups:
            group["lr"] = rates["lr"]
            group["weight_decay"] = rates["weight_decay"] if group["decayed"] else 0.0
        metrics = method.losses([tensors[f"step{step}.crop{crop}"] for crop in range(4)], clock)
        optimizer.zero_grad()
        metrics["loss"].backward()
        norms = torch.stack([named(method.student)[name].grad.norm() for name in names])
        method.prepare_update(optimizer, clock)
        optimizer.step()
        method.after_update(clock)
        steps.append((rates, metrics["loss"].item(), norms, method.center.clone()))
    return method, steps


def test_losses_centers_and_gradients_equal_the_authors_for_four_steps(golden, followed):
    tensors, config = golden
    for step, (rates, loss, norms, center) in enumerate(followed[1]):
        assert abs(rates["lr"] - config["lr"][step]) <= 1e-9
        assert abs(rates["weight_decay"] - config["weight_decay"][step]) <= 1e-9
        assert abs(loss - tensors[f"step{step}.loss"].item()) <= 1e-5
        assert (center - tensors[f"step{step}.center_after"]).abs().max() <= 1e-5
        theirs = tensors[f"step{step}.param_grad_norms_before_clip"]
        assert ((norms - theirs).abs() <= 1e-4 * theirs + 1e-5).all()


def test_student_and_teacher_equal_the_authors_after_four_steps(golden, followed):
    tensors, _ = golden
    for whose in ("student", "teacher"):
        for name, parameter in named(getattr(followed[0], whose)).items():
            assert (parameter - tensors[f"final_{whose}.{name}"]).abs().max() <= 1e-5, f"{whose} {name}"


def test_the_teachers_momentum_equals_the_authors(golden):
    _, config = golden
    method = tiny(momentum=0.9)
    for step, expected in enumerate(config["teacher_momentum"]):
        assert abs(method.schedule_momentum(step, steps=8) - expected) <= 1e-9


def test_the_loss_is_the_mean_over_all_pairs_of_different_crops():
    q = torch.rand(2, 5, 7).softmax(-1)
    z = torch.randn(4, 5, 7)
    pairs = [-(q[t] * F.log_softmax(z[s], -1)).sum(-1).mean() for t in range(2) for s in range(4) if s != t]
    assert len(pairs) == 6
    assert torch.allclose(cross_entropy_of_pairs(q, z), torch.stack(pairs).mean(), atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(cross_entropy_of_pairs(q, z), torch.stack(pairs).mean(), atol=1e-6)


@pytest.mark.parametrize("crops", [2, 3, 10])
def test_the_gradient_of_the_loss_is_that_of_all_pairs(crops):
    torch.manual_seed(0)
    q = torch.rand(2, 5, 7, dtype=torch.float64).softmax(-1)
    logits = torch.randn(crops, 5, 7, dtype=torch.float64, requires_grad=True)
    pairs = [
        -(q[t] * F.log_softmax(logits[s] / 0.1, -1)).sum(-1).mean() for t in range(2) for s in range(crops) if s != t
    ]
    ours, theirs = 3 * cross_entropy_of_pairs(q, logits, 0.1), 3 * torch.stack(pairs).mean()
    assert torch.allclose(ours, theirs, rtol=1e-12)
    assert torch.allclose(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)), rtol=1e-9, atol=1e-12)


def test_the_teacher_never_trains_and_is_never_in_train_mode():
    method = tiny().train()
    assert method.student.training
    assert not any(module.training for module in method.teacher.modules())
    assert not any(parameter.requires_grad for parameter in method.teacher.parameters())
    before = [parameter.clone() for parameter in method.teacher.parameters()]
    method.losses([torch.randn(2, 3, 32, 32) for _ in range(4)], Clock(0, 8, 2))["loss"].backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, method.teacher.parameters(), strict=True))


def test_the_teacher_moves_by_the_stated_share_once_per_update():
    method = tiny(momentum=0.75, center_momentum=0.9)
    method.teacher_means.fill_(1)  # of ones and of zeros
    method.micro_batches.fill_(2)
    for parameter in method.student.parameters():
        parameter.data += 1.0
    before = [parameter.clone() for parameter in method.teacher.parameters()]
    method.after_update(Clock(0, 8, 2))
    for old, new in zip(before, method.teacher.parameters(), strict=True):
        assert torch.allclose(new, old + 0.25, atol=1e-6)
    assert torch.allclose(method.center, torch.full((1, 96), 0.05))


def test_the_loss_uses_the_center_of_before_the_update():
    method = tiny()
    views = [torch.randn(2, 3, 32, 32) for _ in range(4)]
    first = method.losses(views, Clock(0, 8, 2))["loss"]
    again = method.losses(views, Clock(0, 8, 2))["loss"]
    assert torch.equal(first, again)
    method.center += torch.randn(1, 96)
    assert not torch.allclose(method.losses(views, Clock(0, 8, 2))["loss"], first)


def test_prototypes_stay_as_they_are_in_the_first_epoch_only():
    method = tiny(freeze_prototypes_epochs=1)
    for step, frozen in ((0, True), (1, True), (2, False)):
        method.zero_grad()
        clock = Clock(step, 8, 2)
        method.losses([torch.randn(2, 3, 32, 32) for _ in range(4)], clock)["loss"].backward()
        method.prepare_update(method.configure_optimizers(), clock)
        assert (method.student["head"].last_layer.weight_v.grad is None) == frozen


def test_each_gradient_is_clipped_by_itself():
    method = tiny(clip_gradient=0.5, freeze_prototypes_epochs=0)
    parameters = [parameter for parameter in method.student.parameters() if parameter.requires_grad]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.ones_like(parameter) / parameter.numel() ** 0.5 * (0.1 if number % 2 else 10)
    method.prepare_update(method.configure_optimizers(), Clock(0, 8, 2))
    for number, parameter in enumerate(parameters):
        assert abs(parameter.grad.norm() - (0.1 if number % 2 else 0.5)) <= 1e-5


@pytest.mark.parametrize(
    ("image", "patch", "local"), [(224, 16, 96), (224, 14, 98), (64, 8, 24), (32, 8, 16), (16, 16, 16)]
)
def test_local_crops_have_the_papers_share_of_any_image_size_in_whole_patches(image, patch, local):
    backbone = build_backbone(
        "vit_tiny_patch16_224", image_size=image, patch_size=patch, embed_dim=12, depth=1, num_heads=1
    )
    method = DINO(backbone, prototypes=8, hidden=8, bottleneck=4, local_crops=2)
    assert [crop.shape for crop in method.crops] == [(image, image)] * 2 + [(local, local)] * 2
    assert method.remarks() == []
    assert method.describe()["crops"] == f"2 global ones of {image}, 2 local ones of {local} pixels"


def test_local_crops_of_a_recipe_for_another_image_size_are_told():
    backbone = build_backbone("vit_tiny_patch16_224", image_size=64, patch_size=8, embed_dim=12, depth=1, num_heads=1)
    (told,) = DINO(backbone, prototypes=8, hidden=8, bottleneck=4, local_crops=2, local_size=16).remarks()
    assert told.startswith("Local crops have 16 pixels of 64")
    assert "local_size=24, or local_size=null" in told


@pytest.mark.parametrize("wrong", [{"teacher_temp": 0.0}, {"momentum": 1.5}, {"local_crops": -1}, {"local_size": 20}])
def test_a_setting_that_cannot_be_is_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        tiny(**wrong)


def official(tensors, whose, prefix=""):
    start = f"{whose}."
    return {prefix + name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def test_a_released_checkpoint_is_read_with_student_teacher_and_center(golden, tmp_path):
    tensors, _ = golden
    released = {
        "student": official(tensors, "final_student", prefix="module."),
        "teacher": official(tensors, "final_teacher"),
        "dino_loss": {"center": torch.full((1, 96), 0.5)},
        "args": Namespace(lr=5e-4),
        "epoch": 100,
    }
    torch.save(released, tmp_path / "dino.pth")
    method = DINO.from_official(tmp_path / "dino.pth", heads=3, local_size=16)
    for whose in ("student", "teacher"):
        for name, parameter in named(getattr(method, whose)).items():
            assert torch.equal(parameter, tensors[f"final_{whose}.{name}"]), name
    assert (method.center == 0.5).all()


def test_a_released_backbone_is_read_into_student_and_teacher(golden):
    tensors, _ = golden
    backbone = official(tensors, "final_teacher.backbone")
    method = DINO.from_official(backbone, heads=3, prototypes=32, local_size=16)
    for network in (method.student, method.teacher):
        assert torch.equal(network["backbone"].model.blocks[1].mlp.fc2.weight, backbone["blocks.1.mlp.fc2.weight"])


def test_what_is_no_dino_checkpoint_is_refused():
    with pytest.raises(UsageError, match="no DINO checkpoint"):
        DINO.from_official({"conv1.weight": torch.zeros(1)})


def test_views_differ_and_are_a_function_of_image_and_epoch():
    method = tiny(local_size=16)
    indices, epoch = torch.tensor([3, 8]), torch.tensor([0, 0])
    crops = [torch.randint(0, 256, (2, 3, crop.size, crop.size), dtype=torch.uint8) for crop in method.crops]
    crops[1] = crops[0].clone()

    def views(epoch):
        return method.views(Batch(crops, indices, epoch, [], indices), ImageRandom(0, epoch, indices))

    first = views(epoch)
    assert [tuple(view.shape) for view in first] == [(2, 3, 32, 32)] * 2 + [(2, 3, 16, 16)] * 2
    assert not torch.allclose(first[0], first[1])
    assert all(torch.equal(one, other) for one, other in zip(first, views(epoch), strict=True))
    assert not torch.allclose(first[0], views(epoch + 1)[0])


def test_norms_of_prototypes_survive_saving_and_reading_in_the_released_format(tmp_path):
    method = tiny(norm_last_layer=False)
    for network in (method.student, method.teacher):
        network["head"].last_layer.weight_g.data.uniform_(0.5, 2.0)
    state = {
        whose: {name.replace("backbone.model.", "backbone."): value for name, value in network.state_dict().items()}
        for whose, network in (("student", method.student), ("teacher", method.teacher))
    }
    torch.save(state, tmp_path / "dino.pth")
    read = DINO.from_official(tmp_path / "dino.pth", heads=3, norm_last_layer=False, local_size=16).eval()
    images = torch.randn(2, 3, 32, 32)
    for whose in ("student", "teacher"):
        ours, theirs = (embed(getattr(one, whose).eval(), images) for one in (method, read))
        assert torch.equal(ours, theirs)
    rows = method.student["head"].last_layer
    assert torch.allclose((rows.weight_g * F.normalize(rows.weight_v, dim=1)).norm(dim=1), rows.weight_g[:, 0])


def test_prototypes_of_unit_norm_stay_so_while_they_train():
    method = tiny(freeze_prototypes_epochs=0)
    optimizer = torch.optim.SGD([p for p in method.student.parameters() if p.requires_grad], lr=10.0)
    before = method.student["head"].last_layer.weight_v.clone()
    method.losses([torch.randn(2, 3, 32, 32) for _ in range(4)], Clock(0, 8, 2))["loss"].backward()
    optimizer.step()
    rows = method.student["head"].last_layer
    assert not torch.allclose(rows.weight_v, before)
    assert (rows.weight_g == 1).all()
    assert torch.allclose(rows(torch.eye(32)).norm(dim=0), torch.ones(96), atol=1e-5)


@pytest.mark.parametrize(
    ("image", "patch", "local"), [(64, 16, 32), (32, 8, 16), (56, 14, 28), (32, 4, 16), (16, 2, 8)]
)
def test_crops_of_either_size_train_the_positions_at_any_patch_size(image, patch, local):
    torch.manual_seed(0)
    backbone = build_backbone(
        "vit_tiny_patch16_224", image_size=image, patch_size=patch, embed_dim=24, depth=2, num_heads=2
    )
    method = DINO(backbone, prototypes=32, hidden=16, bottleneck=8, local_crops=1, local_size=local)
    assert [crop.size for crop in method.crops] == [image, image, local]
    views = [torch.randn(4, 3, crop.size, crop.size) for crop in method.crops]
    for number in range(3):
        seen = embed(method.student, views[number])
        gradient = torch.autograd.grad(seen.square().sum(), method.student["backbone"].model.pos_embed)[0]
        assert (gradient[0].abs().sum(dim=-1) > 0).all()  # every position, the small crop's by interpolation
    assert torch.isfinite(method.losses(views, Clock(0, 8, 2))["loss"])


def test_mutual_information_is_what_the_answers_tell_about_their_images():
    method = tiny(student_temp=1.0, teacher_temp=1.0, warmup_teacher_temp=1.0)
    answers = torch.full((4, 96), -50.0)
    answers[range(4), range(4)] = 50.0  # four images, each with a prototype of its own
    method.teacher = FixedAnswers(answers.repeat(2, 1))
    views = [torch.randn(4, 3, 32, 32) for _ in range(4)]
    metrics = method.losses(views, Clock(0, 8, 2))
    assert metrics["mutual_information"] == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-5)
    assert metrics["teacher_entropy"] == pytest.approx(0, abs=1e-5)
    method.teacher = FixedAnswers(answers[:1].repeat(8, 1))
    assert method.losses(views, Clock(0, 8, 2))["mutual_information"] == pytest.approx(0, abs=1e-5)


def test_loss_is_entropy_plus_kl_and_is_shown_against_ln_k():
    metrics = tiny().losses([torch.randn(2, 3, 32, 32) for _ in range(4)], Clock(0, 8, 2))
    assert metrics["loss"].item() == pytest.approx((metrics["teacher_entropy"] + metrics["kl"]).item(), abs=1e-5)
    assert metrics["kl"] >= 0
    assert metrics["loss_over_ln_k"] == pytest.approx(
        metrics["loss"].item() / torch.tensor(96.0).log().item(), abs=1e-5
    )


class FixedAnswers(torch.nn.ModuleDict):
    """A teacher that says the same to all images of a batch, whatever they show."""

    def __init__(self, answers):
        super().__init__({"backbone": torch.nn.Identity(), "head": torch.nn.Identity()})
        self["head"].forward = lambda _: answers
