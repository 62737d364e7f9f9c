"""What MkDocs does beside its own when it builds the site of docs/ (see mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?([^<]+)</code>")
"""A name in a docstring in the way of Sphinx, once Markdown has been made HTML of it."""


def on_page_content(html: str, **_: Any) -> str:
    """Show such names as code, by their last part: all that a reader needs beside the page.

    Examples
    --------
    >>> on_page_content("see :func:<code>cxr_cache.jobs.runs.train_head</code>.")
    'see <code>train_head</code>.'
    """
    return _ROLE.sub(lambda found: f"<code>{found[1].rpartition('.')[2]}</code>", html)
