"""From an id, which may be anything, to a file name that is safe on every system."""

import hashlib
import re

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9])(\..*)?", re.IGNORECASE)
_LONGEST_SLUG = 48


def stem_for(name: str) -> str:
    """A file name without ending for the id `name`: the id itself where that is harmless.

    Any other id becomes what is harmless of it, `~` and a hash. No plain id contains a `~`, so two
    ids never share a name but by letter case.
    """
    if _PLAIN.fullmatch(name) and not name.endswith(".") and not _DEVICES.fullmatch(name):
        return name
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", name)[:_LONGEST_SLUG].strip("-")
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{slug or 'item'}~{digest}"
