"""accelerate's wrapper around a module whose forward runs the whole chain, with gradient accumulation and autocast."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import TinyNet, conditions, latents, relative, sd_scheduler
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from doodl_fast import EDICT, Denoiser, Schedule

pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")


class Sampler(nn.Module):
    """The whole chain as a module, whose parameters are those of its network."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.network = TinyNet().to(dtype)
        denoiser = Denoiser(self.network, *conditions(dtype=dtype), 3.0, trainable=True)
        self.chain = EDICT(denoiser, Schedule.from_scheduler(sd_scheduler(), 3), memory="reversible")

    def forward(self, noise: Tensor) -> Tensor:
        return self.chain(noise)[0]


def train(rank: int, folder: str, mixed: str) -> None:
    """A step of gradient descent with rate 1, of the mean of two passes in each of two processes."""
    torch.set_num_threads(1)
    place = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    os.environ.update(place, ACCELERATE_USE_CPU="true")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed)
    dtype = torch.float64 if mixed == "no" else torch.float32
    model = Sampler(dtype)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    assert isinstance(prepared, nn.parallel.DistributedDataParallel)
    for rows in (slice(0, 2), slice(2, 4)):
        with accelerator.accumulate(prepared):
            noise = latents(4, 3, 4, 4)[0][rows][rank : rank + 1].to(dtype)
            accelerator.backward(loss(prepared(noise)))
            optimizer.step()
            optimizer.zero_grad()
    torch.save([weight.detach() for weight in model.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def loss(pictures: Tensor) -> Tensor:
    return pictures.square().sum()


@pytest.mark.parametrize(("mixed", "error"), [("no", 1e-10), ("bf16", 0.05)])
def test_accumulated_gradients_are_the_mean_of_all_processes(mixed: str, error: float, tmp_path: Path) -> None:
    start_processes(train, (str(tmp_path), mixed), nprocs=2, start_method="spawn")
    alone: Any = Sampler()
    (loss(alone(latents(4, 3, 4, 4)[0])) / 4).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for got, weight in zip(found, alone.parameters(), strict=True):
            assert float(weight.grad.norm()) > 1e-3
            assert relative(weight.detach() - got.double(), weight.grad) < error
