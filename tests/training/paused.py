"""A stand-in for measuring that notes whether the throughput was paused."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace


class Paused:
    """Called in place of what measures; ``throughput`` is what a trainer has by that name."""

    def __init__(self, value=1.0):
        self.value, self.inside, self.seen = value, False, []
        self.throughput = SimpleNamespace(paused=self._pause)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def __call__(self, *args, **options):
        self.seen.append(self.inside)
        return self.value
