"""A run in a process of its own, which test_optimize.py kills and resumes. It prints the exact result."""

import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from test_optimize import noisy_loss, optimize  # noqa: E402

folder, flags = Path(sys.argv[1]), sys.argv[2:]


calls = 0


def loss(image: torch.Tensor) -> torch.Tensor:
    global calls
    calls += 1
    if "--slow" in flags:
        # the victim never finishes, however late it is killed
        time.sleep(0.02 if calls < 16 else 3600)
    return noisy_loss(image)


if "--resume" in flags:
    torch.manual_seed(5)
result = optimize(num_optimization_steps=12, loss=loss, folder=folder, resume="--resume" in flags)
print([value.hex() for value in [*result.losses, result.final_loss]])
print([float(value).hex() for value in result.latents[0].flatten()])
