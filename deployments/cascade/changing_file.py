"""When a file has changed, such as a mounted Secret that is renewed."""

from __future__ import annotations

from pathlib import Path


def file_stamp(path: str) -> tuple[int, int] | None:
    """Return what a change of the file changes: its time in ns and its inode; None: absent."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
