"""Plain data from YAML that people write: recipes, texts, routing rules and values on the command line. Facts files, in which every value is
text, have rules of their own (``data/facts.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

__all__ = ["parse_yaml"]


class _Loader(yaml.SafeLoader):
    """With numbers as YAML 1.2 has them: 1e-3 is one, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?|\d*\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, what: str, error: Callable[[str], Exception]) -> Any:
    """The plain data that a YAML text says.

    Args:
        text: the YAML.
        what: where it stands, for the message: ``recipe FILE``.
        error: made of the message and raised if the text says nothing that can be read.

    Raises:
        Exception: what ``error`` makes; instead of PyYAML's errors, and of Python's own, which values end in that look like a date or a
            number and are none (``2024-99-99``), or that are said to be of a type that they are not (``!!bool maybe``).
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        reason = "lists or mappings are nested too deeply"
    except yaml.YAMLError as wrong:
        reason = " ".join(str(wrong).split())
    except (ValueError, LookupError, AttributeError) as wrong:
        reason = f"a value is not what it looks like, so put quotes around it if it is text ({' '.join(str(wrong).split())})"
    raise error(f"cannot read {what}: {reason}")
