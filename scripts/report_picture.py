"""The picture of a page in the README: figures and curves, and no radiograph.

    python scripts/report_picture.py runs/first/report.html docs/report.png

A page that holds pictures of radiographs is refused.

Needs the extra ``dev`` (Playwright) and a Chromium on the path.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import Final

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH_PX: Final = 1280
MARGIN_PX: Final = 4
OPENED: Final = 5
"""The finding of the table whose curves are shown, counted from 1."""


def main() -> None:
    """Save the first screen of a run's page, and its first findings, one of them opened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="report.html of a run")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    arguments = parser.parse_args()
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        parser.error("there is no chromium on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH_PX, "height": 1000})
        tab.goto(arguments.page.resolve().as_uri())
        if tab.locator("img").count():
            parser.error(f"{arguments.page} holds pictures; write it without --image-dir")
        findings = tab.locator("button.open")
        findings.nth(min(OPENED, findings.count()) - 1).click()
        shot = Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB")
        charts = tab.locator("tr.detail .charts")
        end: float = charts.evaluate("box => box.getBoundingClientRect().bottom + scrollY")
        browser.close()
    picture = shot.crop((0, 0, WIDTH_PX, round(end) + MARGIN_PX))
    picture.quantize(256, dither=Image.Dither.NONE).save(arguments.picture, optimize=True)


if __name__ == "__main__":
    main()
