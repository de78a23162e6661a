"""What the caller can put right, told apart from bugs.

Both classes are also the built-in error that Python programs expect. A script may show one as a
single line; every other exception is a bug, here or in a user's own mechanism, and needs its
traceback.
"""

from __future__ import annotations


class UsageError(Exception):
    """A mistake of the caller; the message is one line that names the value and the remedy."""


class InvalidValue(UsageError, ValueError):
    """A value that is out of range, unknown, or does not fit the others."""


class Unavailable(InvalidValue, RuntimeError):
    """An implementation that cannot run here: a package, a device or a type is missing."""


class InvalidType(UsageError, TypeError):
    """An option that does not exist, or a value of the wrong type."""
