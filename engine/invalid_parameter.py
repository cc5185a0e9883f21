"""InvalidParameter: the refusal of one field of a request or of a setting.

Owns the exception alone, so that every file which checks fields can raise it without knowing the others.
"""

from __future__ import annotations


class InvalidParameter(ValueError):
    """A field of a request has a value that cannot be honoured. `param` names the field."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.message = message
