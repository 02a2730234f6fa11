import pytest
import torch

from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError
from sslvision.training.trainer import build_trainer, check_options, precision_in_effect


def build(folder, **options):
    return build_trainer(folder=folder, epochs=3, steps=300, dry_run=False, loggers=[], callbacks=[], options=options)


def test_what_the_person_says_wins_over_the_defaults(tmp_path):
    trainer = build(tmp_path, accelerator="cpu", precision="64-true", accumulate_grad_batches=4)
    assert trainer.precision == "64-true"
    assert trainer.accumulate_grad_batches == 4
    assert trainer.max_epochs == 3


@pytest.mark.parametrize(("steps", "every"), [(2, 1), (90, 1), (1_000, 10), (9_360, 50), (500_000, 50)])
def test_a_run_of_any_length_has_a_learning_curve(tmp_path, steps, every):
    trainer = build_trainer(
        folder=tmp_path, epochs=1, steps=steps, dry_run=False, loggers=[], callbacks=[], options={"accelerator": "cpu"}
    )
    assert trainer.log_every_n_steps == every


def test_a_cpu_trains_in_bf16_only_if_it_has_units_for_it(tmp_path, monkeypatch):
    for units, precision in (
        ({}, "32-true"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True}, "bf16-mixed"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        assert build(tmp_path, accelerator="cpu").precision == precision


def test_what_lightning_refuses_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="accelerator=abacus"):
        build(tmp_path, accelerator="abacus")


SPAWNED = ["ddp_fork", "ddp_spawn", "ddp_notebook", "ddp_fork_find_unused_parameters_true"]


@pytest.mark.parametrize("strategy", [*SPAWNED, "ddp_spawn_find_unused_parameters_false"])
def test_a_strategy_whose_processes_end_with_training_is_refused_with_the_one_to_use(strategy):
    use = strategy.replace("_fork", "").replace("_spawn", "").replace("_notebook", "")
    with pytest.raises(
        UsageError, match=rf"trainer.strategy={strategy} starts processes .*: use trainer.strategy={use},"
    ):
        check_options({"strategy": strategy})


def test_what_lightning_chooses_in_a_notebook_is_refused_too(tmp_path):
    with pytest.raises(UsageError, match=r"ddp_fork starts processes that end with training.*trainer.devices=1"):
        build(tmp_path, accelerator="cpu", devices=2, strategy="ddp_fork")
    assert build(tmp_path, accelerator="cpu", devices=1).world_size == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strategy": "dpp"},
            r"trainer.strategy=dpp is unknown to Lightning: it is one of .*Did you mean .*strategy=ddp\?",
        ),
        ({"strategy": "nonsense"}, "trainer.strategy=nonsense is unknown to Lightning: it is one of auto, ddp, "),
        ({"strategy": "ddp_sqawn"}, "trainer.strategy=ddp_sqawn is unknown"),
        (
            {"accelerator": "abacus"},
            "trainer.accelerator=abacus is unknown to Lightning: it is one of auto, cpu, cuda, gpu",
        ),
        ({"accelerator": "gpus"}, r"Did you mean trainer.accelerator=gpu\?"),
        ({"accelerator": 3}, "trainer.accelerator=3 is unknown"),
    ],
)
def test_a_strategy_or_an_accelerator_that_does_not_exist_is_answered_with_those_that_do(options, message):
    with pytest.raises(UsageError, match=message) as told:
        check_options(options)
    assert not [
        name for name in SPAWNED if name in str(told.value).split("Did you mean")[-1] and "Did" in str(told.value)
    ]


def test_an_accelerator_that_this_machine_lacks_is_refused_with_what_takes_another(tmp_path):
    check_options({"strategy": "ddp", "accelerator": "gpu"})
    check_options({"strategy": "ddp_find_unused_parameters_true"})
    check_options({})
    with pytest.raises(UsageError, match=r"trainer.accelerator=gpu: .*accelerator=auto takes what this machine has"):
        build(tmp_path, accelerator="gpu")


def test_the_precision_that_is_told_is_the_one_that_a_network_runs_in(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    mixed, full = build(tmp_path, accelerator="cpu"), build(tmp_path, accelerator="cpu", precision="32-true")
    vit, resnet = (build_backbone(name, image_size=32) for name in ("test_vit", "test_resnet"))
    assert precision_in_effect(mixed, vit) == "bf16-mixed"
    assert precision_in_effect(mixed, resnet).startswith("32-true in the backbone")
    assert "bf16-mixed in the rest" in precision_in_effect(mixed, resnet)
    assert precision_in_effect(full, resnet) == "32-true"
    seen = []
    resnet.model.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        resnet(torch.zeros(2, 3, 32, 32))
    assert seen == [torch.float32]
