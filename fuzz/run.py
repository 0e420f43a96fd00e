"""Fuzzes a reader for some time. A fault ends the run, and leaves its input in the folder fuzz/found.

    python fuzz/run.py picture --seconds 60

With atheris (pip install atheris) coverage guides the fuzzer; without it sound files are changed at random.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import random
import sys
import time
from pathlib import Path

import mutate
from targets import TARGETS

FOUND = Path(__file__).parent / "found"


def check(name: str, data: bytes) -> bool:
    """Reads an input, and keeps it if that ends in a fault. Returns whether it was accepted."""
    try:
        return TARGETS[name].run(data)
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt):
            FOUND.mkdir(exist_ok=True)
            path = FOUND / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
            path.write_bytes(data)
            print(f"{type(error).__name__}: {error}\nthe input is in {path}", file=sys.stderr)
        raise


def by_chance(name: str, seconds: float, seed: int) -> tuple[int, int]:
    """Reads changed files. Returns how many were read, and how many of them were accepted."""
    target, rng = TARGETS[name], random.Random(seed)
    pool = target.seeds()
    count = accepted = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutate.mutated(rng.choice(pool), rng, rng.choice(pool))
        data = target.with_valid_header(data) if rng.random() < 0.5 else data
        count, accepted = count + 1, accepted + check(name, data)
    return count, accepted


def by_coverage(name: str, seconds: float, seed: int) -> None:
    """Runs libFuzzer by atheris, which ends the process itself."""
    import atheris

    corpus = FOUND.parent / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for data in TARGETS[name].seeds():
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def one_input(data: bytes) -> None:
        check(name, data)
        check(name, TARGETS[name].with_valid_header(data))

    for function in _readers():
        atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], f"-max_total_time={seconds:.0f}", f"-seed={seed + 1}", str(corpus)], one_input)
    atheris.Fuzz()


def _readers() -> list[object]:
    """The functions whose branches guide the fuzzer."""
    from doodl_fast.chain.exact import state_file
    from doodl_fast.diffusion import images
    from doodl_fast.optimization import checkpoint

    modules = (state_file, images, checkpoint)
    return [f for m in modules for f in vars(m).values() if inspect.isfunction(f) and f.__module__ == m.__name__]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--by-chance", action="store_true", help="do without atheris")
    args = parser.parse_args()
    if importlib.util.find_spec("atheris") and not args.by_chance:
        by_coverage(args.target, args.seconds, args.seed)
    else:
        count, accepted = by_chance(args.target, args.seconds, args.seed)
        print(f"{args.target}: {count} files were read, {accepted} of them accepted, no fault")


if __name__ == "__main__":
    main()
