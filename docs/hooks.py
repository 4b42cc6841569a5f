"""MkDocs hook: the docstrings' cross-references (``:func:`name```) as plain code."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    return re.sub(r":(?:func|meth|class|mod|data):<code>[~.]*", "<code>", html)
