"""Markup of others on a page: what stays, what is taken out, equations as MathML, pictures of attachments."""

import base64
from xml.etree import ElementTree

import pytest
from bs4 import BeautifulSoup

from helpers.runs.markup import _safe_html, _safe_latex, _safe_markdown

PIXEL = base64.b64encode(b"\x89PNG\r\n\x1a\n and so on").decode()


@pytest.mark.parametrize(
    "text",
    [
        '<meta http-equiv="refresh" content="0;url=http://evil.test">',
        '<img src="http://evil.test/i.png" srcset="http://evil.test/2x">',
        '<img src="//evil.test/i.png"><video poster="http://evil.test/p" src="http://evil.test/v"></video>',
        '<div style="background:url(http://evil.test)">x</div>',
        '<div style="background:u\\72l(http://evil.test)">x</div>',
        "<style>@import 'http://evil.test/a.css'; b { background: url(http://evil.test) }</style><b>x</b>",
        '<link rel="stylesheet" href="http://evil.test"><base href="http://evil.test">',
        '<iframe src="http://evil.test" srcdoc="<script>evil.test</script>"></iframe>',
        '<form action="http://evil.test"><button formaction="http://evil.test">x</button></form>',
        '<object data="http://evil.test"></object><embed src="http://evil.test">',
        '<a href="javascript:evil.test()">x</a><a href=" java\nscript:evil.test">x</a>',
        '<a href="data:text/html,evil.test">x</a><a href="&#106;avascript:evil.test">x</a>',
        '<b onclick="evil.test()" onmouseover=evil.test>x</b>',
        "<script>evil.test</script><scr<script>ipt>x</script>",
        "<math><mtext><table><mglyph><style><img src=http://evil.test onerror=1></style></table></math>",
        "<svg><style><img src=x onerror=evil.test></style></svg>",
        "<noscript><p title='</noscript><img src=x onerror=evil.test>'></noscript>",
        "<!-- evil.test --><![CDATA[evil.test]]>",
        '<template><img src="http://evil.test"></template>',
    ],
)
def test_what_asks_the_network_or_runs_is_taken_out(text):
    """D6: no address that a browser would fetch is left, and no attribute that runs."""
    for element in BeautifulSoup(_safe_html(text), "html.parser").find_all(True):
        assert element.name not in ("script", "meta", "link", "base", "iframe", "form", "object", "embed", "svg")
        for name, value in element.attrs.items():
            assert not name.startswith("on")
            if not (name == "src" and str(value).startswith("data:image/svg+xml")):
                assert "evil.test" not in str(value), element


def test_drawings_become_pictures_in_which_no_script_runs():
    drawing = '<svg viewBox="0 0 9 9" onload="x()"><circle r="4"/></svg>'
    (image,) = BeautifulSoup(_safe_html(drawing), "html.parser").find_all(True)
    assert image.name == "img"
    kept = base64.b64decode(image["src"].removeprefix("data:image/svg+xml;base64,")).decode()
    assert kept.startswith("<svg")
    assert "circle" in kept


def test_what_tables_and_panels_are_made_of_stays():
    """F19: pandas' tables with their own styles, folds, sounds in the page; also what helpers show."""
    import pandas as pd

    table = pd.DataFrame({"a": [1.5]})
    soup = BeautifulSoup(_safe_html(table._repr_html_()), "html.parser")
    assert [cell.get_text() for cell in soup.select("table.dataframe tbody td")] == ["1.5"]
    styled = BeautifulSoup(_safe_html(table.style.highlight_max(color="#ff0000")._repr_html_()), "html.parser")
    scope = styled.div["id"]
    assert f"#{scope} #T_" in styled.style.get_text()
    assert "#ff0000" in styled.style.get_text()
    panel = (
        '<details open><summary>s</summary><div style="color:#123456;padding:1px 2px">x</div></details>'
        '<audio controls><source src="data:audio/wav;base64,AAAA" type="audio/wav"></audio>'
        '<a href="#there">a</a> <a href="../report.html">b</a> <a href="https://example.org">c</a>'
    )
    kept = BeautifulSoup(_safe_html(panel), "html.parser")
    assert kept.details.has_attr("open")
    assert kept.div["style"] == "color:#123456;padding:1px 2px"
    assert kept.source["src"] == "data:audio/wav;base64,AAAA"
    assert [link["href"] for link in kept("a")] == ["#there", "../report.html", "https://example.org"]


def test_a_style_sheet_reaches_only_its_own_output():
    """D6: an output cannot hide the page around it."""
    soup = BeautifulSoup(_safe_html("<style>body, .x { display: none } } b { }</style><b>x</b>"), "html.parser")
    for line in soup.style.get_text().splitlines():
        selectors = line.partition("{")[0].split(",")
        assert all(selector.strip().startswith(f"#{soup.div['id']} ") for selector in selectors)


@pytest.mark.parametrize(
    ("make", "text", "block"),
    [
        (_safe_markdown, "so $x^2$ is", False),
        (_safe_markdown, "$$x^2$$", True),
        (_safe_latex, "$x^2$", False),
        (_safe_latex, "$\\displaystyle x^2$", True),  # as IPython.display.Math writes it
        (_safe_latex, "\\begin{equation}x^2\\end{equation}", True),
    ],
)
def test_equations_are_drawn_without_the_network(make, text, block):
    """F19: by hand, x squared is msup of mi x and mn 2."""
    html = make(text)
    start = html.index("<math")
    math = ElementTree.fromstring(html[start : html.index("</math>") + 7])
    (power,) = math.iter("msup")
    assert [(part.tag, part.text) for part in power] == [("mi", "x"), ("mn", "2")]
    assert (math.get("display") == "block") is block
    assert "$" not in html[:start]


@pytest.mark.parametrize(
    "tex", ["\\frac{1", "\\left(", "{" * 5000, "x" * 20_000, "\\href{javascript:evil}{x}", "a<b&c"]
)
def test_an_equation_that_is_none_is_shown_as_its_text(tex):
    html = _safe_markdown(f"before ${tex}$ after")
    assert html.startswith("<p>before ")
    assert html.rstrip().endswith("after</p>")
    assert "href" not in BeautifulSoup(html, "html.parser").p.attrs
    assert not BeautifulSoup(html, "html.parser").find_all(href=True)


def test_prices_in_a_text_are_no_equation_across_paragraphs():
    assert "<math" not in _safe_markdown("It costs \\$5.\n\nOr \\$6.")
    assert "5$" in _safe_markdown("It costs 5$.")


def test_attachments_are_in_the_page_and_a_missing_one_is_named():
    """F3: the page of a notebook whose attachment is missing is made."""
    attachments = {"my file.png": {"image/png": PIXEL}}
    source = '![one](attachment:my%20file.png) <img src="attachment:my file.png"> ![two](attachment:gone.png)'
    soup = BeautifulSoup(_safe_markdown(source, attachments), "html.parser")
    assert [image["src"] for image in soup("img")] == [f"data:image/png;base64,{PIXEL}"] * 2
    assert "[picture two is not in this notebook]" in soup.get_text()
