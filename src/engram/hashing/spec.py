"""Named hash specifications.

A specification says which rule is used at each of the four places where published Engram variants differ. A new variant adds a
value to a rule, the code of that rule in ``reference.py`` and ``ngram.py``, and a name here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from engram.errors import ConfigError

__all__ = ["HASH_SPECS", "HashSpec", "get_hash_spec"]


@dataclass(frozen=True)
class HashSpec:
    """The four rules that turn token ids into row numbers."""

    name: str
    ids: Literal["compressed", "raw"]
    """``compressed``: ids pass through the compression map P first. ``raw``: they are taken as they are, so that texts which differ in
    case or accents alone have addresses of their own (Qwen's and LongCat's rule)."""
    multipliers: Literal["pcg64_per_layer"]
    """``pcg64_per_layer``: odd numbers from ``default_rng(seed + 10007 * layer_id)``."""
    primes: Literal["shared_walk"]
    """``shared_walk``: the next prime not yet used by any head of any order of any layer."""
    boundary: Literal["left_pad"]
    """``left_pad``: positions before the start of the sequence hold ``P(pad_id)``."""

    def to_dict(self) -> dict[str, str]:
        """JSON-ready fields, as they enter the fingerprint."""
        return asdict(self)


HASH_SPECS = {
    "demo_v1": HashSpec("demo_v1", ids="compressed", multipliers="pcg64_per_layer", primes="shared_walk", boundary="left_pad"),
    # For taught facts: as the demo, but `mW` and `MW` are two keys.
    "exact_v1": HashSpec("exact_v1", ids="raw", multipliers="pcg64_per_layer", primes="shared_walk", boundary="left_pad"),
}


def get_hash_spec(name: str) -> HashSpec:
    """Look a specification up by name.

    Raises:
        ConfigError: the name is unknown.
    """
    try:
        return HASH_SPECS[name]
    except KeyError:
        raise ConfigError(f"EngramConfig.hash_spec: got {name!r}, expected one of {', '.join(HASH_SPECS)}.") from None
