# SPDX-License-Identifier: Apache-2.0
"""The project's page, docs/index.html: README.md with its pictures, as one file that needs no other.

python -m report.site    # needs requirements-dev.txt
"""

import base64
import re
from pathlib import Path

import markdown

from report import page

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "index.html"


def render(text: str, root: Path) -> bytes:
    """The page of a document that lies in `root`. Its pictures are put into the page, its links start from docs/."""
    title, _, body = text.partition("\n")
    html = markdown.markdown(body, extensions=["tables", "fenced_code", "toc"])

    def picture(match: re.Match) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((root / match[1]).read_bytes()).decode()}"'

    html = re.sub(r'src="([^":]+\.png)"', picture, html)
    html = re.sub(r'href="(?!https?:|#|docs/)([^"]+)"', r'href="../\1"', html)
    html = html.replace('href="docs/', 'href="')
    html = html.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    return page.document(title.removeprefix("# "), [html])


def main() -> None:
    OUT.write_bytes(render((ROOT / "README.md").read_text(), ROOT))
    print(OUT)


if __name__ == "__main__":
    main()
