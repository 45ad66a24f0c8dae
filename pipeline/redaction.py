"""URLs and texts without the secrets in them: fit for a log or a record."""

import re

_HOST_AND_PORT = re.compile(r"([^:@\[\]]+:[0-9]+|\[[0-9A-Fa-f:.]+\](:[0-9]+)?)[.,:;)'\"]*")
_SECRET_PARAMETER = re.compile(
    r"([?&](?:access_key|secret_key|session_token|token|sig|Signature|AWSAccessKeyId|X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token))=)[^&\s]+",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """A URL, or a text with URLs in it, without user names, passwords and keys: fit for a log or a record."""
    return _SECRET_PARAMETER.sub(r"\1***", re.sub(r"(?<=://)\S+", _without_user, text))


def _without_user(match: re.Match[str]) -> str:
    """What follows `://`, with `***` in place of a user and password."""
    rest = match.group()
    authority = rest.partition("/")[0]
    if not authority.strip(".,:;)'\""):
        return rest  # a scheme alone, as in "use s3://, or gs://."
    user, at, _ = authority.rpartition("@")
    if at and ":" not in user:
        return f"***{rest[len(user) :]}"
    if at or (":" in authority and not _HOST_AND_PORT.fullmatch(authority)):
        # A password, in which slashes are common: everything before the last @ may be part of it.
        _, at, place = rest.rpartition("@")
        return f"***@{place}" if at else "***"
    return rest
