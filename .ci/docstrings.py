"""Shows the examples of docstrings as code, where the API reference of the site would show them as quoted text.

Google's style guide calls the section "Example:" or "Examples:", and the parser of docstrings knows the second name
only. mkdocs.yml names this file as an extension of griffe, which reads the sources for mkdocstrings.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

HEADING = re.compile(r"^( *)Example:( *)$", re.MULTILINE)


class Examples(griffe.Extension):
    """Gives every section of examples the name that griffe's parser knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the sections of one docstring in memory, and no file. griffe calls this for every object."""
        if obj.docstring is not None:
            obj.docstring.value = HEADING.sub(r"\1Examples:\2", obj.docstring.value)
