"""Links to the lines of a function, [`name`](script.py#L1-L9), in the pages that name functions of the scripts.

    python docs/lines.py

Writes the numbers behind every link of this form anew, from the scripts as they are. tests/test_readme.py fails when
one is out of date, or names what its script does not have.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "benchmark/README.md")
LINK = re.compile(r"\[`([\w.]+)`\]\((?:\.\./)*(\w+\.py)(?:#L\d+-L\d+)?\)")


def places(script: str) -> dict[str, tuple[int, int]]:
    """{name: (first, last line)} of a script's functions, classes, and their methods as Class.method."""
    found = {}

    def visit(nodes: list[ast.stmt], prefix: str = "") -> None:
        for node in nodes:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                found[prefix + node.name] = (first, node.end_lineno)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")

    visit(ast.parse((ROOT / script).read_text()).body)
    return found


def with_lines(text: str, depth: int = 0) -> str:
    """The text of a page with every link's numbers up to date; depth folders below the scripts. Raises KeyError for a
    name that is not there."""

    def link(match: re.Match) -> str:
        name, script = match.groups()
        first, last = places(script)[name]
        return f"[`{name}`]({'../' * depth}{script}#L{first}-L{last})"

    return LINK.sub(link, text)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(with_lines(path.read_text(), page.count("/")))
