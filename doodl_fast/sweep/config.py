"""What is swept: a TOML, JSON or YAML file, and the runs that it stands for."""

from __future__ import annotations

import copy
import itertools
import json
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plan import Plan, Run, check_distinct

KEYS = ("prompts", "seeds", "options", "guides", "settings", "methods", "measures")
BEST_OF = re.compile(r"best-of-(\d+)")
KIND = "kind"
LARGEST_SEED, MOST_RUNS = 2**63 - 1, 10**6
Options = dict[str, Any]


def read_config(path: Path) -> dict[str, Any]:
    """Reads a configuration by its suffix: .toml, .json, .yaml or .yml.

    Raises:
        ValueError: The suffix is another one, the library that reads it is missing, or the file cannot be read as that.
        OSError: There is no such file.
    """
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json", ".yaml", ".yml"):
        raise ValueError(f"CONFIG: expected a file that ends in .toml, .json, .yaml or .yml, got {str(path)!r}")
    text = path.read_bytes()
    try:
        if suffix == ".toml":
            content = _toml(text.decode())
        elif suffix == ".json":
            content = json.loads(text)
        else:
            content = _yaml(text.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"CONFIG: {str(path)!r} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"CONFIG: expected a table of {', '.join(KEYS)}, got a {type(content).__name__}")
    return content


def _toml(text: str) -> Any:
    """Reads TOML with the standard library, or before Python 3.11 with the package that it comes from."""
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib  # type: ignore[no-redef]
        except ImportError as error:
            raise ValueError("TOML needs Python 3.11 or `pip install tomli`; JSON needs neither") from error
    return tomllib.loads(text)


def _yaml(text: str) -> Any:
    """Reads YAML with PyYAML, which is no requirement of this package."""
    try:
        import yaml
    except ImportError as error:
        raise ValueError("YAML needs `pip install pyyaml`; TOML and JSON do not") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def assign(config: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """The configuration with values that a command line gives.

    Args:
        config: The configuration; it is not changed.
        assignments: Texts like "options.steps=12" and 'seeds=[0, 1]'. A value is read as JSON, or else taken as a text.

    Raises:
        ValueError: One has no equals sign, or leads through something that is no table.
    """
    changed = copy.deepcopy(config)
    for text in assignments:
        path, equals, value = text.partition("=")
        *tables, name = path.split(".")
        if not equals or not all([*tables, name]):
            raise ValueError(f"--set: expected KEY=VALUE, as in options.steps=12, got {text!r}")
        place = changed
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set: expected a table at {table!r} of {path!r}, got {place!r}")
        try:
            place[name] = json.loads(value)
        except ValueError:
            place[name] = value
    return changed


def expand(config: Mapping[str, Any], folder: Path = Path()) -> Plan:
    """The runs that a configuration stands for: every prompt with every guide, setting, method and seed.

    Args:
        config: As `read_config` returns it.
        folder: Files that it names are looked for from here.

    Returns:
        The plan. Prompts vary slowest and seeds fastest.

    Raises:
        ValueError: A part is missing, unknown or of another form, or a run would be there twice.
    """
    unknown = [key for key in config if key not in KEYS]
    if unknown:
        raise ValueError(
            f"CONFIG: expected {', '.join(KEYS)}, got {unknown[0]!r}; options of `doodl-fast run` belong under options"
        )
    common = _table("options", config.get("options", {}))
    prompts = _prompts(config.get("prompts"), folder)
    guides = _named("guides", config.get("guides"), _guide, _default_guide(common))
    settings = _named("settings", config.get("settings"), None, {"": {}})
    methods = _named("methods", config.get("methods"), _method, {"optimize": {}})
    seeds = _seeds(config.get("seeds", [0]))
    measures = _texts("measures", config.get("measures", []))
    count = len(prompts) * len(guides) * len(settings) * len(methods) * len(seeds)
    if count > MOST_RUNS:
        raise ValueError(f"CONFIG: expected at most {MOST_RUNS} runs, got {count}")
    runs = []
    for (prompt, own), (guide, g), (setting, s), (method, m) in itertools.product(
        prompts, guides.items(), settings.items(), methods.items()
    ):
        parts = {f"prompt {prompt!r}": own, f"guides.{guide}": g, f"settings.{setting}": s, f"methods.{method}": m}
        options = {**common, **_joined(parts)}
        runs += [Run(prompt, seed, guide, method, setting, options) for seed in seeds]
    check_distinct(runs)
    return Plan(tuple(runs), tuple(measures))


def _joined(parts: Mapping[str, Options]) -> Options:
    """The options of all parts. Raises ValueError if two parts have the same one, as it is unclear which one counts."""
    found: Options = {}
    places: dict[str, str] = {}
    for place, options in parts.items():
        for name, value in options.items():
            if name in found:
                raise ValueError(f"CONFIG: expected {name!r} in one place, got it in {places[name]} and in {place}")
            found[name], places[name] = value, place
    return found


def _prompts(value: Any, folder: Path) -> list[tuple[str, Options]]:
    """The prompts with options of their own."""
    if isinstance(value, Mapping) and "file" in value:
        if len(value) > 1:
            raise ValueError(f"prompts: expected file alone, got {sorted(value)}")
        lines = (folder / str(value["file"])).read_text(encoding="utf-8").splitlines()
        value = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    elif isinstance(value, Mapping):
        value = _products(value)
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"prompts: expected a list of texts, a table with file, or one with template and its words, got {value!r}"
        )
    found = []
    for entry in value:
        own = _table("prompts", entry) if isinstance(entry, Mapping) else {"prompt": entry}
        prompt = own.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompts: expected texts, or tables with a text prompt, got {entry!r}")
        found.append((prompt, {name: option for name, option in own.items() if name != "prompt"}))
    return found


def _products(value: Mapping[str, Any]) -> list[str]:
    """Every combination of the words of a template, of which the first list varies slowest."""
    template = value.get("template")
    if not isinstance(template, str):
        raise ValueError(f"prompts: expected a text template, as in 'a {{colour}} {{shape}}', got {template!r}")
    try:
        fields = list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name is not None))
    except ValueError as error:
        raise ValueError(f"prompts: the template {template!r} cannot be read ({error})") from error
    words = {name: _texts(f"prompts.{name}", value[name]) for name in value if name != "template"}
    if set(fields) != set(words):
        raise ValueError(
            f"prompts: expected lists of words for {fields}, which the template has, got lists for {list(words)}"
        )
    return [
        template.format(**dict(zip(fields, chosen, strict=True)))
        for chosen in itertools.product(*(words[name] for name in fields))
    ]


def _named(name: str, value: Any, make: Any, default: dict[str, Options]) -> dict[str, Options]:
    """A table of tables of options by name; or a list of short forms, where there are some."""
    if value is None:
        return default
    if isinstance(value, list) and make is not None and value:
        texts = _texts(name, value)
        if len(set(texts)) < len(texts):
            raise ValueError(f"{name}: expected each once, got {texts}")
        return {text: make(text) for text in texts}
    if not isinstance(value, Mapping) or not value:
        short = "a list of names, or " if make is not None else ""
        raise ValueError(f"{name}: expected {short}a table of tables with options, got {value!r}")
    return {key: _table(f"{name}.{key}", options) for key, options in value.items()}


def _default_guide(common: Options) -> dict[str, Options]:
    """The guide of a sweep that names none: what the common options say."""
    given = common.get("guidance") or common.get("loss") or []
    return {"+".join([given] if isinstance(given, str) else map(str, given)): {}}


def _guide(text: str) -> Options:
    """The options of a guide that is given by its name alone, with a weight perhaps."""
    return {"guidance": text.split("+")}


def _method(text: str) -> Options:
    """The options of a method that is given by its name alone: none, best-of-N, one-step, or a solver."""
    best_of = BEST_OF.fullmatch(text)
    if best_of:
        return {KIND: "best-of", "best_of": int(best_of[1])}
    return {KIND: text} if text in ("none", "one-step", "optimize") else {"solver": text}


def _table(name: str, value: Any) -> Options:
    """A table of options, whose names have underscores in the place of hyphens."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}: expected a table of options, got {value!r}")
    return {key.replace("-", "_"): option for key, option in value.items()}


def _texts(name: str, value: Any) -> list[str]:
    """A list of texts none of which is empty. The list itself may be."""
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"{name}: expected a list of texts, got {value!r}")
    return value


def _seeds(value: Any) -> list[int]:
    """The seeds: a list of them, or their number, counted from 0."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST_RUNS:
        return list(range(value))
    is_list = isinstance(value, list) and bool(value)
    if not is_list or not all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in value):
        raise ValueError(f"seeds: expected a list of whole numbers from 0 to 2^63 - 1, or how many, got {value!r}")
    return list(value)
