"""The error tree of redmesh. Each leaf names what failed, so a caller can choose what to do.

RedmeshError
├── InvalidInputError      the caller's fault: nothing was done; mend the named field (exit code 2)
├── NotFoundError          the named thing does not exist
├── RegistryError          Redis and what is in it
│   ├── RegistryUnavailableError   no usable answer now: try later, or do without
│   │   └── RegistryTimeoutError   no answer within the deadline; the act may have happened
│   ├── RegistryRefusedError       Redis said no for good (authentication, permission, bad script)
│   ├── SchemaVersionError         the data was written by a release that this one cannot read
│   └── CorruptRecordError         content of a key does not parse; quarantined, never fatal
├── LeadershipLostError    a write was fenced off: another controller leads; stop acting at once
└── EngineError            an engine process could not be started or used

Refusals that are expected (a replica at its cap, a lost compare-and-set) are values, not errors:
see the result types in `shared.registry`.
"""


class RedmeshError(Exception):
    """Base of every error that redmesh raises on purpose; its text is meant for a person."""


class InvalidInputError(RedmeshError):
    """Input was refused and nothing was done. `field` is its name or path, if there is one."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotFoundError(RedmeshError):
    """The named thing does not exist."""


class RegistryError(RedmeshError):
    """Something is wrong with Redis or with what is in it."""


class RegistryUnavailableError(RegistryError):
    """Redis gave no usable answer (connection, READONLY, OOM, MISCONF, LOADING, CLUSTERDOWN)."""


class RegistryTimeoutError(RegistryUnavailableError):
    """No answer within the deadline. The act may have happened: scripts are idempotent."""


class RegistryRefusedError(RegistryError):
    """Redis refused for good: authentication, permission, or a script it does not accept."""


class SchemaVersionError(RegistryError):
    """The data in Redis has a schema version outside the range that this release supports."""


class CorruptRecordError(RegistryError):
    """The content of a key does not parse. `key` and `field` tell where it stands."""

    def __init__(self, message: str, *, key: str, field: str | None = None) -> None:
        super().__init__(message)
        self.key = key
        self.field = field


class LeadershipLostError(RedmeshError):
    """A controller write was refused by the fence: another controller leads now."""


class EngineError(RedmeshError):
    """An engine could not be started or used; the text says why and what to do."""
