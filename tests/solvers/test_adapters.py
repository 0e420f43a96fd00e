"""The adapter in docs/adapters.md gives the pictures of the pipeline that it is written for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
import torch
from conftest import relative

from doodl_fast.solvers.ddim import DDIM

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


@pytest.fixture(scope="module")
def pipe() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=1000,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    made = diffusers.DiTPipeline(tiny_families.awake(transformer), tiny_families.vae(4), scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def test_the_example_gives_the_pipelines_pictures(pipe: Any, tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 3
    names: dict[str, Any] = {"DDIM": DDIM, "pipe": pipe}
    for example in examples:
        exec(example, names)
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np"}
    expected = torch.from_numpy(pipe([1, 2], generator=generator, **options).images).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert relative((names["images"] / 2 + 0.5).clamp(0, 1), expected) < 1e-5
    pipe.save_pretrained(tmp_path)
    loaded = DDIM.from_pretrained(tmp_path, class_labels=[1, 2], num_inference_steps=4, family=names["DiT"]())
    with torch.no_grad():
        assert relative(loaded(loaded.noise(seed=0))[0], names["x0"]) < 1e-6
