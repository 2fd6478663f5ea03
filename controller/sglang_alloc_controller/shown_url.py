"""Control story, beside every step: addresses as people and logs may see them."""

import re

_USER = re.compile(r"//[^/]*@")


def shown_url(url: str) -> str:
    """Return the address without the user and the password that it may hold."""
    return _USER.sub("//***@", url, count=1)
