"""What prompts alone can tell, kept with the run that it is compared with."""

from __future__ import annotations

import shlex

from cxr_cache.common.manifest import mark_written
from cxr_cache.evaluation.zero_shot import ZeroShot
from cxr_cache.jobs.scoring import refresh_report
from cxr_cache.models.run import Run


def keep_zero_shot(run: Run, found: ZeroShot) -> str:
    """Put a table of prompts into the folder of the run that it belongs to, and on its page.

    Returns
    -------
    str
        Where it is, in a sentence; empty where it belongs to no run.
    """
    if not found.is_of_run:
        return ""
    try:
        mark_written(run.path)
        kept = run.write_table("zero_shot", found.table)
        page = refresh_report(run)
    except PermissionError as error:  # the run may be someone else's
        return f"Not kept with the run: {error.filename} cannot be written."
    if page is not None:
        return f"Kept as {kept}, and shown on the run's page {page}."
    command = shlex.join(["cxr-cache", "report", str(run.path)])
    return f"Kept as {kept}; `{command}` puts it on the run's page."
