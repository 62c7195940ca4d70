"""Markup that others wrote, made safe for a page: HTML, markdown, equations and pictures.

A page runs no script and asks no network. What could do either is taken out here, and the pages' policy forbids it
besides. Equations become MathML, which browsers draw themselves.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bs4 import BeautifulSoup

    _Attachments = Mapping[str, Mapping[str, str]]  # by name: its content in base64 by type


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LONGEST_EQUATION = 10_000
_IMAGES = ("image/svg+xml", "image/png", "image/jpeg", "image/gif", "image/webp")
# These go with all that they hold; the tags that are not listed below go alone.
_WITH_CONTENT = ("script", "template", "iframe", "object", "embed", "head", "title", "noscript", "select", "textarea")
_TAGS = _words(
    "a abbr article aside audio b blockquote br caption center cite code col colgroup dd del details dfn div dl dt em "
    "figcaption figure font footer h1 h2 h3 h4 h5 h6 header hr i img input ins kbd label li main mark meter nav ol p "
    "pre progress q s samp section small source span strong sub summary sup table tbody td tfoot th thead time tr tt "
    "u ul var video"
)
_ATTRIBUTES = _words(
    "align alt bgcolor border checked class color colspan controls datetime dir disabled for height id lang max min "
    "open role rowspan scope span start style title type valign value width"
)
_MATH_ATTRIBUTES = _words(
    "accent columnalign columnlines columnspacing depth display displaystyle fence form frame height linethickness "
    "lspace mathcolor mathsize mathvariant maxsize minsize movablelimits notation rowlines rowspacing rspace "
    "scriptlevel separator stretchy symmetric voffset width"
)
_SAFE_LINK = re.compile(r"\s*(https?:|mailto:|[^:]*$|[#/.?])", re.I)
_SAFE_SOURCE = re.compile(r"data:(image|audio|video)/[\w.+-]+;base64,", re.I)
# What in a style could ask the network or hide its meaning.
_UNSAFE_STYLE = re.compile(r"url|image|import|expression|behavior|binding|[\\<@]", re.I)
_MATH = re.compile(
    r"\$\$(?P<block>.+?)\$\$|\\\[(?P<bracket>.+?)\\\]|\$(?P<inline>.+?)\$|\\\((?P<round>.+?)\\\)"
    r"|(?P<environment>\\begin\{(?P<name>[a-z]*\*?)\}.*?\\end\{(?P=name)\})",
    re.S,
)


class _Styles:
    """bleach's hook for the attribute ``style``."""

    def sanitize_css(self, style: str) -> str:
        """The style without the declarations that are not safe."""
        return ";".join(part for part in style.split(";") if not _UNSAFE_STYLE.search(part))


def _safe_html(text: str, attachments: _Attachments | None = None) -> str:
    """HTML without scripts, and without anything that would be fetched. Its own style sheets reach only itself."""
    import bleach
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(text, "html.parser")
    for tag in soup(_WITH_CONTENT):
        tag.decompose()
    rules = _style_rules(soup)
    _embed_pictures(soup, attachments or {})
    cleaned: str = bleach.clean(
        str(soup),
        tags=_TAGS,
        attributes=_is_safe_attribute,
        protocols={"http", "https", "mailto", "data"},
        strip=True,
        css_sanitizer=_Styles(),
    )
    if not rules:
        return cleaned
    name = "output-" + hashlib.sha256(text.encode()).hexdigest()[:12]
    return f'<style>{_within(f"#{name}", rules)}</style><div id="{name}">{cleaned}</div>'


def _is_safe_attribute(tag: str, name: str, value: str) -> bool:
    if name == "href":
        return tag == "a" and _SAFE_LINK.match(value) is not None
    if name == "src":
        return _SAFE_SOURCE.match(value) is not None
    if tag == "input" and name == "type":
        return value.lower() == "checkbox"
    return name in _ATTRIBUTES or name.startswith("aria-")


def _style_rules(soup: BeautifulSoup) -> list[tuple[str, str]]:
    """Take the style sheets out of a document, and return their safe rules: selectors and declarations."""
    import tinycss2

    rules = []
    for sheet in soup("style"):
        for rule in tinycss2.parse_stylesheet(sheet.get_text(), skip_comments=True, skip_whitespace=True):
            if rule.type != "qualified-rule":
                continue
            selectors, declarations = tinycss2.serialize(rule.prelude), tinycss2.serialize(rule.content)
            if not _UNSAFE_STYLE.search(selectors) and not _UNSAFE_STYLE.search(declarations):
                rules.append((selectors, declarations))
        sheet.decompose()
    return rules


def _within(scope: str, rules: list[tuple[str, str]]) -> str:
    """Rules that hold for what is inside of ``scope`` only."""
    lines = []
    for selectors, declarations in rules:
        scoped = ", ".join(f"{scope} {selector.strip()}" for selector in selectors.split(","))
        lines.append(f"{scoped} {{{declarations}}}")
    return "\n".join(lines)


def _embed_pictures(soup: BeautifulSoup, attachments: _Attachments) -> None:
    """Put attachments in the place of their names, and drawings in SVG, which may hold scripts, into pictures."""
    for image in soup("img"):
        source = str(image.get("src") or "")
        if source.startswith("attachment:"):
            image["src"] = _attachment(source, attachments) or ""
        if not _SAFE_SOURCE.match(str(image.get("src") or "")):
            image.replace_with(soup.new_string(_not_shown(source, str(image.get("alt") or ""))))
    for drawing in soup("svg"):
        if drawing.find_parent("svg") is None:
            drawing.attrs.setdefault("xmlns", "http://www.w3.org/2000/svg")
            drawing.replace_with(soup.new_tag("img", src=_svg_address(str(drawing)), alt=""))


def _not_shown(source: str, words: str) -> str:
    """What stands for a picture that is missing, or that only the network has."""
    name = source.removeprefix("attachment:")
    return f"[picture {words or name[:100]} is not in this notebook]"


def _svg_address(drawing: str) -> str:
    """A drawing as the address of a picture: there, a browser runs no script and fetches nothing."""
    return "data:image/svg+xml;base64," + base64.b64encode(drawing.encode()).decode("ascii")


def _attachment(address: str, attachments: _Attachments) -> str | None:
    """The picture that an ``attachment:`` names, as the address that holds it; None if it is not there."""
    from urllib.parse import unquote

    name = address.removeprefix("attachment:")
    content = attachments.get(name) or attachments.get(unquote(name)) or {}
    for kind in _IMAGES:
        if isinstance(data := content.get(kind), str):
            # Of these types alone, the format keeps a drawing as its text.
            return _svg_address(data) if data.lstrip().startswith("<") else f"data:{kind};base64,{data}"
    return None


def _safe_markdown(source: str, attachments: _Attachments | None = None) -> str:
    """Markdown, with the HTML and the equations in it, as safe HTML."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    equations: dict[str, str] = {}

    def keep(tex: str, block: bool) -> str:
        # bleach knows no MathML: it sees a word in the place of each equation.
        name = f"EQUATION{hashlib.sha256(f'{len(equations)} {source}'.encode()).hexdigest()[:16]}"
        equations[name] = _equation(tex, block=block)
        return name

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str) -> str:
            return keep(body, block=False)

        def block_math(self, body: str) -> str:
            return keep(body, block=True)

        def latex_environment(self, name: str, body: str) -> str:
            return keep(f"\\begin{{{name}}}{body}\\end{{{name}}}", block=True)

        def image(self, text: str, url: str, title: str | None = None) -> str:
            return f'<img src="{html.escape(url)}" alt="{html.escape(text)}" title="{html.escape(title or text)}">'

    # Without the renderer's own embed_images, which would end each <details> before the text that it folds.
    rendered = MarkdownWithMath(renderer=Renderer(escape=False, exclude_anchor_links=True)).render(source)
    safe = _safe_html(rendered, attachments)
    for name, equation in equations.items():
        safe = safe.replace(name, equation)
    return safe


def _safe_latex(text: str) -> str:
    """A text with equations, as ``IPython.display.Math`` and ``Latex`` give it."""
    parts, end = [], 0
    for match in _MATH.finditer(text):
        parts.append(html.escape(text[end : match.start()]))
        block = match["inline"] is None and match["round"] is None
        body = match["block"] or match["bracket"] or match["inline"] or match["round"] or match["environment"]
        # IPython's Math, and sympy, write a whole line as \displaystyle between single signs.
        parts.append(_equation(body, block=block or body.startswith("\\displaystyle")))
        end = match.end()
    return "".join([*parts, html.escape(text[end:])])


def _equation(tex: str, *, block: bool) -> str:
    """An equation as MathML; its own text if it is not valid TeX."""
    from latex2mathml.converter import convert

    plain = f'<code class="tex">{html.escape(tex)}</code>'
    if len(tex) > _LONGEST_EQUATION:
        return plain
    try:
        drawn = convert(tex.removeprefix("\\displaystyle"), display="block" if block else "inline")
    except Exception:  # the library has an error of its own for each mistake, and none in common
        return plain
    return _safe_math(drawn, tex) or plain


def _safe_math(drawn: str, tex: str) -> str | None:
    """MathML without links, read out as its TeX; None if it is not well formed."""
    from xml.etree import ElementTree

    try:
        root = ElementTree.fromstring(drawn)
    except ElementTree.ParseError:
        return None
    space = "http://www.w3.org/1998/Math/MathML"
    for element in root.iter():
        element.tag = element.tag.removeprefix(f"{{{space}}}")
        for name in list(element.attrib):
            if name not in _MATH_ATTRIBUTES:
                del element.attrib[name]
    root.set("alttext", tex.strip())
    return ElementTree.tostring(root, encoding="unicode")
