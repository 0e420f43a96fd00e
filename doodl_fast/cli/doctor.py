"""`doodl-fast doctor`: which kernel backends this machine has, and why each missing one is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

from .. import __version__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "--model",
        help="a published model such as sdxl, or a diffusers folder: also say which of its layers have lean gradients",
    )


def run(args: argparse.Namespace | None = None) -> int:
    """Prints the report.

    Args:
        args: The parsed command line.

    Returns:
        The exit code, which is 0.
    """
    lines = report()
    if args is not None and args.model is not None:
        from .lean_layers import lean_layers

        lines += ["", *lean_layers(args.model)]
    print("\n".join(lines))
    return 0


def report() -> list[str]:
    """The report's lines."""
    import torch

    from .. import ops
    from ..ops.backends import native

    lines = ["versions", *(f"  {name:<12} {value}" for name, value in versions().items()), "", "backends"]
    devices = {"cpu": True, "cuda": torch.cuda.is_available()}
    for device_type, there in devices.items():
        lines.append(f"  {device_type}" + ("" if there else " (torch sees no CUDA device)"))
        for name in ops.NAMES:
            reason = ops.why_not(name, device_type) if there or name != "eager" else "no device"
            lines.append(f"    {name:<12} {'available' if reason is None else 'missing: ' + reason}")
        if there:
            lines.append(f"    in use       {_in_use(device_type)}")
    built = ", ".join(f"{kind}: {outcome}" for kind, outcome in native.build_report().items())
    lines += ["", "native build", f"  {built or 'no record: the package was not installed by its setup.py'}"]
    lines.append(f"  instruction set of the CPU kernels: {native.instruction_set() or 'none'}")
    return lines


def versions() -> dict[str, str]:
    """The versions and the device that the report of a problem should name."""
    import torch

    found = {"doodl-fast": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    found["cuda"] = torch.version.cuda or "none in this torch"
    found |= {package: _version(package) for package in ("triton", "diffusers", "transformers")}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    found["platform"] = f"{sys.platform} {platform.machine()}"
    return found


def _version(package: str) -> str:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _in_use(device_type: str) -> str:
    """The backend that serves a type of device, and how it was chosen."""
    from .. import ops
    from ..ops.backends import registry

    try:
        chosen = ops.choice()
        by = "automatic" if chosen == registry.AUTO else f"chosen explicitly: {chosen}"
        return f"{ops.resolve(device_type)} ({by})"
    except (ops.BackendUnavailable, ValueError) as error:
        return f"none: {error}"
