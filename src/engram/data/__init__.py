"""Floor 5: facts and corpora."""

from engram.data.facts import Fact, load_facts

__all__ = ["Fact", "load_facts"]
