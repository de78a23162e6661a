"""What the data sets say when the caller's data cannot be used."""

from __future__ import annotations

from recipes.lab.console import UserError


class DataError(UserError):
    """Data that the user can put right: one line naming the value or path and the remedy."""
