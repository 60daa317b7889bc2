"""Fill the README's tables from `benchmarks/results/*.json`: `python -m benchmarks.readme`.

Every block between `<!-- begin:NAME -->` and `<!-- end:NAME -->` is replaced by the text that
`results/NAME.json` holds under "markdown". Nothing in these blocks is written by hand.
"""

import json
import re
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- begin:(\w+) -->\n).*?(<!-- end:\2 -->)", re.DOTALL)


def filled(text: str, results: Path) -> str:
    """The text with every block replaced for which there is a result."""

    def replace(match: re.Match[str]) -> str:
        file = results / f"{match[2]}.json"
        if not file.is_file():
            return match[0]
        return match[1] + json.loads(file.read_text())["markdown"].rstrip() + "\n" + match[3]

    return _BLOCK.sub(replace, text)


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; fail if the README is not up to date.")
def main(check: bool) -> None:
    """Bring README.md up to date."""
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = filled(before, ROOT / "benchmarks" / "results")
    if check and after != before:
        raise click.ClickException("README.md is not up to date; run python -m benchmarks.readme")
    readme.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
