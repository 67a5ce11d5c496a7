"""Two processes on a CPU, DDP and FSDP2: parameters after some steps are those of the original in the same two."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hf_gdn
from hf_gdn.upstream.modules import checkpointing_enable
from tests import tiny_models as tiny
from tests.ecosystem.common import TWO, assert_same_training, counting, parameters

STEPS = 2
KINDS = ["ddp", "fsdp2", "fsdp2_checkpointing"]
# Children that the original calls and hf_gdn reads.
READ_DIRECTLY = ("norm", "o_norm", "forget_gate")


def distributed(model, kind):
    """The model as its users wrap it."""
    if "checkpointing" in kind:
        checkpointing_enable(model, {"use_reentrant": False})
    if kind.startswith("ddp"):
        # Experts that no token of a process chose have no gradient there.
        return DistributedDataParallel(model, find_unused_parameters=True)
    mesh = init_device_mesh("cpu", (2,))
    if "children" in kind:
        for layer in tiny.mixers(model):
            for name in READ_DIRECTLY:
                if hasattr(layer, name):
                    fully_shard(getattr(layer, name), mesh=mesh)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(family, kind, rank):
    """Whole parameters after some steps of SGD, each process on rows of its own."""
    model = tiny.model(family).train()
    wrapped = distributed(model, kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        ids, _ = tiny.batch(rows=2, length=24, seed=2 * step + rank)
        optimizer.zero_grad()
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in parameters(model).items()}


def work(rank, folder):
    """One of two processes."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for family in TWO:
        for kind in KINDS:
            wanted = train(family, kind, rank)
            with hf_gdn.patched(strict=True), counting() as calls:
                got = train(family, kind, rank)
            results[family, kind] = dict(wanted=wanted, got=got, calls=len(calls))
        wanted = train(family, "fsdp2_children", rank)
        with hf_gdn.patched(strict=True):
            try:
                got = train(family, "fsdp2_children", rank)
            except RuntimeError as error:
                got = str(error)
        results[family, "fsdp2_children"] = dict(wanted=wanted, got=got)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TWO)
def test_two_processes(results, family, kind):
    one, other = (found[family, kind] for found in results)
    assert one["calls"] == other["calls"] == 3 * STEPS * (2 if "checkpointing" in kind else 1)
    for name, value in one["got"].items():  # both processes hold the same model
        assert torch.equal(value, other["got"][name]), name
    assert_same_training(kind, one["got"], one["wanted"], parameters(tiny.model(family)), STEPS)


@pytest.mark.parametrize("family", TWO)
def test_children_sharded_on_their_own(results, family):
    found = results[0][family, "fsdp2_children"]
    assert not isinstance(found["got"], str), found["got"]
    assert_same_training("children", found["got"], found["wanted"], parameters(tiny.model(family)), STEPS)


@pytest.mark.parametrize("family", TWO)
def test_ddp_and_fsdp2_agree(results, family):
    """Both add up the same two gradients."""
    found = results[0]
    start = parameters(tiny.model(family))
    assert_same_training("fsdp2", found[family, "fsdp2"]["got"], found[family, "ddp"]["got"], start, STEPS)
