"""Passwords, keys and tokens in URLs: this module keeps them out of what is written and printed."""

import re

HIDDEN = "***"  # stands for a value of a query

# Of `scheme://user:password@host/path?name=value#name=value` the parts that may be secret. A password with an unescaped
# slash has a user and a colon before it that are no host and port.
_URL = re.compile(
    r"""(?P<scheme>[a-z][a-z0-9+.-]*://)
        (?:[^\s/?#'"<>]*@ | [^\s/?#'"<>@:]+:(?!:|\d*[/?#'"<>]|\d*\s|\d*$)[^\s'"<>@]*@)?
        (?P<place>(?:(?!::)[^\s?#'"<>])*)
        (?P<query>\?[^\s#'"<>]*)?
        (?P<fragment>\#[^\s'"<>]*=[^\s'"<>]*)?""",
    re.IGNORECASE | re.VERBOSE,
)
_PARTS = re.compile(r"([?#&;])(?:([^=&;?#]*=)?[^&;?#]+)")  # one name=value, or a value alone


def without_secrets(text: str) -> str:
    """Return a text without the user, the password and the values of the query of every URL in it.

    Names of a query stay, each with the value `***`. A text without URLs comes back as it is, and so does what this
    function has returned before.
    """
    return _URL.sub(_clean, text) if "://" in text else text


def _clean(url: re.Match) -> str:
    rest = (url["query"] or "") + (url["fragment"] or "")
    return url["scheme"] + url["place"] + _PARTS.sub(lambda part: part[1] + (part[2] or "") + HIDDEN, rest)


def credentials(url: str) -> tuple[str, str]:
    """Return the user and password of a URL with the `@` behind them, and its query with the `?` before it, or ""."""
    found = re.match(r"[a-z][a-z0-9+.-]*://([^/?#]*@)?[^?#]*(\?[^#]*)?", url, re.IGNORECASE)
    return (found[1] or "", found[2] or "") if found else ("", "")


def with_credentials(url: str, user: str, query: str) -> str:
    """Return a clean URL with what `credentials` has taken from another."""
    scheme, mark, rest = url.partition("://")
    return f"{scheme}{mark}{user}{rest}{query}"
