"""Keeping secrets out of files: everything written or logged passes through `redact` first.

A secret is recognized by its name (`data.api_key`), by being the value of an environment variable with such a name
(WANDB_API_KEY), by its position in a URL (https://user:password@host), or by a known format (hf_..., ghp_...).
"""

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

REDACTED = "(redacted)"

SECRET = {"password", "passwd", "passphrase", "pwd", "secret", "credential", "authorization", "signature", "apikey"}
AMBIGUOUS = {"key", "token"}  # of an account, but also of a dictionary or a transformer
HARMLESS = {  # words before a key or token that is not one of an account
    *("class", "cls", "mask", "dist", "reg", "register", "patch", "pad", "global", "image", "label", "text", "target"),
    *("sort", "cache", "column", "primary", "foreign", "dict", "state", "num"),
}
SHORTEST = 8  # characters; shorter keys and tokens are ordinary settings
SHORTEST_IN_ENVIRONMENT = 6  # characters; shorter values would match parts of words

_SETTING = re.compile(r"([\w.+~@/-]+)=(.+)", re.DOTALL)
_NAME = re.compile(r"""(?<![\w.-])([\w.-]+)["']?\s*[=:]\s*""")  # of key=value, "key": "value", ?key=value&
_VALUE = re.compile(r""""[^"]*"|'[^']*'|[^\s,;&"'(){}\[\]]+""")
_ADDRESS = re.compile(
    r"(?<![a-z0-9+.-])(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<person>[^\s/@:]*):[^\s/@]+@|(?<=https://)[^\s/@:]+@", re.I
)
_FORMS = re.compile(
    r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|xox[abps]-|AKIA|sk-(?:proj-|ant-)?)[A-Za-z0-9_]{16,}[A-Za-z0-9_-]*"
    r"|(?<=Bearer )\S+|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.DOTALL,
)


def redact(value: Any) -> Any:
    """Return `value` with every secret replaced by "(redacted)".

    Args:
        value: A string, or nested dictionaries, lists and tuples of strings; anything else is returned unchanged. It is not
            modified.
    """
    return _redact(value, _of_environment())


def is_secret(name: str, value: Any) -> bool:
    """Return whether a named value is a secret: by the last word of the name, and if that is ambiguous also by the value."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)] or [""]
    last, before = words[-1].removesuffix("s"), (words[-2] if len(words) > 1 else "")
    if isinstance(value, bool) or value is None or value in ("", "true", "false", "null", REDACTED):
        return False
    if last in SECRET:
        return isinstance(value, str | int)
    if last in AMBIGUOUS and before not in HARMLESS:
        return isinstance(value, str) and len(value) >= SHORTEST
    return name.upper().endswith("ACCESS_KEY_ID") and isinstance(value, str)


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _under(str(name), one, known) for name, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_redact(one, known) for one in value))
    if isinstance(value, list | tuple):
        return type(value)(_redact(one, known) for one in value)
    return _redact_text(value, known) if isinstance(value, str) else value


def _under(name: str, value: Any, known: list[str]) -> Any:
    """Return a named value, redacted; a list of secrets is redacted one by one."""
    if isinstance(value, list | tuple):
        return type(value)(_under(name, one, known) for one in value)
    return REDACTED if is_secret(name, value) else _redact(value, known)


def _redact_text(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, REDACTED)
    if (setting := _SETTING.fullmatch(text)) and is_secret(*setting.groups()):  # including spaces in the value
        return f"{setting[1]}={REDACTED}"
    text = _FORMS.sub(REDACTED, text)
    text = _ADDRESS.sub(lambda found: f"{found['scheme'] or ''}{REDACTED}@", text)
    return _redact_pairs(text)


def _redact_pairs(text: str) -> str:
    """Redact named secrets in a command, a connection string, the query of a URL or JSON."""
    parts, written, at = [], 0, 0
    while name := _NAME.search(text, at):
        at = name.end()  # a value may contain names and values: url=https://host?token=...
        if (value := _VALUE.match(text, at)) and is_secret(name[1], value[0].strip("\"'")):
            quoted = value[0][0] if value[0][0] in "\"'" else ""
            parts += [text[written:at], quoted, REDACTED, quoted]
            written = at = value.end()
    return "".join([*parts, text[written:]])


def _of_environment() -> list[str]:
    """Return the values of secret environment variables, longest first, also URL-encoded."""
    secrets = {
        form
        for name, value in os.environ.items()
        if name != "PWD" and len(value) >= SHORTEST_IN_ENVIRONMENT and is_secret(name, value)
        for form in (value, quote(value, safe=""))
    }
    return sorted(secrets, key=len, reverse=True)
