"""D6: a browser opens the page of a hostile notebook and asks the network for nothing. Skipped without Chromium."""

import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, writes

from helpers.runs import pages

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


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
