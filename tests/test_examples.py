"""The scripts in examples/ run with few steps, and do what they say."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from gaussian_mixture import exact_solution, ideal_output, scaled_linear_alphas
from PIL import Image

import doodl_fast
from doodl_fast import shapes

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> ModuleType:
    """Imports a script, which is in no package."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_doodl_starts_from_the_pipelines_own_picture(tmp_path):
    few = ["--steps", "4", "--optimization-steps", "3", "--seed", "1", "--grad-scale", "100", "--out", str(tmp_path)]
    result = example("doodl").main(few)
    assert result.losses[2] < result.losses[0]
    prompt = "a green circle above a purple circle"
    noise = doodl_fast.DDIM.from_pipeline(shapes.load_pipeline(), prompt).noise(seed=1)
    expected = shapes.load_pipeline()(prompt, num_inference_steps=4, latents=noise).images[0].convert("RGB")
    with Image.open(tmp_path / "before.png") as before:
        assert np.abs(np.asarray(before).astype(int) - np.asarray(expected)).max() <= 1


def test_doodl_refuses_a_model_without_a_clip_model(capsys):
    with pytest.raises(SystemExit):
        example("doodl").main(["--model", "somewhere"])
    assert "--model and --clip belong together" in capsys.readouterr().err


def test_editing_comes_back_bit_for_bit(tmp_path):
    found = example("editing").main(["--steps", "10", "--out", str(tmp_path)])
    assert found["same bits"]
    with Image.open(tmp_path / "picture.png") as before, Image.open(tmp_path / "edited.png") as after:
        assert np.abs(np.asarray(before).astype(int) - np.asarray(after)).max() > 50  # another prompt, another picture


def test_image_conditioning_comes_nearer_to_the_picture(tmp_path):
    few = ["--steps", "4", "--optimization-steps", "4", "--out", str(tmp_path)]
    result = example("image_conditioned").main(few)
    assert result.best_loss < result.losses[0] and result.best_step > 0
    with Image.open(tmp_path / "reference.png") as reference:
        verdict = shapes.judge(reference, "a red star", variety="6-pointed star")
    assert not verdict.faults


def test_plans_tell_the_peak_and_save_calls(tmp_path):
    rows = example("memory_plan").main(["--steps", "6", "--out", str(tmp_path)])
    least, _, whole = rows
    assert whole.calls == 6 < least.calls
    for row in rows:
        assert row.peak < row.budget * 1.15
        assert abs(row.peak / row.predicted - 1) < 0.15
        assert torch.equal(row.gradient, whole.gradient)
    assert (tmp_path / f"{least.budget >> 20}MiB" / "profile.json").is_file()


def test_own_solver_is_of_second_order():
    """On a mixture of Gaussians, whose network and whose solution are known in closed form."""
    alphas, first, last = scaled_linear_alphas(), 950, 50
    start = torch.linspace(-2.2, 2.2, 9, dtype=torch.float64)[None]
    levels = [(math.sqrt(alphas[t]), math.sqrt(1 - alphas[t])) for t in (first, last)]
    truth = exact_solution(start, *levels)

    def network(x, t, cond):
        return ideal_output(x, math.sqrt(alphas[int(t)]), math.sqrt(1 - alphas[int(t)]), "epsilon")

    errors, counts = [], (60, 90, 180)
    for steps in counts:
        places = tuple(range(first, last - 1, -(first - last) // steps))
        passed = tuple(alphas[t] for t in places)
        schedule = doodl_fast.Schedule(places[:-1], passed[:-1], passed[1:], "epsilon")
        chain = example("own_solver").AdamsBashforth(doodl_fast.Denoiser(network, None), schedule)
        errors.append(float((chain(start)[0] - truth).abs().max()))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert 1.7 < slope < 2.5, errors


def test_the_gradient_of_the_own_solver():
    assert example("own_solver").main(["--steps", "4", "--fine-steps", "5"])["gradient"] < 1e-5


def test_noise_of_every_step_reaches_more_than_the_start_alone(tmp_path):
    few = ["--steps", "4", "--optimization-steps", "4", "--out", str(tmp_path)]
    rewards = example("noise_of_every_step").main(few)
    assert rewards["start"][0] == rewards["every step"][0]
    assert rewards["every step"][-1] > rewards["start"][-1] > rewards["start"][0]


def test_all_noise_of_few_steps_reaches_more_than_the_start_alone(tmp_path):
    few = ["--pictures", "1", "--optimization-steps", "3", "--learning-rate", "0.01", "--out", str(tmp_path)]
    found = example("noise_of_few_steps").main(few)
    assert found["all noise"][0] < found["start alone"][0] < found["nothing"][0]


def test_a_lora_learns_from_a_reward_and_goes_on_where_it_was(tmp_path):
    few = ["--steps", "2", "--batch", "2", "--held-out", "2", "--save-every", "1", "--last", "2", "--random-last"]
    whole = example("lora_from_reward").main([*few, "--training-steps", "3", "--out", str(tmp_path / "whole")])
    assert any(weight.detach().abs().amax() > 0 for name, weight in whole["lora"].items() if name.endswith("up"))
    example("lora_from_reward").main([*few, "--training-steps", "2", "--out", str(tmp_path / "parts")])
    parts = example("lora_from_reward").main([*few, "--training-steps", "3", "--out", str(tmp_path / "parts")])
    assert len(parts["rewards"]) == 1 and parts["rewards"][0] == pytest.approx(whole["rewards"][2], rel=1e-4)
    for name, weight in whole["lora"].items():
        assert torch.allclose(parts["lora"][name], weight, atol=1e-5), name


def test_a_lora_makes_more_pictures_of_held_out_captions_right(tmp_path):
    makefile = (EXAMPLES.parent / "Makefile").read_text()
    small = re.search(r"^SMALL_lora_from_reward := (.+)$", makefile, re.MULTILINE)  # What `make examples` runs.
    assert small is not None
    few = small[1].split()
    found = example("lora_from_reward").main([*few, "--out", str(tmp_path)])
    assert len(found["before"]) == 40 and 8 <= found["before"].sum() <= 24
    assert found["after"].sum() > found["before"].sum()


def test_regularisers_keep_the_length_that_a_reward_alone_changes(tmp_path):
    few = ["--prompts", "2", "--seeds", "1", "--steps", "2", "--optimization-steps", "3", "--rows", "0", "1"]
    found = example("reward_hacking").main([*few, "--learning-rate", "0.3", "--out", str(tmp_path)])
    before, alone, kept = found.values()
    assert alone["score"] > before["score"]
    assert 1 < kept["length"] < alone["length"] - 0.02
    assert all(0 <= row["prompt"] <= row["either"] <= 1 for row in found.values())


def test_a_word_is_learnt_by_a_gradient_through_the_chain(tmp_path):
    module = example("textual_inversion")
    few = ["--steps", "2", "--training-steps", "2", "--batch", "2", "--held-out", "4", "--out", str(tmp_path)]
    found = module.main(few)
    assert float((found["last"] - found["first"]).norm()) > 1e-3 and len(found["losses"]) == 2
    assert (tmp_path / "after_green.png").is_file()

    pipe = shapes.load_pipeline()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.double()
    words = module.Words(pipe, "star")
    table = words.table.clone()

    def value(vector):
        embeds = {
            "prompt_embeds": words(["a red star"], vector[None]),
            "negative_prompt_embeds": words([""], words.first[None]),
        }
        chain = doodl_fast.DDIM.from_pipeline(pipe, num_inference_steps=2, guidance_scale=4.0, **embeds)
        return chain(chain.noise(seed=0).double())[0].sin().sum()

    leaf = words.first.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    direction = torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slope = float(value(leaf + 1e-6 * direction) - value(leaf - 1e-6 * direction)) / 2e-6
    assert abs(slope) > 1e-2 and float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5)
    assert torch.equal(words.table, table)


def test_a_word_that_is_lost_is_not_kept(tmp_path, capsys):
    few = ["--steps", "4", "--training-steps", "1", "--batch", "2", "--held-out", "12", "--learning-rate", "3"]
    found = example("textual_inversion").main([*few, "--out", str(tmp_path)])
    assert float((found["last"] - found["first"]).norm()) > 1
    assert found["validated"][0] == found["validated"][1] > 0
    assert torch.equal(found["vector"], found["first"]) and (found["before"] == found["after"]).all()
    assert "the word of step 0 is kept" in capsys.readouterr().out


def test_each_picture_has_a_word_of_its_own():
    """Prompts with a vector each have the conditions of prompts whose table was changed, and one gradient each."""
    words = example("textual_inversion").Words(shapes.load_pipeline(), "star")
    vectors = torch.stack([words.first, 2 * words.first]).requires_grad_()
    conditions = words(["a red star", "a blue star"], vectors)
    for place, prompt in enumerate(("a red star", "a blue star")):
        with torch.no_grad():
            ids = words.pipe.tokenizer(
                prompt, return_tensors="pt", padding="max_length", max_length=words.pipe.tokenizer.model_max_length
            ).input_ids
            changed = shapes.load_pipeline().text_encoder
            changed.get_input_embeddings().weight[words.token] = vectors[place]
            expected = changed(ids)[0]
        assert torch.allclose(conditions[place], expected[0], atol=1e-5)
    (gradient,) = torch.autograd.grad(conditions[0].sin().sum(), vectors)
    assert gradient[0].norm() > 0 and not gradient[1].any()


def test_the_word_is_judged_by_a_picture_of_each_colour_at_least(capsys):
    with pytest.raises(SystemExit):
        example("textual_inversion").main(["--held-out", "3"])
    assert "--held-out: expected at least 4" in capsys.readouterr().err
