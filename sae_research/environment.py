"""Keys and tokens: from the environment, else from the project's `.env`; never from parameters, never printed."""

from __future__ import annotations

import os

from dotenv import dotenv_values

from sae_research.errors import UserError
from sae_research.store import project_root


def secret(*names: str) -> str | None:
    """The first of these variables that is set and not empty; None where none is. `.env` holds lines `NAME=value`.

    Raises `UserError` for a `.env` that cannot be read.
    """
    file = project_root() / ".env"
    try:
        values = {**(dotenv_values(file) if file.is_file() else {}), **os.environ}
    except (UnicodeDecodeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{file}: {reason}; it holds lines NAME=value") from None
    return next((value for name in names if (value := values.get(name))), None)


def redacted(text: str, *secrets: str | None) -> str:
    """The text with every secret struck out: messages of other libraries may repeat what they were sent."""
    for value in secrets:
        if value:
            text = text.replace(value, "***")
    return text
