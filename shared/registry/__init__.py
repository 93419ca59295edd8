"""The registry: the only door to Redis. See `shared.registry.registry` for how to open it."""

from shared.registry.registry import Registry, open_registry

__all__ = ["Registry", "open_registry"]
