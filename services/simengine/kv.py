"""The KV cache as a count of blocks, with full blocks shared by content (prefix cache).

A block is private (being filled), or cached under the key of its content and everything before
it. Cached blocks nobody refers to stay until room is needed, least recently used first.

Invariant: private + cached <= capacity, and every cached block with no reference is evictable.
"""

from collections.abc import Sequence


class BlockPool:
    """Counts the blocks of one engine; `capacity_blocks` never changes."""

    def __init__(self, capacity_blocks: int, *, caching: bool = True) -> None:
        self.capacity_blocks = capacity_blocks
        self._caching = caching
        self._private = 0
        self._references: dict[int, int] = {}
        self._evictable: dict[int, None] = {}

    @property
    def used_blocks(self) -> int:
        """Blocks that running sequences hold; evictable ones count as free."""
        return self._private + len(self._references) - len(self._evictable)

    @property
    def free_blocks(self) -> int:
        """Blocks that `take` can give, evicting if need be."""
        return self.capacity_blocks - self.used_blocks

    def share_prefix(self, keys: Sequence[int]) -> int:
        """Refer to the cached blocks that begin `keys`; return how many there were."""
        shared = 0
        for key in keys:
            count = self._references.get(key)
            if count is None:
                break
            self._references[key] = count + 1
            if count == 0:
                del self._evictable[key]
            shared += 1
        return shared

    def take(self, blocks: int) -> bool:
        """Allocate private blocks, all or none; False if there is no room."""
        if blocks > self.free_blocks:
            return False
        unused = self.capacity_blocks - self._private - len(self._references)
        for _ in range(blocks - unused):
            key = next(iter(self._evictable))
            del self._evictable[key]
            del self._references[key]
        self._private += blocks
        return True

    def seal(self, key: int) -> bool:
        """Turn a full private block into a cached one; False if it stays private (no caching)."""
        if not self._caching:
            return False
        count = self._references.get(key)
        self._private -= 1
        self._references[key] = 1 if count is None else count + 1
        if count == 0:
            del self._evictable[key]
        return True

    def release(self, keys: Sequence[int], private_blocks: int) -> None:
        """Give back private blocks and references; the tail is evicted before the head."""
        self._private -= private_blocks
        for key in reversed(keys):
            count = self._references[key] - 1
            self._references[key] = count
            if count == 0:
                self._evictable[key] = None

    def broken_invariant(self) -> str | None:
        """Return what is wrong with the books, or None; for tests."""
        if self._private < 0:
            return f"private blocks below zero: {self._private}"
        if self._private + len(self._references) > self.capacity_blocks:
            return "more blocks than there are"
        idle = {key for key, count in self._references.items() if count == 0}
        if idle != set(self._evictable):
            return "idle blocks and evictable blocks differ"
        if any(count < 0 for count in self._references.values()):
            return "a reference was given back twice"
        return None
