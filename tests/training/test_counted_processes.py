"""How many processes there are, which strategies are refused, and how long processes wait for one another."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from sslvision.errors import UsageError
from sslvision.training.processes import check_processes, join_restarted, lost, strategy_for
from sslvision.training.sharding import FSDP2
from sslvision.training.trainer import build_trainer, check_options


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload", "deepspeed_stage_2"])
def test_a_strategy_that_would_train_something_else_is_refused_with_the_one_to_use(strategy):
    with pytest.raises(UsageError, match=rf"trainer.strategy={strategy} .*use trainer.strategy=fsdp2.*strategy=ddp"):
        check_options({"strategy": strategy})
    check_options({"strategy": "fsdp2"})
    with pytest.raises(UsageError, match=r"fsdp2 is for pretraining only: use trainer.strategy=ddp"):
        check_options({"strategy": "fsdp2"}, pretrains=False)


def test_strategies_that_are_refused_are_not_offered():
    with pytest.raises(UsageError, match="unknown to Lightning") as told:
        check_options({"strategy": "nonsense"})
    assert "fsdp2" in str(told.value)
    assert "fsdp_cpu_offload" not in str(told.value)
    assert "deepspeed" not in str(told.value)


def waits(strategy):
    return strategy._timeout


def test_the_timeout_reaches_every_strategy_of_several_processes(tmp_path):
    for name, kind in (("ddp", DDPStrategy), ("ddp_find_unused_parameters_true", DDPStrategy), ("fsdp2", FSDP2)):
        strategy = strategy_for({"strategy": name}, 90)
        assert isinstance(strategy, kind)
        assert waits(strategy) == timedelta(seconds=90), name
    assert strategy_for({"strategy": "ddp_find_unused_parameters_true"}, 90)._ddp_kwargs == {
        "find_unused_parameters": True
    }
    chosen = {"accelerator": "cpu", "devices": 2}  # Lightning's choice is DDP
    trainer = build_trainer(
        folder=tmp_path, epochs=1, steps=4, dry_run=False, loggers=[], callbacks=[], options=chosen, timeout=70
    )
    assert waits(trainer.strategy) == timedelta(seconds=70)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"}
SLURM = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "mae"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}


@pytest.mark.parametrize(
    ("environment", "devices", "nodes", "told"),
    [
        (TORCHRUN, 2, 1, r"torchrun has started 4 processes on 2 nodes.*counts 2: .*num_nodes=1.*num_nodes=2\."),
        (TORCHRUN, 1, 1, r"counts 1: .*Set trainer.devices=2 trainer.num_nodes=2\."),
        (SLURM, 8, 1, r"SLURM has started 16 processes.*counts 8: .*Set trainer.devices=8 trainer.num_nodes=2\."),
        (SLURM | SRUN, 1, 1, r"srun has started 2 processes on 1 node, .*counts 1: .*Set trainer.devices=2 "),
        ({**SLURM, "SLURM_NTASKS": "15"}, 8, 2, "equally many on each of the 2 nodes"),
        (
            {**SLURM, "SLURM_NTASKS": "1", "SLURM_NNODES": "1"},
            8,
            1,
            r"started 1 process on 1 node, .*ntasks-per-node=8",
        ),
    ],
)
def test_processes_that_the_trainer_does_not_count_are_named_with_what_to_set(environment, devices, nodes, told):
    with pytest.raises(UsageError, match=told):
        check_processes(devices, nodes, environment)


def test_processes_that_fit_or_that_lightning_starts_pass():
    check_processes(2, 2, TORCHRUN)
    check_processes(8, 2, SLURM)
    check_processes(8, 1, {**SLURM, "SLURM_JOB_NAME": "bash"})
    check_processes(1, 1, SLURM)  # without srun: one process in a job of many tasks
    check_processes(8, 4, {"WORLD_SIZE": "2"})  # somebody else's


def test_a_process_that_was_killed_is_told_from_one_that_ended_by_itself():
    ended, killed = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2))
    try:
        assert lost([ended, killed]) == []
        killed.kill()
        killed.wait()
        assert lost([ended, killed]) == [(2, -9)]
    finally:
        ended.kill()
        ended.wait()
    own = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    own.wait()
    assert lost([own]) == []


def test_processes_that_torchrun_starts_again_do_not_read_the_addresses_of_those_that_are_gone(monkeypatch):
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    again = {
        **{"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port), "RANK": "1", "WORLD_SIZE": "4"},
    }
    ddp = DDPStrategy(parallel_devices=[torch.device("cpu")], timeout=timedelta(seconds=90))
    for other in (
        {"TORCHELASTIC_RESTART_COUNT": "0"},
        {"GROUP_WORLD_SIZE": "2"},
        {"TORCHELASTIC_USE_AGENT_STORE": "False"},
    ):
        assert not join_restarted(ddp, again | other)
    assert not join_restarted(SingleDeviceStrategy("cpu"), again)
    joined = []
    monkeypatch.setattr(dist, "init_process_group", lambda *names, **given: joined.append((names, given)))
    monkeypatch.setattr("atexit.register", lambda call: joined.append(call))
    assert join_restarted(ddp, again)
    (names, given), at_exit = joined
    assert names == ("gloo",)
    assert (given["rank"], given["world_size"], given["timeout"]) == (1, 4, timedelta(seconds=90))
    given["store"].set("address", "new")
    assert kept.get("start 2/address") == b"new"
    assert at_exit is dist.destroy_process_group
