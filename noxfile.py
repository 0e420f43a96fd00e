"""The matrix of Python and torch that the project supports: `nox -l` lists the sessions, `make matrix` runs those here.

Each session has an environment of its own. It installs a torch, builds the package with it, and runs the tests. The
sessions of Python versions that are not installed are skipped; pyenv's are found. By default they take torch from
PyPI; for the smaller builds for the CPU name their index in PIP_EXTRA_INDEX_URL, as .github/workflows/test.yml does.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
OLDEST_TORCH, NEWEST_TORCH = "2.11", ""
"""The oldest torch that pyproject.toml admits, and whatever is newest."""
QUICK = ("tests/chain", "tests/ops", "tests/test_layout.py", "tests/test_readme.py", "tests/test_install.py")

# pyenv's commands run those of its versions alone that this variable names, or else a single one.
pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
found = [folder.name for version in PYTHONS for folder in sorted(pyenv.glob(f"{version}.*"))]
if found:
    own = [name for name in found if name == platform.python_version()]
    os.environ.setdefault("PYENV_VERSION", ":".join([*own, *(name for name in found if name not in own)]))

nox.options.sessions = ["syntax", "lint", "docs"]
nox.options.error_on_missing_interpreters = False


def install(session: nox.Session, torch: str, *extras: str) -> None:
    """Installs torch, and the package with its extras, built with this torch's headers."""
    session.install(f"torch=={torch}.*" if torch else "torch")
    session.install("setuptools>=77", "wheel")
    session.install("--no-build-isolation", f".[{','.join(extras)}]" if extras else ".")


@nox.session(python=PYTHONS, venv_backend="venv")
def syntax(session: nox.Session) -> None:
    """Compiles every file with this Python, which needs no package at all."""
    session.run(
        "python", "-W", "error", "-m", "compileall", "-q", "-f", "doodl_fast", "tests", "bench", "examples", "fuzz"
    )


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """What `make check` runs."""
    install(session, NEWEST_TORCH, "dev")
    for command in ("ruff check .", "ruff format --check .", "mypy", "lint-imports", "python .ci/check_sizes.py"):
        session.run(*command.split())


@nox.session(python=PYTHONS)
@nox.parametrize("torch", [OLDEST_TORCH, NEWEST_TORCH], ids=["oldest", "newest"])
def tests(session: nox.Session, torch: str) -> None:
    """The test suite. `nox -s tests -- tests/ops` runs a part of it."""
    install(session, torch, "dev")
    session.run("doodl-fast", "doctor")
    session.run("pytest", "-q", "-n", "auto", "--dist", "loadfile", *session.posargs)


@nox.session(python=PYTHONS)
@nox.parametrize("torch", [OLDEST_TORCH, NEWEST_TORCH], ids=["oldest", "newest"])
def quick(session: nox.Session, torch: str) -> None:
    """The engine, the operators and the installation: a few minutes."""
    install(session, torch, "dev")
    session.run("pytest", "-q", "-n", "auto", "--dist", "loadfile", *(session.posargs or QUICK))


@nox.session(python=PYTHONS)
@nox.parametrize("torch", [OLDEST_TORCH, NEWEST_TORCH], ids=["oldest", "newest"])
def wheel(session: nox.Session, torch: str) -> None:
    """README's example with the wheel in dist/, from `make wheel`: one wheel serves every Python and torch."""
    (file,) = (ROOT / "dist").glob("*.whl")
    session.install(f"torch=={torch}.*" if torch else "torch", str(file), "pytest", "hypothesis")
    session.chdir(session.create_tmp())  # away from the sources, which lie in the repository's folder
    code = "from doodl_fast import ops; assert ops.resolve('cpu') == 'native', ops.why_not('native', 'cpu')"
    session.run("python", "-c", code)
    session.run("doodl-fast", "doctor")
    session.run("pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_readme.py"))


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """What `make docs` runs."""
    said = session.run("python", ".ci/requirements.py", "docs", silent=True)
    session.install(*str(said).split("\n")[:-1])
    session.run("mkdocs", "build", env={"NO_MKDOCS_2_WARNING": "1"})
    session.run("python", ".ci/check_site.py", "site")


@nox.session(python="3.11")
def audit(session: nox.Session) -> None:
    """Looks for known vulnerabilities in what the package depends on."""
    session.install("pip-audit")
    session.run("pip-audit", "--strict", ".")
