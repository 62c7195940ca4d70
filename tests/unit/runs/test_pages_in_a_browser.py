"""What a browser makes of a run's pages. Skipped without Chromium.

D6: it opens the page of a hostile notebook and asks the network for nothing. Solutions of exercises are folded.
"""

import re
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, writes

from helpers.base.files import ROOT
from helpers.runs import pages, rendering

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# ``innerText`` is the text that is rendered.
SHOW = "<script>document.body.setAttribute('data-seen', document.body.innerText)</script>"


@pytest.fixture
def asked():
    """The address of a server, and the list of what it was asked."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(204)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()


def browse(page, profile):
    """What the page is once it is loaded, as the browser writes it."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--virtual-time-budget=4000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_hostile_page_asks_the_network_for_nothing(tmp_path, asked):
    address, requests = asked
    hostile = (
        f'<meta http-equiv="refresh" content="0;url={address}/refresh"><img src="{address}/img">'
        f'<link rel="stylesheet" href="{address}/css"><link rel="preconnect" href="{address}">'
        f"<style>@import '{address}/import'; b {{ background: url({address}/background) }}</style>"
        f'<b style="background:url({address}/style)">x</b><iframe src="{address}/frame"></iframe>'
        f'<script>fetch("{address}/fetch"); location = "{address}/location"</script>'
        f'<svg><image href="{address}/svg"/><script>fetch("{address}/svg-script")</script></svg>'
        f'<video src="{address}/video" autoplay></video><object data="{address}/object"></object>'
        f'<form action="{address}/form"><input autofocus onfocus="this.form.submit()"></form>'
        f'<details open ontoggle="fetch(\'{address}/toggle\')">y</details><base href="{address}/base/">'
    )
    drawing = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{address}/drawing"/></svg>'
    outputs = [new_output("display_data", {kind: hostile}) for kind in ("text/html", "text/markdown")]
    outputs.append(new_output("display_data", {"image/svg+xml": drawing}))
    outputs.append(new_output("display_data", {"application/javascript": f"fetch('{address}/js')", "text/plain": "x"}))
    cells = [new_markdown_cell(f"# Seen\n\n{hostile}\n\n![x]({address}/markdown)"), new_code_cell("1", outputs=outputs)]
    run = tmp_path / "run"
    (run / "notebooks").mkdir(parents=True)
    (run / "notebooks" / "mine.ipynb").write_text(writes(new_notebook(cells=cells)), encoding="utf-8")
    pages._write_pages(run, ["mine"])
    seen = browse(run / "html" / "mine.html", tmp_path / "profile")
    assert "Seen" in seen
    assert requests == []
    # The same browser does ask for what a page without the policy holds: the test can fail.
    bare = tmp_path / "bare.html"
    bare.write_text(f'<img src="{address}/bare">', encoding="utf-8")
    browse(bare, tmp_path / "profile")
    assert requests == ["/bare"]
    # And the policy alone, without the cleaning, holds too.
    policy = (pages._TEMPLATES / "policy.html.j2").read_text(encoding="utf-8")
    unscripted = hostile.partition("<img")[2]
    (tmp_path / "policy.html").write_text(f"<html><head>{policy}</head><body><img{unscripted}</body></html>")
    browse(tmp_path / "policy.html", tmp_path / "profile")
    assert requests == ["/bare"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_solutions_are_folded_until_the_reader_opens_them(tmp_path):
    sources = sorted((ROOT / "notebooks" / "source").glob("*.py"))
    everything = new_notebook(cells=[cell for path in sources for cell in rendering._source_notebook(path).cells])
    (tmp_path / "run" / "notebooks").mkdir(parents=True)
    (tmp_path / "run" / "notebooks" / "all.ipynb").write_text(writes(everything), encoding="utf-8")
    pages._write_pages(tmp_path / "run", ["all"])
    page = tmp_path / "run" / "html" / "all.html"
    # The browser's own tree: a <details> that ended too early would leave the code outside of it.
    tree = BeautifulSoup(browse(page, tmp_path / "profile"), "html.parser")
    folds = [fold.extract() for fold in tree.find_all("details") if fold.summary.get_text() == "Solution"]
    numbers = [re.findall(r'check\("(.*?)"', fold.get_text()) for fold in folds]
    checks = [re.findall(r'check\("(.*?)"', c.source) for c in everything.cells if c.cell_type == "code"]
    assert numbers == [names for names in checks if names]
    lines = {" ".join(line.split()) for fold in folds for line in fold.pre.get_text().splitlines()}
    # Some lines, such as the checks, are outside of the solutions too.
    outside = " ".join(tree.get_text().split())
    solved = [line for line in lines if len(line) > 30 and line not in outside]
    assert len(solved) > 40
    # What the page shows, without and with the solutions opened. Only this copy of it may run a script.
    text = page.read_text(encoding="utf-8").replace("Content-Security-Policy", "x-none")
    for opened in (False, True):
        copy = page.with_name("seen.html")
        copy.write_text((text.replace("<details>", "<details open>") if opened else text) + SHOW, encoding="utf-8")
        shown = BeautifulSoup(browse(copy, tmp_path / "profile"), "html.parser").body["data-seen"]
        assert [line for line in solved if (line in " ".join(shown.split())) is not opened] == []
