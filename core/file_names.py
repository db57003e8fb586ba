"""File names that are valid on every operating system, so that files can be copied anywhere."""

from __future__ import annotations

import re

FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\x7f]')  # forbidden on Windows
DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789¹²³"
}
# File systems allow 255 bytes (Linux) or characters (Windows, macOS). The rest is for a number, the extension, and the
# suffix of the temporary name.
MAX_BYTES = 200


def name_problem(name: str) -> str | None:
    """Why `name`, one part of a path without extension, is not valid everywhere. None if it is valid."""
    found = FORBIDDEN.search(name)
    if found:
        return f"it holds {found[0]!r}, which Windows does not allow"
    if name != name.rstrip(". "):
        return "a part of it ends with a dot or a blank, which Windows does not keep"
    if name.partition(".")[0].rstrip().upper() in DEVICES:
        return f"'{name}' is the name of a device on Windows"
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return "it holds half of a character (a lone surrogate)"
    if length > MAX_BYTES:
        return f"a part of it takes {length} bytes, and at most {MAX_BYTES} are possible"
    return None
