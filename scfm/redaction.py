"""Secrets out of what is printed, logged or saved: keys in URLs, and the values of variables that hold keys."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"
VARIABLES = re.compile(r"(API_?KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY)", re.IGNORECASE)
SHORTEST = 8  # characters of a value that is looked for: shorter ones are ordinary words
# s3://KEY:SECRET@bucket, https://token@host; a secret may hold slashes, unless it is a port that stands there
USER = re.compile(r"(?<=://)(?:[^/\s@'\"]+|[^/\s@:'\"]+:(?!\d+/)[^\s@'\"]+)@")
PARAMETER = re.compile(
    r"([?&;][^=&;\s'\"]*(?:key|secret|token|password|signature|credential|sig)[^=&;\s'\"]*=)[^&;\s'\"#]+", re.IGNORECASE
)


def redacted(text: str, secret: str | None = None) -> str:
    """Return a text with `***` for the secrets in it, and for one that is known.

    These are users and passwords in URLs, values of URL parameters whose name says that they are keys or signatures
    (pre-signed links), and the values of environment variables that hold keys (WANDB_API_KEY, HF_TOKEN ...).
    """
    text = PARAMETER.sub(rf"\1{HIDDEN}", USER.sub(f"{HIDDEN}@", text))
    kept = [value for name, value in os.environ.items() if len(value) >= SHORTEST and VARIABLES.search(name)]
    for value in [*kept, *([secret] if secret else [])]:
        text = text.replace(value, HIDDEN)
    return text


def without_secrets(content: Any) -> Any:
    """Return nested dictionaries and lists with all texts in them redacted."""
    if isinstance(content, dict):
        return {key: without_secrets(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_secrets(value) for value in content]
    return redacted(content) if isinstance(content, str) else content
