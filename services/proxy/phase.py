"""Where an exchange stands."""

from enum import Enum


class Phase(Enum):
    """Where an exchange stands."""

    RESERVING = 0
    HELD = 1
    """Waits for a replica, or for a moment to pass."""
    CONNECTING = 2
    SENT = 3
    """On a replica that has said nothing yet."""
    ANSWERING = 4
    """The client gets what the replica says."""
    DONE = 5
