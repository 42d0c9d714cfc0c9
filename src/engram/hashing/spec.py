"""Named hash specifications.

A specification says which rule is used at each of the four places where published Engram variants differ. A new variant adds a
value to a rule, the code of that rule in ``reference.py`` and ``ngram.py``, and a name here. Multipliers of your own need no code: the
specifications that end in ``_given`` take them from whoever makes the mapping (``build_mapping(..., multipliers=...)``).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, get_args

from engram.errors import ConfigError

__all__ = ["HASH_SPECS", "HashSpec", "get_hash_spec"]


Ids = Literal["compressed", "raw"]
Multipliers = Literal["pcg64_per_layer", "given"]
Primes = Literal["shared_walk"]
Boundary = Literal["left_pad"]
_RULES = {
    "ids": get_args(Ids),
    "multipliers": get_args(Multipliers),
    "primes": get_args(Primes),
    "boundary": get_args(Boundary),
}


@dataclass(frozen=True)
class HashSpec:
    """The four rules that turn token ids into row numbers.

    Raises:
        ConfigError: a rule is one that nothing implements.
    """

    name: str
    ids: Ids
    """``compressed``: ids pass through the compression map P first. ``raw``: they are taken as they are, so that texts which differ in
    case or accents alone have addresses of their own (Qwen's and LongCat's rule)."""
    multipliers: Multipliers
    """``pcg64_per_layer``: odd numbers from ``default_rng(seed + 10007 * layer_id)``. ``given``: whoever makes the mapping gives them
    (``NgramHashMapping``); a saved memory keeps them."""
    primes: Primes
    """``shared_walk``: the next prime not yet used by any head of any order of any layer."""
    boundary: Boundary
    """``left_pad``: positions before the start of the sequence hold ``P(pad_id)``; tokens of ``EngramConfig.boundary_ids`` and what is older do
    so too."""

    def __post_init__(self) -> None:
        for rule, known in _RULES.items():
            if (got := getattr(self, rule)) not in known:
                raise ConfigError(
                    f"HashSpec.{rule}: got {got!r}, which nothing implements, expected one of {', '.join(map(repr, known))}. A rule needs its "
                    "code in hashing/reference.py and hashing/ngram.py; multipliers of your own go to build_mapping(..., multipliers=...) "
                    "with hash_spec 'exact_given' or 'demo_given'."
                )

    def to_dict(self) -> dict[str, str]:
        """JSON-ready fields, as they enter the fingerprint."""
        return asdict(self)


HASH_SPECS = {
    "demo_v1": HashSpec("demo_v1", ids="compressed", multipliers="pcg64_per_layer", primes="shared_walk", boundary="left_pad"),
    # For taught facts: as the demo, but `mW` and `MW` are two keys.
    "exact_v1": HashSpec("exact_v1", ids="raw", multipliers="pcg64_per_layer", primes="shared_walk", boundary="left_pad"),
    # The same two with multipliers of one's own.
    "demo_given": HashSpec("demo_given", ids="compressed", multipliers="given", primes="shared_walk", boundary="left_pad"),
    "exact_given": HashSpec("exact_given", ids="raw", multipliers="given", primes="shared_walk", boundary="left_pad"),
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
