"""How Sphinx builds these pages: `python -m sphinx -W docs docs/_build`, with what docs/requirements.txt lists.

`literalinclude` with `pyobject` takes every function from the scripts by its name, so a renamed one breaks the build.
"""

from importlib.util import find_spec
from pathlib import Path

from pygments.formatters import HtmlFormatter
from sphinx.highlighting import PygmentsBridge

project = "Trust region policy optimization, in single files"
extensions = ["myst_parser", "sphinx_design"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "TRPO and PPO, in single files"
html_css_files = ["pages.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}

# MathJax is copied from its package, one file without fonts, so that the pages need no network.
mathjax = Path(find_spec("sphinx-mathjax-offline").origin).with_name("static") / "mathjax" / "tex-svg.js"
html_static_path = ["_static", str(mathjax)]
mathjax_path = mathjax.name


class HangingLines(HtmlFormatter):
    """Each line of code a block of its own that knows its indentation: pages.css wraps long ones under their start."""

    def wrap(self, source):
        def blocks():
            for is_code, line in source:
                if is_code:
                    text = line.lstrip(" ")
                    line = f'<span class="line" style="--indent: {len(line) - len(text)}ch">{line}</span>'
                yield is_code, line

        return super().wrap(blocks())


PygmentsBridge.html_formatter = HangingLines
