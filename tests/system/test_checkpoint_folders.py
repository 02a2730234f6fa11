"""Checkpoints in shards: whole or not at all, never executed, and for any number of processes."""

import os
import pickle
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from warm_process import _run, start_processes

from sslvision.errors import Diverged, StorageError, UsageError
from sslvision.runs.checkpoint import AtomicCheckpoints, newest_good, same_everywhere
from sslvision.runs.resume import checkpoint_to_resume
from sslvision.system import checkpoint_folders
from sslvision.system.checkpoint_folders import is_of_lightning, read_folder, remove, write_folder


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def state(step):
    return {
        "global_step": step,
        "state_dict": {
            "a.weight": torch.arange(step + 3.0).reshape(1, -1),
            "b": torch.tensor(step),
            "none": torch.ones(0),
        },
        "optimizer_states": [
            {
                "state": {3: {"step": torch.tensor(2.0), "exp_avg": torch.ones(2).bfloat16(), "how": "plain"}},
                "param_groups": [{"lr": 0.1, "params": [3]}],
            }
        ],
        "callbacks": {"one": {"weights": torch.arange(2.0)}},
    }


def read(path):
    return read_folder(path) if path.is_dir() else torch.load(path, weights_only=True)


def steps(folder):
    return {path.name: read(path)["global_step"] for path in sorted(folder.iterdir())}


def same(one, other):
    """Return whether two checkpoints are the same, in the dtypes too."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def test_a_folder_is_read_as_the_dictionary_that_was_written(alone, tmp_path):
    write_folder(state(4), tmp_path / "last.ckpt")
    assert same(read_folder(tmp_path / "last.ckpt"), state(4))
    without = read_folder(tmp_path / "last.ckpt", without=["optimizer"])
    assert same(without["state_dict"], state(4)["state_dict"])
    assert without["optimizer_states"][0]["state"] == {3: {"how": "plain"}}
    weights_only = {"global_step": 4, "state_dict": state(4)["state_dict"]}
    write_folder(weights_only, tmp_path / "last.ckpt")
    assert same(read_folder(tmp_path / "last.ckpt"), weights_only)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_tool_makes_one_file_of_it(alone, tmp_path):
    write_folder(state(4), tmp_path / "last.ckpt")
    dcp_to_torch_save(tmp_path / "last.ckpt", tmp_path / "file")
    content = torch.load(tmp_path / "file", weights_only=True)
    assert same(content["state_dict"], state(4)["state_dict"])
    assert content["optimizer_states"]["0"]["3"]["step"] == 2


def test_the_last_few_are_kept_be_they_files_or_folders(alone, tmp_path):
    last, writer = tmp_path / "last.ckpt", AtomicCheckpoints(keep=3)
    for step in (1, 2, 3, 4):
        writer.save_shards(state(step), last)
    assert steps(tmp_path) == {"last.ckpt": 4, "last-1.ckpt": 3, "last-2.ckpt": 2}
    writer.save_checkpoint(state(5), last)
    assert steps(tmp_path) == {"last.ckpt": 5, "last-1.ckpt": 4, "last-2.ckpt": 3}
    writer.save_shards({**state(5), "later": True}, last)  # a second one of the same update takes its place
    assert read_folder(last)["later"]
    writer.save_checkpoint(state(5), last)
    assert last.is_file()
    writer.save_checkpoint(state(6), last)
    AtomicCheckpoints(keep=3).save_shards(state(7), last)  # another process
    assert steps(tmp_path) == {"last.ckpt": 7, "last-1.ckpt": 6, "last-2.ckpt": 5}
    AtomicCheckpoints(keep=1).save_shards(state(8), last)
    assert steps(tmp_path) == {"last.ckpt": 8}


class Killed(BaseException):
    """The end of a process."""


def killed_after(monkeypatch, calls):
    """End the process at a rename or deletion, after so many others."""
    done = []

    def counted(real):
        def call(*arguments, **options):
            if len(done) == calls:
                raise Killed
            done.append(real)
            return real(*arguments, **options)

        return call

    for module, name in ((os, "replace"), (os, "unlink"), (os, "rename"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))


@pytest.mark.thorough
@pytest.mark.parametrize("then", ["save_checkpoint", "save_shards"])
@pytest.mark.parametrize("step", [2, 3], ids=["the same update", "the next update"])
def test_whenever_saving_is_interrupted_a_whole_checkpoint_is_found_and_the_next_save_tidies_up(
    step, then, alone, tmp_path, monkeypatch
):
    calls, ended = 0, False
    while not ended:
        folder = tmp_path / str(calls)
        last, writer = folder / "last.ckpt", AtomicCheckpoints(keep=2)
        for before in (1, 2):
            writer.save_shards(state(before), last)
        with monkeypatch.context() as patched:
            killed_after(patched, calls)
            try:
                getattr(writer, then)(state(step), last)
                ended = True
            except Killed:
                calls += 1
        found = newest_good(folder)
        assert found.path is not None
        assert found.head["global_step"] in ({step} if ended else {2, step})
        assert same(read(found.path)["state_dict"], state(found.head["global_step"])["state_dict"])
        for next_time in ("save_checkpoint", "save_shards"):
            shutil.copytree(folder, again := tmp_path / f"{folder.name}, then {next_time}")
            getattr(AtomicCheckpoints(keep=2), next_time)(state(9), again / "last.ckpt")
            assert newest_good(again).head["global_step"] == 9
            assert {path.name for path in again.iterdir()} == {"last.ckpt", "last-1.ckpt"}
    assert calls > 2


def damage(name, how):
    def call(folder):
        file = folder / name
        if how == "missing":
            file.unlink()
        elif how == "cut off":
            os.truncate(file, file.stat().st_size // 2)
        else:
            content = bytearray(file.read_bytes())
            content[content.find(b"state_dict") if name == "meta.pt" else len(content) // 2] ^= 1  # no padding
            file.write_bytes(content)

    return call


@pytest.mark.parametrize("how", ["missing", "cut off", "one bit"])
@pytest.mark.parametrize("name", ["meta.pt", ".metadata", "__0_0.distcp"])
def test_of_a_damaged_folder_the_one_before_is_resumed_and_the_reason_told(name, how, alone, tmp_path):
    run, writer = tmp_path / "run", AtomicCheckpoints(record={"settings": {}})
    last = run / "checkpoints" / "last.ckpt"
    for step in (1, 2):
        writer.save_shards(state(step), last)
    assert checkpoint_to_resume(str(last), run).step == 2
    damage(name, how)(last)
    resume = checkpoint_to_resume("auto", run)
    assert (resume.step, resume.path.name) == (1, "last-1.ckpt")
    (told,) = resume.findings
    assert f"{last}" in told
    assert "damaged" in told or "not whole" in told or "valid archive" in told
    with pytest.raises(UsageError, match=r"last\.ckpt"):
        read_folder(last)
    for _ in range(2):  # the second time one is there already
        resume.set_aside()
        assert (last.parent / "last.ckpt.damaged").is_dir()
        writer.save_shards(state(2), last)
        damage(name, how)(last)


def test_the_first_process_reads_the_checksums_and_one_that_found_another_checkpoint_ends_all(
    alone, tmp_path, monkeypatch
):
    last, writer = tmp_path / "last.ckpt", AtomicCheckpoints()
    for step in (1, 2):
        writer.save_shards(state(step), last)
    damage("__0_0.distcp", "one bit")(last)
    assert newest_good(tmp_path).path == tmp_path / "last-1.ckpt"
    monkeypatch.setenv("RANK", "1")
    assert newest_good(tmp_path).path == last
    damage("__0_0.distcp", "cut off")(last)
    assert newest_good(tmp_path).path == tmp_path / "last-1.ckpt"

    def gather(found, own):
        found[:] = [str(tmp_path / "last-1.ckpt"), own]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    assert same_everywhere(tmp_path / "last-1.ckpt") == tmp_path / "last-1.ckpt"
    with pytest.raises(UsageError, match=r"different checkpoints \(.*last-1\.ckpt, .*last\.ckpt\).*same command again"):
        same_everywhere(last)


def test_a_state_that_is_not_finite_is_not_saved_and_a_full_disk_leaves_the_one_before(alone, tmp_path, monkeypatch):
    last, writer = tmp_path / "last.ckpt", AtomicCheckpoints()
    writer.save_shards(state(1), last)
    bad = state(2)
    bad["state_dict"]["a.weight"][0, 1] = torch.nan
    with pytest.raises(Diverged, match=r"state_dict\.a\.weight is not finite at update 2.*last\.ckpt is from update 1"):
        writer.save_shards(bad, last)
    real = torch.save

    def full(content, file, *rest, **options):
        if isinstance(content, dict):
            raise OSError(28, "No space left on device")
        return real(content, file, *rest, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        StorageError, match=r"No space left on device\. It needs about .*; the previous last\.ckpt is intact"
    ):
        writer.save_shards(state(2), last)
    monkeypatch.undo()
    assert steps(tmp_path) == {"last.ckpt": 1}


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed",)


def test_nothing_in_a_folder_is_executed(alone, tmp_path):
    last = tmp_path / "last.ckpt"
    write_folder(state(1), last)
    (last / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UsageError, match=r"refused: it asks to run posix\.system"):
        read_folder(last, verified="no")
    # A class that may be named has others in its module.
    named = b"torch.distributed.checkpoint.metadata", b"os.system"
    words = b"".join(b"\x8c" + bytes([len(word)]) + word for word in named)
    (last / ".metadata").write_bytes(b"\x80\x04" + words + b"\x93.")
    with pytest.raises(UsageError, match=r"asks to run torch\.distributed\.checkpoint\.metadata\.os\.system"):
        read_folder(last, verified="no")


def test_a_folder_of_lightning_is_known_by_what_it_lacks(alone, tmp_path):
    last = tmp_path / "last.ckpt"
    write_folder(state(1), last)
    assert not is_of_lightning(last)
    torch.save({"epoch": 1}, last / "meta.pt")
    assert is_of_lightning(last)
    with pytest.raises(UsageError, match="folder of shards, which Lightning writes with strategies other than ours"):
        read_folder(last)
    remove(last)
    assert not last.exists()


def test_nodes_that_do_not_see_the_same_folder_are_told(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folders, "_checksum", lambda file: [7, 7])
    with pytest.raises(OSError, match="all nodes have to see the same output_dir"):
        write_folder(state(1), tmp_path / "last.ckpt")


WRITE = """
import os, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.tensor import Shard, distribute_tensor
from sslvision.runs.checkpoint import AtomicCheckpoints

dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
whole = {f"of {rows}": torch.arange(rows * 3, dtype=torch.float64).reshape(rows, 3) + rows for rows in (1, 3, 4, 7)}
state = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in whole.items()}
state["center"] = torch.arange(5.0)
moments = {0: {"exp_avg": state["of 7"] * 2, "step": torch.tensor(3.0)}}
checkpoint = {"global_step": 1, "state_dict": state, "optimizer_states": [{"state": moments, "param_groups": []}]}
writer = AtomicCheckpoints()
writer.save_shards(checkpoint, Path("last.ckpt"))
if dist.get_rank() == 2:
    state["of 7"].to_local()[0] = float("nan")
try:
    writer.save_shards({**checkpoint, "global_step": 2}, Path("last.ckpt"))
except Exception as error:
    print(error)
print("written")
"""
READ = """
import torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.tensor import Shard, distribute_tensor
from sslvision.system.checkpoint_folders import read_folder

dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))

def place(name, size, dtype):
    return distribute_tensor(torch.zeros(size, dtype=dtype), mesh, [Shard(0)]) if len(size) == 2 else None

content = read_folder(Path("last.ckpt"), place=place)
for name, value in content["state_dict"].items():
    if name != "center":
        rows = int(name.split()[1])
        assert value.full_tensor().equal(torch.arange(rows * 3, dtype=torch.float64).reshape(rows, 3) + rows), name
assert content["state_dict"]["center"].equal(torch.arange(5.0))
moment = content["optimizer_states"][0]["state"][0]["exp_avg"]
assert moment.full_tensor().equal(2 * content["state_dict"]["of 7"].full_tensor())
print("the same")
"""


@pytest.mark.thorough
def test_what_four_processes_have_written_is_read_by_one_two_and_three(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = start_processes(_run, (WRITE,), tmp_path / "write", 4)
    assert all("state_dict.of 7 is not finite at update 2" in one for one in said)  # known to one of them at first
    assert all("last.ckpt is from update 1" in one for one in said)
    assert sorted(file.name for file in (tmp_path / "last.ckpt").glob("*.distcp")) == [
        f"__{r}_0.distcp" for r in range(4)
    ]
    for processes in (2, 3):
        said = start_processes(_run, (READ,), tmp_path / f"read{processes}", processes)
        assert all("the same" in one for one in said)
    plain = read_folder(tmp_path / "last.ckpt")
    assert plain["state_dict"]["of 7"].equal(torch.arange(21, dtype=torch.float64).reshape(7, 3) + 7)
    assert list(plain["state_dict"]) == ["of 1", "of 3", "of 4", "of 7", "center"]
    assert plain["optimizer_states"][0]["state"][0]["step"] == 3
