"""Mermaid diagrams from a classic script kept beside the pages; Sphinx's own loads a module, which file:// refuses."""

import html

from docutils import nodes
from docutils.parsers.rst import Directive


class Mermaid(Directive):
    """A fenced `mermaid` block."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        source = html.escape("\n".join(self.content))
        return [nodes.raw("", f'<div class="diagram"><pre class="mermaid no-copy">{source}</pre></div>', format="html")]


def add_scripts(app, pagename, templatename, context, doctree) -> None:
    """Load the script (3.5 MB) only where there is a diagram."""
    if 'class="mermaid' in context.get("body", ""):
        app.add_js_file("mermaid/mermaid.js", loading_method="defer")
        app.add_js_file("diagrams.js", loading_method="defer")


def setup(app) -> dict:
    app.add_directive("mermaid", Mermaid)
    app.connect("html-page-context", add_scripts)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
