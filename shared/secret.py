"""Secrets: values that must not be shown, and the API keys of engines derived from one of them."""

import hashlib
import hmac


class Secret:
    """A string that never shows itself: not by `repr`, not by `str`, not in a log."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value itself, for the one place that needs it."""
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "Secret(***)" if self._value else "Secret()"


def replica_api_key(fleet_secret: Secret, rid: str, gen: int) -> str:
    """Derive the API key of one incarnation of a replica's engine.

    Agent and proxy compute it alike from the fleet secret, so it is stored nowhere. It reaches
    the engine by environment, never by argument.
    """
    message = f"{rid}\n{gen}".encode()
    return hmac.new(fleet_secret.reveal().encode(), message, hashlib.sha256).hexdigest()
