"""The picture of a page in the README, from the phantoms of a demo: no real radiograph.

    cxr-cache demo DIR && python scripts/report_picture.py DIR docs/report.png

Needs the extra ``dev`` (Playwright) and a Chromium on the path.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path
from typing import Final

from PIL import Image
from playwright.sync_api import Page, sync_playwright

WIDTH_PX: Final = 1280
MARGIN_PX: Final = 12


def main() -> None:
    """Save the top of the page of the demo's fine-tuned run, and under it a finding's curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="folder that `cxr-cache demo` wrote")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    arguments = parser.parse_args()
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        parser.error("there is no chromium on the path")
    page = arguments.demo.resolve() / "finetuned" / "report.html"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH_PX, "height": 1000})
        tab.goto(page.as_uri())
        tab.locator("th[data-key=auroc] button").click()
        tab.locator("button.open").first.click()
        shot = Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB")
        top_of_table = edge(tab, "#finding-table", "top") - MARGIN_PX
        parts = [
            shot.crop((0, 0, WIDTH_PX, edge(tab, "#trust", "bottom") + MARGIN_PX)),
            shot.crop((0, top_of_table, WIDTH_PX, edge(tab, "tr.detail .charts", "bottom"))),
        ]
        browser.close()
    picture = Image.new("RGB", (WIDTH_PX, sum(part.height for part in parts)))
    picture.paste(parts[0])
    picture.paste(parts[1], (0, parts[0].height))
    picture.quantize(256, dither=Image.Dither.NONE).save(arguments.picture, optimize=True)


def edge(tab: Page, selector: str, side: str) -> int:
    """Where the first such element begins or ends, from the top of the whole page."""
    place: float = tab.locator(selector).first.evaluate(
        "(element, side) => element.getBoundingClientRect()[side] + window.scrollY", side
    )
    return round(place)


if __name__ == "__main__":
    main()
