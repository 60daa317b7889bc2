"""Fill the tables in README and docs: `python -m benchmarks.readme`.

Every block between `<!-- begin:NAME -->` and `<!-- end:NAME -->` is replaced by the text that
`results/NAME.json` holds under "markdown", or by a table made from the code. Nothing in these
blocks is written by hand.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.peers.pages import every_row
from blockcache.pipelines import recipe_table

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- begin:([\w-]+) -->\n).*?(<!-- end:\2 -->)", re.DOTALL)
_FROM_CODE: dict[str, Callable[[], str]] = {
    "recipe-table": lambda: recipe_table.markdown(recipe_table.rows()),
    "race": every_row,
}


def filled(text: str, results: Path) -> str:
    """The text with every block replaced for which there is something."""

    def replace(match: re.Match[str]) -> str:
        name, file = match[2], results / f"{match[2]}.json"
        if name in _FROM_CODE:
            content = _FROM_CODE[name]()
        elif file.is_file():
            content = json.loads(file.read_text())["markdown"]
        else:
            return match[0]
        return match[1] + content.rstrip() + "\n" + match[3]

    return _BLOCK.sub(replace, text)


def pages() -> list[Path]:
    """The pages that may have such blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; fail if a page is not up to date.")
def main(check: bool) -> None:
    """Bring the pages up to date."""
    stale = []
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = filled(before, ROOT / "benchmarks" / "results")
        if after != before:
            stale.append(page.name)
        if not check:
            page.write_text(after, encoding="utf-8")
    if check and stale:
        names = ", ".join(stale)
        raise click.ClickException(f"{names} not up to date; run python -m benchmarks.readme")


if __name__ == "__main__":
    main()
