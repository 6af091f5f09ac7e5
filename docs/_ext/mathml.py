"""Formulas as MathML, which browsers show by themselves: the site needs no script and no server for them."""

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging


logger = logging.getLogger(__name__)


def visit(self, node: nodes.math | nodes.math_block) -> None:
    block = isinstance(node, nodes.math_block)
    try:
        formula = latex2mathml.tex2mathml(node.astext(), as_block=block)
        self.body.append(f'<div style="padding: 0.7em 0; overflow-x: auto">{formula}</div>' if block else formula)
    except SyntaxError as error:
        logger.warning("docutils' LaTeX does not read %r: %s", node.astext(), error, location=node)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit, None), (visit, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
