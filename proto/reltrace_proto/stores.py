"""URLs of folders in stores that one process names to another: which of them may be opened.

fsspec, which opens them, takes much more for a URL: chains of file systems (``a::b``), patterns,
queries, relative paths. Nothing of that is let through, instead of being made harmless.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

_KNOWN_SCHEMES = ("file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")

TENANT = "{tenant}"
"""In the pattern of a folder: the name of the tenant whose folder it is."""

_URL = re.compile(r"(?!file:)[a-z][a-z0-9+.-]*://[^/].*|file:///[^/].*", re.DOTALL)
_ODD = re.compile(r"[\\?#%*\[\]{}|<>\"]|::")


def url_fault(url: str) -> str:
    """Return why a URL can not be that of a folder; "": it can."""
    if not _URL.fullmatch(url):
        return "must be a URL such as file:///srv/results or s3://bucket/results"
    if "::" in url or "\\" in url or not url.isprintable():
        return "must be one plain URL, without ::, backslashes and control characters"
    if {".", ".."} & set(url.split("/")):
        return "must have no . and .. between slashes"
    return ""


def is_opened_unasked(url: str) -> bool:
    """Tell whether a process opens a folder that only another one has named."""
    return url.partition("://")[0] in _KNOWN_SCHEMES and not url_fault(url)


def folders_of(patterns: Iterable[str], tenant: str) -> list[str]:
    """Return the folders of some patterns that are a tenant's."""
    return [pattern.replace(TENANT, tenant) for pattern in patterns]


def is_below(url: str, folders: Iterable[str]) -> bool:
    """Tell whether a URL is one of some folders, or plainly in one of them.

    The folders are taken as they are; after them, each part between slashes must be a plain name.
    """
    return any(
        url == folder
        or (url.startswith(f"{folder}/") and all(map(_is_name, url[len(folder) + 1 :].split("/"))))
        for folder in folders
    )


def _is_name(part: str) -> bool:
    return part.isprintable() and part not in ("", ".", "..") and not _ODD.search(part)


def leaves_by_link(url: str, folder: str) -> bool:
    """Tell whether a file below a folder of this machine is elsewhere, by a symbolic link."""
    if not url.startswith("file://"):
        return False
    root = os.path.realpath(folder.removeprefix("file://"))
    path = os.path.realpath(url.removeprefix("file://"))
    return os.path.commonpath([root, path]) != root
