"""The comparison of methods: what it counts, what a stopped run leaves, its optimizers, its tasks and its report."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import doodl_fast
from bench.paper import cli, report, runner, tasks
from bench.paper.counting import Counter, CountingDenoiser
from bench.paper.methods import METHODS, Batch
from bench.paper.rates import SampleAdam, SampleMomentum
from bench.paper.trace import Trace
from doodl_fast import shapes

TINY = ["--quick", "--prompts", "2", "--seeds", "1", "--tune-prompts", "1", "--budget", "30", "--drawn", "40"]
CHUNKS = ["--tasks", "text", "--methods", "none", "ddim", "--chunk", "2"]
BUDGET = 60


def rows_of(out: Path) -> dict[str, Any]:
    """The rows of all chunks by the names of their files."""
    return {str(path.relative_to(out)): json.loads(path.read_text())["rows"] for path in sorted(out.rglob("*-*.json"))}


def test_a_stopped_run_goes_on_with_equal_rows_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(out: Path, *more: str) -> int:
        return cli.main(["run", "--out", str(out), *TINY, *CHUNKS, *more])

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run(whole) == 0
    done = []
    write = runner.write_json

    def stops(path: Path, value: Any) -> None:
        if len(done) == 3:
            partial = path.parent / f".{path.name}.0123456789abcdef.tmp"
            partial.write_text("half a chu")
            os.utime(partial, (0, 0))
            raise KeyboardInterrupt
        done.append(path)
        write(path, value)

    monkeypatch.setattr(runner, "write_json", stops)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    monkeypatch.setattr(runner, "write_json", write)
    assert 0 < len(rows_of(stopped)) < len(rows_of(whole))
    assert run(stopped, "--limit", "0") == 1 and run(stopped) == 0
    assert rows_of(stopped) == rows_of(whole) and len(rows_of(whole)) == 3
    assert not list(stopped.rglob("*.tmp"))
    with pytest.raises(ValueError, match=r"another setting \(seeds differ\); pass another folder"):
        run(stopped, "--seeds", "2")
    assert cli.main(["report", str(whole), "--to", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / report.PAGE).read_text()
    stored = json.loads((tmp_path / "page" / report.DATA).read_text())
    assert (tmp_path / "page" / "paper-text.png").read_bytes().startswith(b"\x89PNG")
    own = stored["tasks"]["text"]["methods"]["ddim"]
    losses = [row["loss"][-1] for row in rows_of(whole)["text/ddim/test-000.json"]]
    assert own["rows"]["loss"] == pytest.approx(losses, 1e-3)
    assert f"| {METHODS['ddim'].title} | 20 + 10 | 1 |" in page, page
    assert "--budget 30 --drawn 40" in page and "Does DOODL beat one-step guidance" in page
    assert "were made on" not in page
    chunk = whole / "text" / "ddim" / "test-000.json"
    elsewhere = json.loads(chunk.read_text())
    elsewhere["machine"]["device"] = "another machine"
    chunk.write_text(json.dumps(elsewhere))
    page = report.write(whole, tmp_path / "page")
    assert "The pictures of this task were made on" in page and "and another machine (1 thread," in page


class Seen:
    """Counts what the UNet itself is called with, and the cotangents that arrive at what it returned."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.forward = self.backward = 0
        self.handle = unet.register_forward_hook(self.note)

    def note(self, _module: Any, _inputs: Any, output: Any) -> None:
        rows = len(output[0])
        self.forward += rows
        if output[0].requires_grad:
            output[0].register_hook(lambda _cotangent: setattr(self, "backward", self.backward + rows))


@pytest.mark.parametrize("method", METHODS)
def test_calls_are_those_that_the_network_sees_and_stay_within_the_budget(method: str) -> None:
    pipe, counter = shapes.load_pipeline(), Counter()
    cases = tasks.cases("text", "test", 1)
    own = doodl_fast.DDIM.from_pipeline(pipe, [cases[0].prompt], num_inference_steps=2).denoiser
    denoiser = CountingDenoiser(counter, own.unet, own.cond, own.uncond, 1.0, lean=False)
    batch = Batch(pipe, cases, [0], torch.tensor([0.1]), lambda images: images.mean((1, 2, 3)), counter, denoiser)
    trace = Trace(counter, 1, BUDGET, 2, torch.device("cpu"))
    seen = Seen(pipe.unet)
    METHODS[method].run(batch, trace)
    seen.handle.remove()
    assert (counter.forward, counter.backward) == (seen.forward, seen.backward)
    assert trace.forward + trace.backward == (10 if method == "none" else 20 if method == "cfg" else BUDGET)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SampleAdam, lambda p, rate: torch.optim.Adam(p, lr=rate)),
        (SampleMomentum, lambda p, rate: torch.optim.SGD(p, lr=rate, momentum=0.9)),
    ],
)
def test_optimizers_take_the_steps_of_torch_for_each_sample(ours: Any, theirs: Any) -> None:
    start, rates = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([0.1, 0.02])
    both = start.clone().requires_grad_()
    single = [start[i : i + 1].clone().requires_grad_() for i in range(2)]
    optimizers = [ours([both], rates), *(theirs([z], float(rate)) for z, rate in zip(single, rates, strict=True))]

    def loss(z: Tensor) -> Tensor:
        return (z**2).sin().sum() + z.exp().sum()

    for _ in range(5):
        for z, optimizer in zip((both, *single), optimizers, strict=True):
            z.grad = torch.autograd.grad(loss(z), z)[0]
            optimizer.step()
    torch.testing.assert_close(both, torch.cat(single), rtol=1e-7, atol=1e-9)


def test_splits_have_no_case_in_common_and_noise_does_not_depend_on_the_batch() -> None:
    for task in tasks.TASKS:
        test, tune = tasks.cases(task, "test", 40), tasks.cases(task, "tune", 20)
        assert not set(test) & set(tune) and len(set(test)) == 40
    assert torch.equal(tasks.noise(test[0], 3), tasks.noise(test[0], 3))
    assert not torch.equal(tasks.noise(test[0], 3), tasks.noise(test[0], 4))
    with pytest.raises(ValueError, match=r"--prompts: expected at most 40 for the task 'variety'"):
        tasks.cases("variety", "test", 41)


def test_the_rule_is_contrast_and_success_also_needs_the_prompt() -> None:
    def drawn(colour: str, background: float = 240.0) -> Any:
        thing = shapes.Object(colour, "disc", 32, 32, 12)
        return shapes.render(shapes.Scene(shapes.Prompt.parse("a red circle"), (thing,), (background,) * 3))

    case = tasks.Case("aesthetic", "a red circle")
    usual, strong = tasks.judged(drawn("red", 228.0), case), tasks.judged(drawn("red", 255.0), case)
    assert tasks.rule(drawn("black")) > tasks.rule(drawn("red")) > tasks.rule(drawn("yellow")) > 0
    assert tasks.rule(np.full((64, 64, 3), 240, np.uint8)) == 0
    assert usual == {"success": 0, "score": tasks.rule(drawn("red", 228.0)), "shows": 1}
    assert strong["success"] == strong["shows"] == 1 and strong["score"] > tasks.good(case) > usual["score"]
    assert tasks.judged(drawn("black", 255.0), case)["success"] == 0
