"""Sphinx settings to build these pages alone: ``sphinx-build -W -b html pyterrier_mech/pt_docs <folder>``.

PyTerrier's own documentation takes the pages and leaves this file. It has the directives ``schematic``, ``how-to``,
``cite`` and ``cite.dblp``; the ones below stand in for them, without a network.
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyterrier as pt  # noqa: E402

import pyterrier_mech  # noqa: E402

project = 'pyterrier-mech'
release = version = pyterrier_mech.__version__
html_title = f'{project} {release}'
extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon']
# Tables that a page includes are no page of their own.
exclude_patterns = ['_build', '*_results.rst']

# Docstrings write code in single and in double backticks.
default_role = 'literal'
napoleon_use_ivar = True
# Else `plan_` in a docstring's list of attributes is a reference, and shown as 'plan'.
strip_signature_backslash = True
autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'

html_theme = 'alabaster'
html_theme_options = {
    'description': 'Mechanistic interpretability of neural rankers as PyTerrier stages',
    'page_width': '1180px',
    'sidebar_width': '230px',
    'fixed_sidebar': True,
    'show_powered_by': False,
    'font_size': '16px',
    'code_font_size': '0.82em',
    'attention_bg': '#fdf6dc',
    'attention_border': '#e0c76b',
}
html_sidebars = {'**': ['about.html', 'searchfield.html', 'navigation.html']}
html_copy_source = False
html_show_copyright = False


class Schematic(SphinxDirective):
    """Draws a pipeline from a literal dict in PyTerrier's schematic format."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Returns the drawing as HTML."""
        try:
            html = pt.schematic.draw(ast.literal_eval('\n'.join(self.content)))
        except (ValueError, SyntaxError, KeyError, AssertionError) as error:
            raise self.error(f'this is no schematic: {error!r}') from error
        return [nodes.raw('', html, format='html')]


class HowTo(SphinxDirective):
    """A section that answers one question."""

    has_content = True
    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Returns the section, with the question as its title."""
        question = ' '.join(self.arguments[0].split())
        section = nodes.section(ids=[nodes.make_id(question)], names=[nodes.fully_normalize_name(question)])
        texts, messages = self.state.inline_text(question, self.lineno)
        section += [nodes.title(question, '', *texts), *messages]
        self.state.nested_parse(self.content, self.content_offset, section)
        return [section]


class Cite(SphinxDirective):
    """A citation, with its text and link in the options. PyTerrier's ``cite.dblp`` looks them up instead."""

    has_content = True
    required_arguments = 1
    option_spec = {'citation': directives.unchanged_required, 'link': directives.uri}

    def run(self) -> list[nodes.Node]:
        """Returns a box with the citation."""
        text = self.options.get('citation', self.arguments[0])
        link = self.options.get('link', f'https://dblp.org/rec/{self.arguments[0]}')
        paragraph = nodes.paragraph('', '', nodes.Text(f'{text} '), nodes.reference('', '[link]', refuri=link))
        return [nodes.admonition('', nodes.title('', 'Citation'), paragraph, classes=['cite'])]


def signature(app: Any, what: str, name: str, thing: Any, *_: Any) -> tuple[str, None] | None:  # noqa: ANN401
    """Shows what a stage takes: it inherits a ``__new__`` that takes anything, which autodoc would show."""
    if what == 'class' and getattr(thing, '_is_protocol', False):
        return '', None
    if what != 'class' or not issubclass(thing, pt.Transformer):
        return None
    return stringify_signature(inspect.signature(thing), show_annotation=False), None


def setup(app: Any) -> dict[str, Any]:  # noqa: ANN401 - Sphinx calls it
    """Adds the directives that are not there yet."""
    own = {'schematic': Schematic, 'how-to': HowTo, 'cite': Cite, 'cite.dblp': Cite}
    for name, directive in own.items():
        if name not in directives._directives:
            app.add_directive(name, directive)
    app.connect('autodoc-process-signature', signature)
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
