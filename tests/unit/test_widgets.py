"""The panels, driven through their own controls against a small random Falcon; and the HTML pieces."""

import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from helpers import widgets
from helpers.chat import Chat
from helpers.memory import estimate, hardware_claims, published_config
from helpers.prompts import format_for
from helpers.types import ModelRef, Reply, Sampling

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'too'"
LIMIT = 20

pytestmark = pytest.mark.usefixtures("one_thread")


class Elements(HTMLParser):
    """The elements of a piece of HTML, its visible text, and whether every element is closed."""

    VOID = ("br", "img")

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check_harmless(source):
    """Only text elements and plain attributes; both colours set wherever one is."""
    elements = Elements(source)
    assert set(elements.tags) <= {"div", "span", "b", "br", "details", "summary", "table", "tr", "th", "td"}
    assert {name for name, _ in elements.attributes} <= {"style", "title"}
    for style in (value for name, value in elements.attributes if name == "style"):
        assert "url(" not in style
        assert ("background:" in style) == (";color:" in style)
    return elements


@pytest.fixture
def falcon(tiny_loaded):
    ref = ModelRef("falcon-tiny", "falcon", "falcon-chat", stand_in_for="falcon-180B-chat")
    return replace(tiny_loaded, ref=ref)


@pytest.fixture
def chat(falcon):
    return Chat(falcon, system="Be brief.", sampling=Sampling(max_new_tokens=LIMIT, seed=1))


@pytest.fixture
def panel(chat):
    return widgets.ChatPanel(chat, ["Hello", "How are you?"])


def say(panel, text):
    panel.text.value = text
    panel.send.click()


# HTML pieces


def test_a_transcript_escapes_what_people_and_models_write():
    messages = [{"role": role, "content": f"{role} {EVIL}"} for role in ("system", "user", "assistant")]
    elements = check_harmless(widgets.transcript_html(messages, assistant=EVIL, footer=EVIL))
    assert elements.text.count(EVIL) == 5
    assert elements.text.index("system <") < elements.text.index("user <") < elements.text.index("assistant <")


def test_a_transcript_keeps_line_breaks_and_names_the_speakers():
    elements = check_harmless(widgets.transcript_html([{"role": "assistant", "content": " one\ntwo"}]))
    assert elements.text == "Falconone\ntwo"
    assert any("white-space:pre-wrap" in value for _, value in elements.attributes)


def test_tokens_show_ids_spaces_and_line_ends(falcon):
    text = "Hello there,\n<b>you</b>"
    ids = falcon.tokenizer.encode(text)
    elements = check_harmless(widgets.tokens_html(falcon.tokenizer, ids))
    assert [value for name, value in elements.attributes if name == "title"] == [f"id {token}" for token in ids]
    assert elements.text == "Hello␣there,↵<b>you</b>" + f"{len(ids)} tokens"
    assert elements.tags.count("br") == 1


def test_neighbouring_tokens_differ_in_colour(falcon):
    elements = check_harmless(widgets.tokens_html(falcon.tokenizer, [5, 5, 5]))
    colours = [value.split(";")[0] for name, value in elements.attributes if value.startswith("background")]
    assert colours[0] != colours[1] != colours[2]


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("falcon-chat", ["System:", "User:", "Falcon:", "User:", "Falcon:"]),
        ("llama-2", ["<s>", "[INST]", "<<SYS>>", "<</SYS>>", "[/INST]", "</s>", "<s>", "[INST]", "[/INST]"]),
        ("chatml", ["<|im_start|>system", "<|im_end|>", "<|im_start|>user", "<|im_end|>", "<|im_start|>assistant"] * 2),
        ("plain", []),
    ],
)
def test_a_prompt_shows_its_literal_text_with_the_role_tags_highlighted(name, tags):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "u1 User: no tag"},
        {"role": "assistant", "content": EVIL},
        {"role": "user", "content": "u2"},
    ]
    text = format_for(name).render(messages)
    source = widgets.prompt_html(text, name, tokens=1)
    assert check_harmless(source).text == text + "1 token"
    marked = [part.split(">", 1)[1].split("</b>")[0] for part in source.split("<b ")[1:]]
    expected = tags if name != "chatml" else [*tags[:5], "<|im_end|>", "<|im_start|>user", "<|im_end|>", tags[4]]
    assert [Elements(mark).text for mark in marked] == expected


def test_html_shows_itself_and_reads_as_text():
    piece = widgets.prompt_html("User: a < b", "falcon-chat")
    assert piece._repr_html_() == str(piece)
    assert " ".join(repr(piece).split()) == "User: a < b"


def test_show_decides_by_the_kind_of_run(monkeypatch):
    assert widgets.show(lambda: "live", lambda: "static") == "live"
    monkeypatch.setenv("WORKBOOK_UNATTENDED", "1")
    assert widgets.show(lambda: "live", lambda: "static") == "static"


# The chat panel


def test_a_question_gets_the_reply_that_the_chat_would_give(panel, falcon):
    say(panel, "Hello")
    assert panel.busy
    panel.wait(30)
    twin = Chat(falcon, system="Be brief.", sampling=Sampling(max_new_tokens=LIMIT, seed=1))
    reply = twin.ask("Hello")
    assert panel.chat.messages == twin.messages
    assert panel.conversation.value == widgets.scrolled(widgets.transcript_html(twin.messages))
    assert panel.status.value.startswith(f"{reply.tokens} tokens, ")
    assert f"{twin.tokens_left()} tokens left of the context" in panel.status.value
    assert panel.text.value == ""


def test_enter_sends_the_text_that_the_browser_delivers_just_after_it(panel):
    panel.text._handle_custom_msg({"event": "submit"}, [])
    panel.text.value = "Hello"
    panel.wait(30)
    assert [message["content"] for message in panel.chat.messages if message["role"] == "user"] == ["Hello"]


def test_a_blank_question_is_not_sent(panel):
    say(panel, "  ")
    assert not panel.busy
    assert len(panel.chat.messages) == 1


def test_the_controls_are_off_while_a_reply_is_written(panel):
    say(panel, "Hello")
    states = [control.disabled for control in (panel.send, panel.reset, panel.save, panel.temperature, panel.stop)]
    panel.wait(30)
    assert states == [True, True, True, True, False]
    assert [control.disabled for control in (panel.send, panel.reset, panel.stop)] == [False, False, True]


def test_waiting_too_briefly_is_an_error(panel):
    say(panel, "Hello")
    with pytest.raises(TimeoutError, match="not finished after 0 s"):
        panel.wait(0)
    panel.wait(30)


def test_a_second_question_waits_for_the_first(panel):
    say(panel, "Hello")
    panel.text.value = "typed meanwhile"
    panel.ask()
    panel.wait(30)
    assert [message["content"] for message in panel.chat.messages if message["role"] == "user"] == ["Hello"]
    assert panel.text.value == "typed meanwhile"


def test_the_reply_appears_while_it_is_written(panel):
    panel.REDRAW_SECONDS = 0.0
    seen = []
    panel.conversation.observe(lambda change: seen.append(Elements(change["new"]).text), "value")
    say(panel, "Hello")
    panel.wait(30)
    growing = [text.split("Falcon")[1] for text in seen if text.endswith("▌")]
    assert len(growing) > 5
    assert [len(text) for text in growing] == sorted(len(text) for text in growing)


def test_stop_ends_the_generation_itself(panel, falcon):
    forwards = []

    def slow_forward(*_):
        forwards.append(1)
        time.sleep(0.01)

    hook = falcon.model.register_forward_hook(slow_forward)
    panel.max_new_tokens.value = 100
    say(panel, "Tell me a long story")
    while len(forwards) < 5:
        time.sleep(0.001)
    panel.stop.click()
    panel.wait(10)
    done = len(forwards)
    time.sleep(0.1)
    hook.remove()
    assert 5 <= len(forwards) == done < 60
    assert panel.status.value.startswith("Stopped")
    assert "(stopped)" in panel.conversation.value
    assert "Tell me a long story" in panel.conversation.value
    assert len(panel.chat.messages) == 1
    assert panel.text.value == "Tell me a long story"


def test_after_a_stop_the_conversation_goes_on(panel):
    panel.max_new_tokens.value = 100
    say(panel, "First")
    panel.stop.click()
    panel.wait(10)
    panel.max_new_tokens.value = 5
    say(panel, "Second")
    panel.wait(30)
    assert [message["content"] for message in panel.chat.messages if message["role"] == "user"] == ["Second"]


def test_reset_forgets_the_turns_and_keeps_the_system_prompt(panel):
    say(panel, "Hello")
    panel.wait(30)
    panel.reset.click()
    assert panel.chat.messages == [{"role": "system", "content": "Be brief."}]
    assert "Hello" not in panel.conversation.value


def test_save_writes_a_conversation_that_loads(panel, falcon, tmp_path):
    say(panel, "Hello")
    panel.wait(30)
    panel.path.value = str(tmp_path / "chat.json")
    panel.save.click()
    assert Chat.load(tmp_path / "chat.json", falcon).messages == panel.chat.messages
    assert "Saved to" in panel.status.value


def test_a_file_that_cannot_be_written_is_reported(panel, tmp_path):
    panel.path.value = str(tmp_path / "no folder" / "chat.json")
    panel.save.click()
    assert "No such file" in panel.status.value
    check_harmless(panel.status.value)


def test_sliders_set_the_sampling_and_only_that(panel):
    panel.temperature.value, panel.top_p.value, panel.max_new_tokens.value = 0.0, 0.5, 7
    assert panel.chat.sampling == Sampling(temperature=0.0, top_p=0.5, max_new_tokens=7, seed=1)


def test_an_error_is_shown_and_the_question_comes_back(panel):
    question = "word " * 600 + EVIL
    say(panel, question)
    panel.wait(30)
    assert "shorten the question" in panel.status.value
    check_harmless(panel.status.value)
    assert panel.text.value == question.strip()
    assert not panel.busy


def test_the_prompt_inspector_shows_what_the_model_reads(panel, falcon):
    panel.inspector.selected_index = 0
    panel.text.value = EVIL
    prompt = f"System: Be brief.\nUser: {EVIL}\nFalcon:"
    tokens = len(falcon.tokenizer.encode(prompt))
    assert check_harmless(panel.prompt.value).text == f"{prompt}{tokens} tokens"
    panel.text.value = "word " * 600
    assert "shorten the question" in panel.prompt.value


def test_the_conversation_escapes_the_question(panel):
    panel.max_new_tokens.value = 3
    say(panel, EVIL)
    panel.wait(30)
    assert EVIL in check_harmless(panel.conversation.value).text


def test_the_panel_names_the_stand_in_and_offers_the_script(panel):
    assert "falcon-tiny (stand-in for falcon-180B-chat)" in panel.box.children[0].value
    assert panel.text.options == ("Hello", "How are you?")
    assert "application/vnd.jupyter.widget-view+json" in panel._repr_mimebundle_()


def test_a_summary_tells_tokens_speed_and_end():
    reply = Reply("x", tokens=11, seconds=1.5, first_token_seconds=0.5, finish_reason="length")
    assert widgets.reply_summary(reply) == "11 tokens, 10 tokens/s, first after 0.50 s; cut at the token limit"
    one = Reply("x", tokens=1, seconds=0.5, first_token_seconds=0.5, finish_reason="end")
    assert widgets.reply_summary(one) == "1 token, first after 0.50 s; ended by itself"


def test_unattended_the_script_is_played_by_the_model(chat, falcon, monkeypatch):
    monkeypatch.setenv("WORKBOOK_UNATTENDED", "1")
    view = widgets.chat_panel(chat, script=["Hello", EVIL])
    twin = Chat(falcon, system="Be brief.", sampling=Sampling(max_new_tokens=LIMIT, seed=1))
    replies = [twin.ask("Hello"), twin.ask(EVIL)]
    elements = check_harmless(view)
    assert all(reply.text.strip() in elements.text for reply in replies)
    assert f"2 replies, {sum(reply.tokens for reply in replies)} tokens" in elements.text
    assert "falcon-tiny (stand-in for falcon-180B-chat)" in elements.text
    assert twin.prompt() in elements.text


def test_attended_the_same_call_gives_the_panel(chat):
    assert isinstance(widgets.chat_panel(chat, script=["Hello"]), widgets.ChatPanel)


def test_a_saved_conversation_continues_in_a_panel(panel, falcon, tmp_path):
    say(panel, "Hello")
    panel.wait(30)
    panel.chat.save(tmp_path / "chat.json")
    assert len(json.loads((tmp_path / "chat.json").read_text())["turns"]) == 2
    again = widgets.ChatPanel(Chat.load(tmp_path / "chat.json", falcon))
    assert again.conversation.value == panel.conversation.value


# The memory planner


PUBLISHED = "tiiuae/falcon-180B"


def rows_of(source):
    """The table's rows as {part: GiB}."""
    rows = re.findall(r">([^<>]+)</th><td[^>]*>([0-9.,]+) GiB</td>", source)
    return {name: float(size.replace(",", "")) for name, size in rows}


@pytest.mark.parametrize(
    ("setup", "fits"),
    [
        (widgets.Setup(), True),
        (widgets.Setup(gpu_count=4), False),
        (widgets.Setup(precision="nf4", gpu_count=2), True),
        (widgets.Setup(precision="nf4", gpu_count=8, gpu_gb=40), True),
        (widgets.Setup(precision="nf4", gpu_count=1), False),
        (widgets.Setup(mode="full", gpu_count=64, batch_size=64), True),
        (widgets.Setup(mode="full", gpu_count=8), False),
        (widgets.Setup(model="tiiuae/falcon-7b", precision="nf4", gpu_count=1, gpu_gb=24), True),
    ],
)
def test_the_plan_agrees_with_the_machines_that_were_tried(setup, fits):
    planned = widgets.plan(setup)
    assert planned.placed.fits == fits
    assert widgets.verdict_text(planned).startswith("Fits on" if fits else "Does not fit on")
    assert planned.estimate == estimate(
        published_config(setup.model),
        setup.precision,
        mode=setup.mode,
        batch_size=setup.batch_size,
        context_tokens=setup.context_tokens,
    )


@pytest.mark.parametrize(
    ("mode", "precision", "claim"), [("full", "bf16", "A13"), ("lora", "bf16", "A14"), ("qlora", "nf4", "A15")]
)
@pytest.mark.parametrize("size", [40, 80])
def test_the_least_gpus_for_training_are_those_of_the_hardware_table(mode, precision, claim, size):
    least = int(hardware_claims().set_index("claim").loc[claim, f"least {size} GB GPUs"])

    def fits(count):
        setup = widgets.Setup(PUBLISHED, precision, mode, batch_size=count, gpu_gb=size, gpu_count=count)
        return widgets.plan(setup).placed.fits

    assert [fits(least - 1), fits(least)] == [False, True]


def test_the_table_shows_the_parts_in_gib():
    source = widgets.plan_html(widgets.plan(widgets.Setup()))
    assert check_harmless(source).text.startswith("tiiuae/falcon-180B, inference in bf16, 1 sequence of 2048 tokens")
    rows = rows_of(source)
    assert rows["weights"] == pytest.approx(178_557_088_768 * 2 / 2**30, abs=0.05)
    assert rows["KV cache"] == pytest.approx(4_751_360 * 2048 / 2**30, abs=0.05)
    assert rows["sum"] == pytest.approx(rows["weights"] + rows["KV cache"] + rows["activations"], abs=0.2)
    assert "gradients" not in rows


def test_moving_a_control_changes_table_and_figures():
    planner = widgets.MemoryPlanner(widgets.Setup())
    before = [picture.value for picture in planner.pictures]
    planner.controls["precision"].value = "nf4"
    planner.controls["gpu_count"].value = 1
    assert planner.setup == widgets.Setup(precision="nf4", gpu_count=1)
    assert rows_of(planner.table.value)["weights"] == pytest.approx(94.84, abs=0.1)
    assert "Does not fit on 1 GPU of 80 GB" in Elements(planner.table.value).text
    assert all(bytes(picture.value).startswith(b"\x89PNG") for picture in planner.pictures)
    assert before[0] != planner.pictures[0].value
    assert before[1] != planner.pictures[1].value


def test_what_does_not_go_together_is_explained_and_can_be_undone():
    planner = widgets.MemoryPlanner(widgets.Setup(precision="nf4"))
    planner.controls["mode"].value = "full"
    assert "choose mode='qlora' or bf16" in check_harmless(planner.table.value).text
    assert planner.figures.layout.display == "none"
    planner.controls["precision"].value = "bf16"
    assert "optimizer" in rows_of(planner.table.value)
    assert planner.figures.layout.display == "flex"


def test_the_figures_show_the_precisions_of_the_mode_and_the_machine():
    memory, placed = widgets.plan_figures(widgets.plan(widgets.Setup(mode="qlora", precision="nf4", gpu_count=2)))
    assert [tick.get_text() for tick in memory.axes[0].get_xticklabels()] == ["int8", "nf4"]
    assert memory.axes[0].lines[0].get_ydata()[0] == pytest.approx(160e9 / 2**30)
    assert all(PUBLISHED in figure.get_suptitle() for figure in (memory, placed))


def test_unattended_the_planner_is_a_table_and_two_figures(monkeypatch, capsys):
    monkeypatch.setenv("WORKBOOK_UNATTENDED", "1")
    views = widgets.memory_planner(widgets.Setup(gpu_count=4))
    assert "Does not fit on 4 GPUs" in views[0]
    assert [view._repr_png_()[0][:4] for view in views[1:]] == [b"\x89PNG"] * 2
    views._ipython_display_()
    assert "Does not fit on 4 GPUs" in capsys.readouterr().out


def test_attended_the_planner_has_a_control_for_every_setting():
    planner = widgets.memory_planner(widgets.Setup(gpu_gb=32, context_tokens=1000))
    assert planner.setup == widgets.Setup(gpu_gb=32, context_tokens=1000)
    assert "application/vnd.jupyter.widget-view+json" in planner._repr_mimebundle_()
