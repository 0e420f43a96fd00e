"""DistributedDataParallel around a module whose forward runs the whole chain averages the gradients of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import TinyNet, conditions, latents, relative, sd_scheduler
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from doodl_fast import EDICT, Denoiser, Schedule

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")


class Sampler(nn.Module):
    """The whole chain as a module, whose parameters are those of its network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TinyNet().double()
        denoiser = Denoiser(self.network, *conditions(), 3.0, trainable=True)
        self.chain = EDICT(denoiser, Schedule.from_scheduler(sd_scheduler(), 3), memory="reversible")

    def forward(self, noise: Tensor) -> Tensor:
        return self.chain(noise)[0]


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    parallel = DistributedDataParallel(Sampler())
    for rows in (slice(0, 2), slice(2, 4)):  # Two passes, whose gradients are summed.
        noise = latents(4, 3, 4, 4)[0][rows]
        parallel(noise[rank : rank + 1]).square().sum().backward()
    torch.save([weight.grad for weight in parallel.module.network.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_mean_gradient(tmp_path: Path) -> None:
    start_processes(train, (str(tmp_path),), nprocs=2, start_method="spawn")
    alone = Sampler()
    (alone(latents(4, 3, 4, 4)[0]).square().sum() / 2).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for got, weight in zip(found, alone.network.parameters(), strict=True):
            assert relative(got, weight.grad) < 1e-10


def test_a_wrapped_network_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"wrapped in DistributedDataParallel.*forward runs the whole chain"):
            Denoiser(DistributedDataParallel(TinyNet()), *conditions(), trainable=True)
    finally:
        dist.destroy_process_group()
