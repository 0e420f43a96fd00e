"""`Finding`, one thing that the doctor has found in existing code, and what it says of code around EDICT."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SAMPLING = ("coupled_stablediffusion", "EDICT_editing", "recon_test")
"""The functions of EDICT's module that `compat.edict` has."""
STEPS = {"denoise_step", "noise_step", "denoise_mixing_layer", "noise_mixing_layer"}
"""The methods of the class `EDICTScheduler`, which is in many copies of EDICT's code."""


@dataclass(frozen=True)
class Finding:
    """One thing found in a file.

    Attributes:
        line: The number of the line.
        what: What is there.
        advice: What to do about it.
        gain: What that brings; "" for a warning.
    """

    line: int
    what: str
    advice: str
    gain: str = ""

    def text(self, path: Path) -> str:
        """Returns the lines that are printed for a finding in the file `path`."""
        last = f"\n    gain:   {self.gain}" if self.gain else ""
        kind = "change" if self.gain else "beware"
        return f"{path}:{self.line}: {self.what}\n    {kind}: {self.advice}{last}"


def of_edict(node: ast.AST) -> Iterator[Finding]:
    """Yields what there is of EDICT's public code, of copies of it, or of diffusers' community pipeline."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[-1] == "edict_functions":
        names = [alias.name for alias in node.names if alias.name in SAMPLING]
        if names:
            yield _sampling(node.lineno, ast.unparse(node), names)
    elif isinstance(node, ast.FunctionDef) and node.name in SAMPLING:
        yield _sampling(node.lineno, f"def {node.name}, a function of EDICT's module", [node.name])
    elif isinstance(node, ast.ClassDef):
        methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        if methods >= STEPS and "__call__" not in methods:
            yield Finding(
                node.lineno,
                f"class {node.name}, the steps and mixings of EDICT",
                "from doodl_fast.compat.edict_scheduler import EDICTScheduler; its schedule() makes a doodl_fast.EDICT",
                "fused steps that are differentiable; with the chain, one batched network call for each step of a "
                "latent, float64 between steps, gradients at the memory of one call",
            )
        elif node.name == "EDICTPipeline":
            yield _pipeline(node.lineno, f"class {node.name}")
    elif isinstance(node, ast.Call):
        for keyword in node.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg == "custom_pipeline" and "edict" in str(value).lower():
                yield _pipeline(node.lineno, f"custom_pipeline={value!r}")


def _sampling(line: int, what: str, names: list[str]) -> Finding:
    """Returns the finding of EDICT's sampling function or of what calls it."""
    return Finding(
        line,
        what,
        f"from doodl_fast.compat.edict import {', '.join(names)}, and give it pipeline=; Prompt-to-Prompt is refused",
        "guidance in one batched call, no network call at the last, empty step, networks of any dtype with float64 "
        "latents, any device; nothing is loaded by the import",
    )


def _pipeline(line: int, what: str) -> Finding:
    """Returns the finding of the community pipeline."""
    return Finding(
        line,
        what,
        "from doodl_fast.compat.edict_pipeline import EDICTPipeline, which has the same arguments and from_pretrained",
        "float64 between steps; an inversion that is right for odd numbers of steps too; pipe.chain(...) has gradients",
    )
