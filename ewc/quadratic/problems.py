"""Everything that is wrong with a state, in a message of limited length."""

from collections.abc import Callable, Iterable, Iterator

from ewc._checks import MOST


class Problems:
    """Problems, of which the first few of each kind are described and the others counted."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, text: str | Callable[[], str]) -> None:
        """Record a problem.

        Args:
            kind: The problems of a kind, as a noun in the plural.
            text: The description, or a function that returns it: to look for the nearest name
                takes time, so that it is called only where the problem is described.
        """
        described = self._kinds.setdefault(kind, [])
        if len(described) < MOST:
            described.append(text if isinstance(text, str) else text())
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def extend(self, kind: str, texts: Iterable[str | Callable[[], str]]) -> None:
        """Record several problems of one kind."""
        for text in texts:
            self.add(kind, text)

    def __len__(self) -> int:
        return sum(self._counts.values())

    def __iter__(self) -> Iterator[str]:
        """The descriptions and, for each kind with more problems than that, how many there are."""
        for kind, described in self._kinds.items():
            yield from described
            if self._counts[kind] > len(described):
                yield f"... and {self._counts[kind] - len(described)} more {kind}"
