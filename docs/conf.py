"""Configuration of the site: `make docs` builds it from the Markdown files of the repository and the docstrings.

The source folder is the root of the repository, so that links between pages are the same here and on a code host.
"""

import re
import sys
from pathlib import Path

from pygments.lexers.data import JsonLexer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rspo_jax  # noqa: E402

project = "rspo_jax"
author = "The rspo_jax authors"
copyright = author
version = release = rspo_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "experiments/LOG.md",
    "experiments/bench/README.md",
    "experiments/countdown_study/REPORT.md",
    "experiments/pod/README.md",
]
exclude_patterns = [".*", "**/.*", "build", "runs", "**/__pycache__", "tests", "models", "rspo_jax"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": False}
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "rspo_jax"
html_copy_source = False
html_show_sphinx = False


_TABLE = re.compile(r"(?:^ *[|].*\n?)+", re.MULTILINE)
_CODE = re.compile(r"`+([^`]+)`+")


def as_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn a docstring, which is written as Markdown, into what Sphinx reads: escape signs, keep tables as they are."""
    text = "\n".join(lines)
    made, end = [], 0
    for match in [*_TABLE.finditer(text), None]:
        words = _CODE.split(text[end : match.start() if match else None])
        words[::2] = [re.sub(r"([|]|[*](?=\S))", r"\\\1", plain) for plain in words[::2]]
        words[2::2] = [re.sub(r"^(?=\w)", r"\\ ", plain) for plain in words[2::2]]  # as in `Array`s
        words[1::2] = [f"``{code}``" for code in words[1::2]]
        made.append("".join(words))
        if match:
            made.append("::\n\n" + re.sub("^", "    ", match[0].rstrip("\n"), flags=re.MULTILINE) + "\n")
            end = match.end()
    # Napoleon takes what is before a colon in the first line of an attribute's text for a type.
    before = [""] if what in ("attribute", "data", "property") else []
    lines[:] = before + "".join(made).split("\n")


def write_redirect(app, error) -> None:
    """Let the address of the site itself lead to the first page."""
    if error is None and app.builder.name == "html":
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>{project}</title>\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def setup(app) -> None:
    """Connect the functions above."""
    app.add_lexer("jsonl", JsonLexer)
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
    app.connect("build-finished", write_redirect)
