"""The exceptions of SpectralMC, named by what the caller does next.

::

    SpectralMCError
    ├── ConfigError (ValueError)       fix the input: it says what was wrong, what is allowed, where
    │   └── AccessDenied               fix the credentials or the bucket policy
    ├── NumericsError (ArithmeticError)  stop: a loss or a parameter is no longer finite
    └── StorageError
        ├── NotFound (LookupError)     there is no such version, tag or object
        ├── Conflict                   somebody else wrote first: re-read, then decide
        ├── Corrupt                    stop: the ledger does not say what was written to it
        └── Unavailable                retry: the request failed, or its outcome is unknown
            └── Busy                   retry after `retry_after` seconds: the queue is full

All of them survive pickling, because they cross Ray. The package never returns an error where it
could raise one.
"""

from __future__ import annotations

__all__ = [
    "AccessDenied",
    "Busy",
    "ConfigError",
    "Conflict",
    "Corrupt",
    "NotFound",
    "NumericsError",
    "SpectralMCError",
    "StorageError",
    "Unavailable",
]


class SpectralMCError(Exception):
    """Root of every error this package raises on purpose."""


class ConfigError(SpectralMCError, ValueError):
    """The input is wrong; the message says what is allowed."""


class AccessDenied(ConfigError):
    """The storage server knows us and refuses, or does not know our credentials."""


class NumericsError(SpectralMCError, ArithmeticError):
    """A number that training depends on is no longer finite."""


class StorageError(SpectralMCError):
    """Something about the ledger or the object store underneath it."""


class NotFound(StorageError, LookupError):
    """The named object, version or tag does not exist."""


class Conflict(StorageError):
    """A conditional write found something already there."""


class Corrupt(StorageError):
    """Stored bytes contradict a hash, a chain rule or the format.

    `problems` lists every (object key, reason) found, the first of which is in the message.
    """

    def __init__(self, message: str, problems: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems

    def __reduce__(self) -> tuple[type[Corrupt], tuple[str, tuple[tuple[str, str], ...]]]:
        return type(self), (str(self), self.problems)


class Unavailable(StorageError):
    """The request failed in a way that a retry may cure; whether it took effect is unknown."""


class Busy(Unavailable):
    """The ledger's queue is full; submit again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[Busy], tuple[str, float]]:
        return type(self), (str(self), self.retry_after)
