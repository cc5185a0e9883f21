"""Settings on the command line: an option that is given wins over its NIGHTPRESS_ variable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from jobs.settings import Settings


def load_settings(**given: Any) -> Settings:
    """Settings from the environment and the options that are not None. Raises `click.UsageError`."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from jobs.bad_field import in_plain_words
    from jobs.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        lines = []
        for one in error.errors(include_url=False, include_input=False):
            name = "NIGHTPRESS_" + "__".join(str(part).upper() for part in one["loc"])
            lines.append(f"{name.rstrip('_')}: {in_plain_words(one['msg'].removeprefix('Value error, '))}")
        raise click.UsageError("\n".join(lines)) from None
    except SettingsError as error:
        raise click.UsageError(str(error)) from None
