"""The panels, driven through their own controls against small Falcons; the HTML pieces; the curve in a real kernel."""

import base64
import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from helpers import evaluation, figures, models, panels, training
from helpers.base import WorkbookError
from helpers.base.files import ROOT
from helpers.generation import Chat, Reply, Sampling, generate, stream
from helpers.machine import Workload, estimate, hardware_claims, published_config
from helpers.models import ModelRef, format_for, load_profile
from helpers.panels import comparison, html
from helpers.panels.chat import _ChatPanel
from helpers.panels.memory import _MemoryPlanner, _plan, _plan_figures, _plan_html, _Setup, _verdict_text

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
    return _ChatPanel(chat, ["Hello", "How are you?"])


def say(panel, text):
    panel.text.value = text
    panel.send.click()


# HTML pieces


def test_a_transcript_escapes_what_people_and_models_write():
    messages = [{"role": role, "content": f"{role} {EVIL}"} for role in ("system", "user", "assistant")]
    elements = check_harmless(html._transcript_html(messages, assistant=EVIL, footer=EVIL))
    assert elements.text.count(EVIL) == 5
    assert elements.text.index("system <") < elements.text.index("user <") < elements.text.index("assistant <")


def test_a_transcript_keeps_line_breaks_and_names_the_speakers():
    elements = check_harmless(html._transcript_html([{"role": "assistant", "content": " one\ntwo"}]))
    assert elements.text == "Falconone\ntwo"
    assert any("white-space:pre-wrap" in value for _, value in elements.attributes)


def test_tokens_show_ids_spaces_and_line_ends(falcon):
    text = "Hello there,\n<b>you</b>"
    ids = falcon.tokenizer.encode(text)
    elements = check_harmless(panels.tokens_html(falcon.tokenizer, ids))
    assert [value for name, value in elements.attributes if name == "title"] == [f"id {token}" for token in ids]
    assert elements.text == "Hello␣there,↵<b>you</b>" + f"{len(ids)} tokens"
    assert elements.tags.count("br") == 1


def test_neighbouring_tokens_differ_in_colour(falcon):
    elements = check_harmless(panels.tokens_html(falcon.tokenizer, [5, 5, 5]))
    colours = [value.split(";")[0] for name, value in elements.attributes if value.startswith("background")]
    assert colours[0] != colours[1] != colours[2]


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("falcon-chat", ["System:", "User:", "Falcon:", "User:", "Falcon:"]),
        ("falcon-instruct", ["User:", "Assistant:", "User:", "Assistant:"]),
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
    source = html._prompt_html(text, name, tokens=1)
    assert check_harmless(source).text == text + "1 token"
    marked = [part.split(">", 1)[1].split("</b>")[0] for part in source.split("<b ")[1:]]
    expected = tags if name != "chatml" else [*tags[:5], "<|im_end|>", "<|im_start|>user", "<|im_end|>", tags[4]]
    assert [Elements(mark).text for mark in marked] == expected


def test_html_shows_itself_and_reads_as_text():
    piece = html._prompt_html("User: a < b", "falcon-chat")
    assert piece._repr_html_() == str(piece)
    assert " ".join(repr(piece).split()) == "User: a < b"


def test_show_decides_by_the_kind_of_run(monkeypatch):
    assert html._show(lambda: "live", lambda: "static") == "live"
    monkeypatch.setenv("WORKBOOK_UNATTENDED", "1")
    assert html._show(lambda: "live", lambda: "static") == "static"


# The chat panel


def test_a_question_gets_the_reply_that_the_chat_would_give(panel, falcon):
    say(panel, "Hello")
    assert panel.busy
    panel.wait(30)
    twin = Chat(falcon, system="Be brief.", sampling=Sampling(max_new_tokens=LIMIT, seed=1))
    reply = twin.ask("Hello")
    assert panel.chat.messages == twin.messages
    assert panel.conversation.value == html._scrolled(html._transcript_html(twin.messages))
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
    assert "Shorten the question" in panel.status.value
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
    assert "Shorten the question" in panel.prompt.value


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
    assert html._reply_summary(reply) == "11 tokens, 10 tokens/s, first after 0.50 s; cut at the token limit"
    one = Reply("x", tokens=1, seconds=0.5, first_token_seconds=0.5, finish_reason="end")
    assert html._reply_summary(one) == "1 token, first after 0.50 s; ended by itself"


def test_unattended_the_script_is_played_by_the_model(chat, falcon, monkeypatch):
    monkeypatch.setenv("WORKBOOK_UNATTENDED", "1")
    view = panels.chat_panel(chat, script=["Hello", EVIL])
    twin = Chat(falcon, system="Be brief.", sampling=Sampling(max_new_tokens=LIMIT, seed=1))
    replies = [twin.ask("Hello"), twin.ask(EVIL)]
    elements = check_harmless(view)
    assert all(reply.text.strip() in elements.text for reply in replies)
    assert f"2 replies, {sum(reply.tokens for reply in replies)} tokens" in elements.text
    assert "falcon-tiny (stand-in for falcon-180B-chat)" in elements.text
    assert twin.prompt() in elements.text


def test_attended_the_same_call_gives_the_panel(chat):
    assert isinstance(panels.chat_panel(chat, script=["Hello"]), _ChatPanel)


def test_a_saved_conversation_continues_in_a_panel(panel, falcon, tmp_path):
    say(panel, "Hello")
    panel.wait(30)
    panel.chat.save(tmp_path / "chat.json")
    assert len(json.loads((tmp_path / "chat.json").read_text())["turns"]) == 2
    again = _ChatPanel(Chat.load(tmp_path / "chat.json", falcon))
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
        (_Setup(), True),
        (_Setup(gpu_count=4), False),
        (_Setup(precision="nf4", gpu_count=2), True),
        (_Setup(precision="nf4", gpu_count=8, gpu_gb=40), True),
        (_Setup(precision="nf4", gpu_count=1), False),
        (_Setup(mode="full", gpu_count=64, batch_size=64), True),
        (_Setup(mode="full", gpu_count=8), False),
        (_Setup(model="tiiuae/falcon-7b", precision="nf4", gpu_count=1, gpu_gb=24), True),
    ],
)
def test_the_plan_agrees_with_the_machines_that_were_tried(setup, fits):
    planned = _plan(setup)
    assert planned.placed.fits == fits
    assert _verdict_text(planned).startswith("Fits on" if fits else "Does not fit on")
    assert planned.estimate == estimate(
        published_config(setup.model),
        setup.precision,
        mode=setup.mode,
        workload=Workload(setup.batch_size, setup.context_tokens),
    )


@pytest.mark.parametrize(
    ("mode", "precision", "claim"), [("full", "bf16", "A13"), ("lora", "bf16", "A14"), ("qlora", "nf4", "A15")]
)
@pytest.mark.parametrize("size", [40, 80])
def test_the_least_gpus_for_training_are_those_of_the_hardware_table(mode, precision, claim, size):
    least = int(hardware_claims().set_index("claim").loc[claim, f"least {size} GB GPUs"])

    def fits(count):
        setup = _Setup(PUBLISHED, precision, mode, batch_size=count, gpu_gb=size, gpu_count=count)
        return _plan(setup).placed.fits

    assert [fits(least - 1), fits(least)] == [False, True]


def test_the_table_shows_the_parts_in_gib():
    source = _plan_html(_plan(_Setup()))
    assert check_harmless(source).text.startswith("tiiuae/falcon-180B, inference in bf16, 1 sequence of 2048 tokens")
    rows = rows_of(source)
    assert rows["weights"] == pytest.approx(178_557_088_768 * 2 / 2**30, abs=0.05)
    assert rows["KV cache"] == pytest.approx(163_840 * 2048 / 2**30, abs=0.05)
    assert rows["sum"] == pytest.approx(rows["weights"] + rows["KV cache"] + rows["activations"], abs=0.2)
    assert "gradients" not in rows


def test_moving_a_control_changes_table_and_figures():
    planner = _MemoryPlanner(_Setup())
    before = [picture.value for picture in planner.pictures]
    planner.controls["precision"].value = "nf4"
    planner.controls["gpu_count"].value = 1
    assert planner.setup == _Setup(precision="nf4", gpu_count=1)
    assert rows_of(planner.table.value)["weights"] == pytest.approx(94.84, abs=0.1)
    assert "Does not fit on 1 GPU of 80 GB" in Elements(planner.table.value).text
    assert all(bytes(picture.value).startswith(b"\x89PNG") for picture in planner.pictures)
    assert before[0] != planner.pictures[0].value
    assert before[1] != planner.pictures[1].value


def test_what_does_not_go_together_is_explained_and_can_be_undone():
    planner = _MemoryPlanner(_Setup(precision="nf4"))
    planner.controls["mode"].value = "full"
    assert "Choose mode='qlora' or bf16" in check_harmless(planner.table.value).text
    assert planner.figures.layout.display == "none"
    planner.controls["precision"].value = "bf16"
    assert "optimizer" in rows_of(planner.table.value)
    assert planner.figures.layout.display == "flex"


def test_the_figures_show_the_precisions_of_the_mode_and_the_machine():
    memory, placed = _plan_figures(_plan(_Setup(mode="qlora", precision="nf4", gpu_count=2)))
    assert [tick.get_text() for tick in memory.axes[0].get_xticklabels()] == ["int8", "nf4"]
    assert memory.axes[0].lines[0].get_ydata()[0] == pytest.approx(160e9 / 2**30)
    assert all(PUBLISHED in figure.get_suptitle() for figure in (memory, placed))


def test_unattended_the_planner_is_a_table_and_two_figures(monkeypatch, capsys):
    monkeypatch.setenv("WORKBOOK_UNATTENDED", "1")
    views = panels.memory_planner(_Setup(gpu_count=4))
    assert "Does not fit on 4 GPUs" in views[0]
    assert [view._repr_png_()[0][:4] for view in views[1:]] == [b"\x89PNG"] * 2
    views._ipython_display_()
    assert "Does not fit on 4 GPUs" in capsys.readouterr().out


def test_attended_the_planner_has_a_control_for_every_setting():
    planner = panels.memory_planner(_Setup(gpu_gb=32, context_tokens=1000))
    assert planner.setup == _Setup(gpu_gb=32, context_tokens=1000)
    assert "application/vnd.jupyter.widget-view+json" in planner._repr_mimebundle_()


# The comparison panel


GREEDY = Sampling(temperature=0, max_new_tokens=12)
QUESTION = "Is a dog an animal? Answer yes or no."
LONG = "What is the capital of France? Answer with its name only."  # the small chat model repeats itself here


@pytest.fixture(scope="module")
def minis():
    """The profile's small Falcons: the one that chats, and the base model, which has no chat format."""
    profile = load_profile("laptop")
    return {"chat": models.load(profile.falcon_chat, "fp32"), "base": models.load(profile.falcon, "fp32")}


@pytest.fixture
def refs(minis):
    return {side: loaded.ref for side, loaded in minis.items()}


@pytest.fixture
def comparing(minis):
    return comparison._ComparisonPanel(minis, GREEDY, [QUESTION])


@pytest.fixture
def slowly(falcon):
    """The forward passes of the random Falcon, each of which takes a moment."""
    forwards = []

    def slow_forward(*_):
        forwards.append(1)
        time.sleep(0.01)

    hook = falcon.model.register_forward_hook(slow_forward)
    yield forwards
    hook.remove()


def asked(loaded, question=QUESTION, sampling=GREEDY):
    return generate(loaded, [{"role": "user", "content": question}], sampling)


def shown(panel):
    return {side: check_harmless(column.view.value).text for side, column in panel.columns.items()}


def followed(panel):
    """(side, text) each time a column is drawn, from now on."""
    panel.REDRAW_SECONDS = 0.0
    seen = []
    for side, column in panel.columns.items():
        column.view.observe(lambda change, side=side: seen.append((side, Elements(change["new"]).text)), "value")
    return seen


def test_each_model_answers_the_same_question_in_its_own_format(comparing, minis):
    say(comparing, QUESTION)
    assert comparing.busy
    comparing.wait(60)
    texts = shown(comparing)
    for side, loaded in minis.items():
        reply = asked(loaded)
        assert comparing.replies[side].token_ids == reply.token_ids
        summary = html._reply_summary(comparing.replies[side])
        assert texts[side] == f"{loaded.ref.name}{reply.text.strip()}{summary}"
    assert texts["chat"] != texts["base"]
    assert check_harmless(comparing.question.value).text == f"Question{QUESTION}"
    assert "at the same time" in comparing.status.value
    assert comparing.text.value == ""


def test_the_replies_advance_in_turn(comparing, minis):
    counts = dict.fromkeys(minis, 0)
    gaps, seen = [], followed(comparing)
    say(comparing, LONG)
    comparing.wait(60)
    message = [{"role": "user", "content": LONG}]
    pieces = {side: len(list(stream(loaded, message, GREEDY))) for side, loaded in minis.items()}
    for side, text in seen:
        if text.endswith("▌"):
            counts[side] += 1
            gaps.append(abs(counts["chat"] - counts["base"]))
    assert min(pieces.values()) > 5
    assert all(counts[side] >= pieces[side] - 1 for side in minis)
    assert max(gaps[: 2 * min(pieces.values()) - 2]) == 1


def test_the_same_model_may_stand_on_both_sides(minis):
    panel = comparison._ComparisonPanel({"one": minis["chat"], "two": minis["chat"]}, GREEDY)
    say(panel, QUESTION)
    panel.wait(60)
    assert [column.name for column in panel.columns.values()] == ["one", "two"]
    assert panel.replies["one"].text == panel.replies["two"].text == asked(minis["chat"]).text


def test_every_question_is_a_fresh_one(comparing, minis):
    for question in ("Name an animal.", QUESTION):
        say(comparing, question)
        comparing.wait(60)
    assert comparing.replies["chat"].token_ids == asked(minis["chat"]).token_ids
    assert "Name an animal" not in comparing.question.value


def test_models_given_by_name_are_loaded_one_after_the_other(refs, minis):
    panel = comparison._ComparisonPanel(refs, GREEDY, precision="fp32")
    said, seen = [], followed(panel)
    panel.status.observe(lambda change: said.append(change["new"]), "value")
    say(panel, QUESTION)
    panel.wait(60)
    loads = [f"loading {ref.label} in fp32 ..." for ref in refs.values()]
    assert said == [loads[0], "writing ...", loads[1], "writing ...", "Done."]
    order = [side for side, text in seen if text.endswith("▌")]
    assert order == sorted(order, reverse=True)
    assert set(order) == {"chat", "base"}
    assert {side: reply.text for side, reply in panel.replies.items()} == {
        side: asked(loaded).text for side, loaded in minis.items()
    }


def test_stop_ends_both_generations(falcon, slowly):
    panel = comparison._ComparisonPanel({"left": falcon, "right": falcon}, replace(GREEDY, max_new_tokens=100))
    say(panel, "Tell me a long story")
    while len(slowly) < 10:
        time.sleep(0.001)
    panel.stop.click()
    panel.wait(10)
    done = len(slowly)
    time.sleep(0.1)
    assert len(slowly) == done < 60
    assert all(text.endswith("Stopped.") and "▌" not in text for text in shown(panel).values())
    assert (panel.status.value, panel.replies, panel.busy) == ("Stopped.", {}, False)
    assert panel.text.value == "Tell me a long story"


def test_after_a_stop_no_further_model_is_loaded(falcon, refs):
    panel = comparison._ComparisonPanel({"first": falcon, "second": refs["chat"]}, GREEDY)
    said = []
    panel.status.observe(lambda change: said.append(change["new"]), "value")
    panel.status.observe(lambda change: panel.stop.click(), "value")
    say(panel, QUESTION)
    panel.wait(60)
    assert said == ["writing ...", "Stopped."]
    assert shown(panel)["second"] == refs["chat"].name


def test_a_question_too_long_for_one_model_is_answered_by_the_other(falcon, minis):
    panel = comparison._ComparisonPanel({"short": falcon, "long": minis["chat"]}, GREEDY)
    question = "word " * 150 + EVIL
    say(panel, question)
    panel.wait(60)
    texts = shown(panel)
    assert "Shorten the question" in texts["short"]
    assert texts["long"].endswith(html._reply_summary(panel.replies["long"]))
    assert list(panel.replies) == ["long"]
    assert "the reason stands in its column" in panel.status.value
    assert EVIL in check_harmless(panel.question.value).text
    assert panel.text.value == question.strip()


def test_a_model_that_cannot_be_loaded_does_not_stop_the_other(minis):
    missing = ModelRef("env/models/none <b>", "falcon", "falcon-chat", "embedded")
    panel = comparison._ComparisonPanel({"none": missing, "chat": minis["chat"]}, GREEDY)
    say(panel, QUESTION)
    panel.wait(60)
    with pytest.raises(WorkbookError) as error:
        models.load(missing)
    assert shown(panel)["none"].endswith(str(error.value))
    assert panel.replies["chat"].text == asked(minis["chat"]).text


def test_the_sliders_set_the_sampling_of_the_comparison(comparing):
    comparing.temperature.value, comparing.top_p.value, comparing.max_new_tokens.value = 0.8, 0.5, 3
    assert comparing.sampling == Sampling(temperature=0.8, top_p=0.5, max_new_tokens=3, seed=0)
    say(comparing, "Tell me a story.")
    states = [control.disabled for control in (comparing.send, comparing.top_p, comparing.stop)]
    comparing.wait(60)
    assert states == [True, True, False]
    assert {reply.tokens for reply in comparing.replies.values()} == {3}


def test_the_comparison_names_the_stand_ins_and_wraps_in_a_narrow_window(comparing):
    title, _, row, *_ = comparing.box.children
    assert "<b>falcon-mini-chat</b> (stand-in for tiiuae/falcon-180B-chat)" in title.value
    assert "<b>falcon-mini</b> (stand-in for tiiuae/falcon-180B)" in title.value
    assert row.layout.flex_flow == "row wrap"
    assert row.children == tuple(column.view for column in comparing.columns.values())
    assert comparing.text.options == (QUESTION,)
    assert "application/vnd.jupyter.widget-view+json" in comparing._repr_mimebundle_()


def test_unattended_the_script_is_compared(minis, monkeypatch):
    assert isinstance(panels.comparison_panel(minis, GREEDY), comparison._ComparisonPanel)
    monkeypatch.setenv("WORKBOOK_UNATTENDED", "1")
    view = panels.comparison_panel(minis, GREEDY, script=[QUESTION, EVIL])
    text = check_harmless(view).text
    assert "falcon-mini-chat (stand-in for tiiuae/falcon-180B-chat)" in text
    places = [text.index(f"Question{question}") for question in (QUESTION, EVIL)]
    for question, part in zip((QUESTION, EVIL), (text[places[0] : places[1]], text[places[1] :]), strict=True):
        assert all(asked(loaded, question).text.strip() in part for loaded in minis.values())
    numbers = r"(\d+ tokens/s, \d+ characters/s, )?first token after \d\.\d\d s"
    assert re.search(
        f"Medians of 2 replies, written one at a time: falcon-mini-chat {numbers}; falcon-mini {numbers}$", text
    )


# Replies in a table


def reply(text, reason="end", tokens=5):
    return Reply(text, tokens=tokens, seconds=1.0, first_token_seconds=0.5, finish_reason=reason)


@pytest.fixture
def compared():
    items = (
        evaluation.Item("a", "kind", f"What? {EVIL}", ("dog",), ("cat",)),
        evaluation.Item("b", "kind", "Which?", ("dog",)),
        evaluation.Item("c", "story", "Tell me."),
    )
    replies = {
        "left": (reply("A dog."), reply(""), reply("one\n  two")),
        "right": (reply(f"A cat. {EVIL}"), reply("dog " * 30, "length"), reply("x" * 300 + " " + "y" * 300)),
    }
    names = {"left": "model <1>", "right": "model 2"}
    labels = {**names, "right": "model 2 (stand-in)"}
    return evaluation.Comparison(items, replies, labels, {"left": 1, "right": 1}, names)


def cells(source):
    return [Elements(cell).text for cell in re.findall(r"<t[hd] .*?>(.*?)</t[hd]>", source, re.DOTALL)]


def test_replies_stand_side_by_side_with_the_rules_verdicts_in_words(compared):
    source = panels.replies_html(compared)
    check_harmless(source)
    rows = cells(source)
    assert rows[:3] == ["question", "model <1>", "model 2(stand-in)"]
    assert rows[3:6] == [f"What? {EVIL}", "A dog.correct concise", f"A cat. {EVIL}wrong"]
    assert rows[6:9] == ["Which?", "(no text)no answer", f"{'dog ' * 29}dogcorrect cut at the token limit"]
    assert rows[9:11] == ["Tell me.", "one\n  two"]


def test_the_marks_are_those_of_the_comparison(compared):
    source = panels.replies_html(compared)
    classes = [word for side in compared.sides for word in compared.classes(side)]
    for mark, name in (("correct", "right"), ("wrong", "wrong"), ("no answer", "no answer")):
        assert source.count(f">{mark}</span>") == classes.count(name)
    concise = [verdict for side in compared.sides for verdict in compared.verdicts(side, "concise")]
    assert source.count(">concise</span>") == sum(concise) == 1


@pytest.mark.parametrize(
    ("text", "reason", "marks"),
    [
        ("A dog.", "end", "correct concise"),
        ("dog " * 13, "end", "correct long"),
        ("A dog.", "length", "correct cut at the token limit"),
        ("Ainit.", "end", "no answer"),
        ("cat " * 13, "length", "wrong cut at the token limit"),
    ],
)
def test_only_a_correct_reply_is_concise_or_long_and_a_cut_one_is_marked(text, reason, marks):
    item = evaluation.Item("a", "kind", "Which?", ("dog",), ("cat",))
    compared = evaluation.Comparison((item,), {"x": (reply(text, reason),)}, {"x": "model"}, {"x": 1})
    assert cells(panels.replies_html(compared))[-1] == f"{text.strip()}{marks}"


def test_a_reply_that_only_rules_score_is_marked_but_need_not_be_concise():
    from helpers.evaluation.rules import _Rule

    item = evaluation.Item("a", "arithmetic", "2 + 3?", rules=(_Rule("number", 5),))
    for text, mark in (("It is 5." + " So it is 5." * 9, "correct"), ("6", "wrong")):
        compared = evaluation.Comparison((item,), {"x": (reply(text),)}, {"x": "model"}, {"x": 1})
        assert cells(panels.replies_html(compared))[-1] == f"{text}{mark}"


def test_a_long_reply_is_cut_with_an_ellipsis(compared):
    assert cells(panels.replies_html(compared))[-1] == "x" * 300 + " " + "y" * 99 + " …"


def test_rows_choose_the_items_and_their_order(compared):
    assert cells(panels.replies_html(compared, [2, 1]))[3::3] == ["Tell me.", "Which?"]


# The tokens of an example


def test_the_tokens_that_carry_the_loss_are_told_apart(minis):
    loaded = minis["chat"]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"One\ntwo {EVIL}"},
        {"role": "assistant", "content": "First."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "A dog <b>."},
    ]
    example = training.examples(loaded, [messages])[1]
    elements = check_harmless(panels.trained_tokens_html(loaded.tokenizer, example))
    titles = [value for name, value in elements.attributes if name == "title"]
    pairs = zip(example.input_ids, example.roles, strict=True)
    assert titles == [f"id {token}, {role}" for token, role in pairs]
    styles = dict(zip(titles, [v for n, v in elements.attributes if "padding:1px 0" in v], strict=True))
    green = {title.split(", ")[1] for title, style in styles.items() if style.startswith(panels.TRAINED)}
    assert green == {"reply", "end"}
    tints = {style for title, style in styles.items() if not style.startswith(panels.TRAINED)}
    assert len(tints) == len({"system", "user", "assistant", "format"})
    strip = "".join(figures.visible(loaded.tokenizer.decode([token])) for token in example.input_ids)
    count = example.roles.count("reply")
    legend = f"{count + 1} of {len(titles)} tokens carry the loss: reply {count}, end 1"
    assert elements.text.startswith(strip + legend)
    assert elements.text.removeprefix(strip + legend).split(" ", 4) == [
        "format", "system", "user", "assistant", "reply, end"
    ]  # fmt: skip
    assert elements.tags.count("br") == strip.count("↵") > 3


# The curve of a training


CURVE = """
from helpers import figures, panels
curve = panels.LiveCurve(lambda history: figures.token_times(history, "model"))
curve.REDRAW_SECONDS = 0.0
for number in range(2, 5):
    curve.update([token + 1.0 for token in range(number)])
"""
FINISH = "curve.finish([1.0, 2.0, 4.0, 5.0])"


def test_a_notebook_keeps_one_figure_the_last():
    """The end may come in the cell of the curve or in a later one."""
    import papermill
    from nbformat.v4 import new_code_cell, new_notebook

    from helpers.runs.child import _Job, _kernel_manager, _Watcher

    notebook = papermill.execute_notebook(
        new_notebook(
            cells=[new_code_cell(source, metadata={"tags": []}) for source in (CURVE + FINISH, CURVE, FINISH)]
        ),
        None,
        kernel_name="python3",
        language="python",
        kernel_manager_class=_kernel_manager(_Watcher(_Job("", "", {}, 60, 60, ()), print)),
        progress_bar=False,
        cwd=str(ROOT),
    )
    (one,), (two,), nothing = (cell.outputs for cell in notebook.cells)
    assert nothing == []
    expected = figures.png(figures.token_times([1.0, 2.0, 4.0, 5.0], "model"))
    for output in (one, two):
        assert base64.b64decode(output["data"]["image/png"]) == expected


def test_the_curve_is_drawn_at_most_once_a_second_and_at_the_end(capsys):
    drawn = []
    curve = panels.LiveCurve(lambda history: drawn.append(len(history)) or html._Html(f"<b>{len(history)}</b>"))
    curve.REDRAW_SECONDS = 0.2
    history = []
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        history.append(training.Point(len(history), 1.0))
        curve.update(history)
        time.sleep(0.005)
    assert drawn[0] == 1
    assert 2 <= len(drawn) <= 3
    history.append(training.Point(len(history), 1.0))
    curve.finish(history)
    assert drawn[-1] == len(history)
    assert capsys.readouterr().out.split() == [f"<b>{number}</b>" for number in drawn]
