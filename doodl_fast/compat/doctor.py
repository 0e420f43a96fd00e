"""The command `python -m doodl_fast.compat doctor FILE_OR_FOLDER`, which says what to change in existing code.

It reads Python files and the code cells of notebooks, and runs nothing of them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from .findings import Finding, of_edict

NETWORKS = ("unet", "model", "apply_model", "transformer", "denoiser")
RANDOM = {"randn", "randn_like", "rand", "rand_like", "randint", "bernoulli", "dropout", "normal_", "multinomial"}
SOLVERS = ("DPMSolver", "Euler", "Heun", "LMSDiscrete", "PNDM", "UniPC", "KDPM", "EDM", "LCM")
STEPPING = {"unet", "embedding_uc", "embedding_c", "scheduler", "num_timesteps", "guidance_scale", "clip_cond_fn"}
STEPPING |= {"self", "single_variable"}


MEMCNN = ("InvertibleModuleWrapper", "is_invertible_module")


def main(target: str) -> int:
    """Prints the findings of a file, or of all files in a folder.

    Args:
        target: The file or folder.

    Returns:
        The exit status: 0, or 2 if there is nothing to read.
    """
    root = Path(target)
    if not root.exists():
        print(f"FILE_OR_FOLDER: {target!r} does not exist")
        return 2
    paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix in (".py", ".ipynb"))
    # A copy of memcnn itself needs no change, because it is what is replaced.
    paths = [path for path in paths if "memcnn" not in path.relative_to(root).parts]
    changes = warnings = 0
    for path in paths:
        try:
            findings = examine(source_of(path))
        except (SyntaxError, ValueError, UnicodeDecodeError) as error:
            print(f"{path}: cannot be read as Python: {error}")
            continue
        for finding in findings:
            print(finding.text(path))
            changes, warnings = changes + bool(finding.gain), warnings + (not finding.gain)
    print(f"{len(paths)} files, {changes} changes, {warnings} warnings")
    if not changes:
        print("nothing of memcnn, DOODL or EDICT in it: docs/migration.md shows what is looked for")
    return 0 if paths else 2


def source_of(path: Path) -> str:
    """Returns the Python code of a file. Of a notebook these are all code cells, without lines for the shell."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(cell) for cell in cells).splitlines()
    return "\n".join("pass" if line.startswith(("!", "%")) else line for line in lines)


def examine(source: str) -> list[Finding]:
    """Returns all findings in Python code, in the order of the lines. Raises SyntaxError if it is not Python."""
    tree = ast.parse(source)
    found = [finding for node in ast.walk(tree) for finding in _of_node(node)]
    return sorted(set(found), key=lambda finding: (finding.line, finding.what))


def _of_node(node: ast.AST) -> Iterator[Finding]:
    """Yields the findings of one node of the syntax tree."""
    yield from of_edict(node)
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from _imports(node)
    elif isinstance(node, ast.ClassDef):
        yield from _class(node)
    elif isinstance(node, ast.FunctionDef):
        yield from _function(node)
    elif isinstance(node, ast.For):
        yield from _loop(node)
    elif isinstance(node, ast.Call):
        yield from _call(node)


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[Finding]:
    """Yields the findings of an import of memcnn, DOODL, or a scheduler of diffusers."""
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
    for module in modules:
        package, line = module.split(".")[0], ast.unparse(node)
        if "memcnn" in module.split("."):
            # Some projects have a copy of memcnn at a path of their own. What it re-exports is the same.
            yield _memcnn_import(node.lineno, line, names, module)
        elif "memcnn" in names:
            yield _memcnn_import(node.lineno, line, [], "memcnn")
        elif package == "doodl":
            advice = "before it: `from doodl_fast.compat import install; install()`"
            if names:
                advice += f"; or, instead: from doodl_fast.compat.doodl import {', '.join(names)}"
            yield Finding(node.lineno, line, advice, "the layers and memcnn become ours; the pictures stay the same")
        elif package == "diffusers":
            for name in names:
                if any(solver in name for solver in SOLVERS):
                    yield Finding(
                        node.lineno,
                        f"imports {name}",
                        "our layers and chains step by DDIM over its noise levels, not by its own rule; a layer that "
                        "calls its step() keeps to the wrapper",
                    )


def _memcnn_import(line: int, what: str, names: list[str], module: str) -> Finding:
    """Returns the finding of an import of memcnn."""
    inner = module.split(".")[-1] != "memcnn" and not names
    foreign = [name for name in names if name not in MEMCNN] or ([module] if inner else [])
    if foreign:
        advice = f"doodl_fast.compat.memcnn has {' and '.join(MEMCNN)}, not {', '.join(foreign)}: keep memcnn for that"
        return Finding(line, what, advice)
    return Finding(
        line,
        what,
        f"from doodl_fast.compat.memcnn import {', '.join(names)}" if names else "from doodl_fast.compat import memcnn",
        "no gradients of network weights; keep_input=False is right for even step counts and frees none of your "
        "tensors; torch.autograd.grad works",
    )


def _class(node: ast.ClassDef) -> Iterator[Finding]:
    """Yields the findings of a class that has `forward` and `inverse`: a stepping layer or a mixing layer."""
    methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    if not {"forward", "inverse"} <= set(methods) or any("SteppingLayer" in ast.unparse(b) for b in node.bases):
        return
    calls = [call for call in _calls(methods.values()) if _name(call) in NETWORKS]
    if not calls:
        if "mix" in node.name.lower() or re.search(r"\bself\.p\b", ast.unparse(methods["forward"])):
            yield Finding(
                node.lineno,
                f"class {node.name}, a mixing layer",
                "from doodl_fast.compat.doodl import MixingLayer",
                "one pass over memory, and nothing kept or evaluated again for its gradient",
            )
        return
    lines = ", ".join(str(call.lineno) for call in calls)
    init = {a.arg for a in _arguments(methods["__init__"])} if "__init__" in methods else set()
    forward = [a.arg for a in _arguments(methods["forward"])]
    same = init <= STEPPING and bool(init) and set(forward) <= {"self", "i", "t", "latent_pair", "reverse"}
    advice = "from doodl_fast.compat.doodl import SteppingLayer"
    if not same:
        advice += f"; class {node.name}(SteppingLayer) with predict_noise for the network calls of line {lines}"
    gain = "one evaluation with a graph a coupling in the backward pass, none at the last, empty step; frozen weights"
    if len(calls) > 1:
        gain += "; guidance in one batched call (yours to batch where you override predict_noise)"
    yield Finding(node.lineno, f"class {node.name}, a stepping layer with {len(calls)} network calls", advice, gain)
    yield from _unsteady(node.name, methods["forward"])


def _unsteady(name: str, forward: ast.FunctionDef) -> Iterator[Finding]:
    """Yields what can make a second evaluation differ from the first: random numbers, and attributes that are set."""
    for call in _calls([forward]):
        if _name(call) in RANDOM:
            yield Finding(
                call.lineno,
                f"{name}.forward calls {ast.unparse(call.func)}",
                "the backward pass evaluates it again and must find the same value: pass preserve_rng_state=True to "
                "the wrapper, or draw outside; such a layer cannot become a SteppingLayer",
            )
    for item in ast.walk(forward):
        if isinstance(item, (ast.Assign, ast.AugAssign)):
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            for target in targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    yield Finding(
                        item.lineno,
                        f"{name}.forward sets {ast.unparse(target)}",
                        "the backward pass evaluates it again, with what the last call left there; give it as an input",
                    )


def _function(node: ast.FunctionDef) -> Iterator[Finding]:
    """Yields the finding of a copy of the reference's `gen`."""
    names = {argument.arg for argument in _arguments(node)}
    if {"model_guidance_type", "sd_guidance_scale", "num_traversal_steps"} <= names:
        yield Finding(
            node.lineno,
            f"def {node.name}, the reference's gen()",
            "from doodl_fast.compat.doodl import gen, and give it pipeline=; or doodl_fast.optimize for your own loop",
            "no copy to maintain; one image's decoder graph at a time; it returns its result",
        )


def _loop(node: ast.For) -> Iterator[Finding]:
    """Yields the finding of a loop over timesteps that calls a layer."""
    if "timesteps" not in ast.unparse(node.iter):
        return
    stepping = [
        item.value
        for item in ast.walk(node)
        if isinstance(item, ast.Assign)
        and isinstance(item.value, ast.Call)
        and len(item.value.args) >= 2
        and any(word in ast.unparse(item.targets[0]) for word in ("latent", "pair"))
        and not re.match(r"torch\.|.*scheduler", ast.unparse(item.value.func))
    ]
    if not stepping:
        return
    call = "chain.inverse(x, y)" if any(_name(step) == "inverse" for step in stepping) else "chain(x, y)"
    yield Finding(
        node.lineno,
        f"a loop over timesteps with {ast.unparse(stepping[0])}",
        f"can stay; or, whole: x, y = doodl_fast.EDICT(Denoiser(unet, cond, uncond), schedule) and {call}",
        "no synchronisation a step, float64 latents between steps, memory= of your choice, checked for NaN and drift",
    )


def _call(node: ast.Call) -> Iterator[Finding]:
    """Yields the finding of a call of the wrapper, of an optimizer over weights, or of `set_grad_enabled(False)`."""
    name = _name(node)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name == "InvertibleModuleWrapper":
        keep = options.get("keep_input", "False")
        if keep == "False":
            yield Finding(
                node.lineno,
                "InvertibleModuleWrapper with keep_input=False",
                "nothing, once memcnn is ours",
                "memcnn's gradient through layers that alternate by their index is wrong for every even number of "
                "steps (the reference's by 18% at 10, 3% at 50), ours is right",
            )
        else:
            yield Finding(
                node.lineno,
                f"InvertibleModuleWrapper with keep_input={keep}",
                "nothing, once memcnn is ours",
                "the graph of the backward pass holds no activations for weight gradients, and computes none",
            )
    elif name in ("Adam", "AdamW", "SGD") and any("parameters()" in ast.unparse(argument) for argument in node.args):
        yield Finding(
            node.lineno,
            f"{name} on a module's parameters",
            "compat computes no gradients of weights; if these are inside a wrapped layer, pass weight_grads=True to "
            "its wrapper, which then gains nothing over memcnn but correctness",
        )
    elif name == "set_grad_enabled" and ast.unparse(node) == "torch.set_grad_enabled(False)":
        yield Finding(
            node.lineno,
            "torch.set_grad_enabled(False)",
            "importing compat.doodl does not switch gradients off, as importing the reference's doodl does; keep this "
            "line if the code relies on it",
        )


def _calls(nodes: object) -> Iterator[ast.Call]:
    """Yields all calls within nodes of the syntax tree."""
    for node in nodes:  # type: ignore[attr-defined]
        for item in ast.walk(node):
            if isinstance(item, ast.Call):
                yield item


def _name(call: ast.Call) -> str:
    """Returns the name of what is called, without the object that it is an attribute of."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _arguments(function: ast.FunctionDef) -> list[ast.arg]:
    """Returns all named arguments of a function."""
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
