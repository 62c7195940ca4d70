"""The conversation: what the model is shown, what is kept, what is saved."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from helpers.base import WorkbookError
from helpers.generation import Chat, Sampling, generate, play
from helpers.models import PromptTooLong, context_tokens, encode

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLING = Sampling(temperature=1.0, max_new_tokens=6, seed=40)


@pytest.fixture
def chat(tiny_loaded):
    return Chat(tiny_loaded, system="Be brief.", sampling=SAMPLING)


def test_ask_gives_the_model_the_whole_history(chat, tiny_loaded):
    first = chat.ask("Hello?")
    second = chat.ask("And you?")
    text = f"System: Be brief.\nUser: Hello?\nFalcon: {first.text}\nUser: And you?\nFalcon:"
    expected = generate(tiny_loaded, text, replace(SAMPLING, seed=41))
    assert second.token_ids == expected.token_ids
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[-1]["content"] == second.text
    assert chat.last_reply is second


def test_a_repeated_question_is_drawn_anew_and_the_transcript_again_the_same(chat, tiny_loaded):
    questions = ["Same question"] * 3
    replies = [reply.text for reply in play(chat, questions)]
    assert len(set(replies)) == 3
    again = Chat(tiny_loaded, system="Be brief.", sampling=SAMPLING)
    assert [reply.text for reply in play(again, questions)] == replies
    assert again.messages == chat.messages


def test_turn_seeds_and_not_only_the_history_vary_the_replies(tiny_loaded):
    messages = [{"role": "user", "content": "Same question"}]
    texts = {generate(tiny_loaded, messages, replace(SAMPLING, seed=40 + turn)).text for turn in range(3)}
    assert len(texts) == 3


def test_stream_gives_what_ask_gives(chat, tiny_loaded):
    other = Chat(tiny_loaded, system="Be brief.", sampling=SAMPLING)
    for question in ("Hello?", "And you?"):
        assert "".join(chat.stream(question)) == other.ask(question).text
    assert chat.messages == other.messages
    assert chat.last_reply.token_ids == other.last_reply.token_ids


def test_an_interrupted_stream_leaves_nothing_behind(chat):
    chat.ask("Hello?")
    before, last = chat.messages, chat.last_reply
    pieces = chat.stream("And you?")
    next(pieces)
    assert chat.messages == before
    pieces.close()
    interrupted = chat.stream("And you?")
    next(interrupted)
    with pytest.raises(KeyboardInterrupt):
        interrupted.throw(KeyboardInterrupt())
    assert (chat.messages, chat.last_reply) == (before, last)
    chat.ask("And you?")
    assert len(chat.messages) == len(before) + 2


@pytest.mark.parametrize("call", [lambda chat: chat.ask("x"), lambda chat: list(chat.stream("x"))])
def test_a_failed_reply_leaves_nothing_behind(chat, call):
    def failing(*_):
        raise ZeroDivisionError

    hook = chat.loaded.model.register_forward_hook(failing)
    try:
        with pytest.raises(ZeroDivisionError):
            call(chat)
    finally:
        hook.remove()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


@pytest.mark.parametrize("call", ["ask", "stream"])
def test_bad_questions_are_refused_at_once(chat, call):
    with pytest.raises(WorkbookError, match="blank"):
        getattr(chat, call)(" \n")
    with pytest.raises(WorkbookError, match="must be a string"):
        getattr(chat, call)(3)
    with pytest.raises(PromptTooLong):
        getattr(chat, call)("word " * 200)
    assert len(chat.messages) == 1


def test_messages_are_a_copy(chat):
    chat.messages[0]["content"] = "changed"
    chat.messages.clear()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_reset_keeps_the_system_prompt_and_starts_the_seeds_again(chat):
    first = chat.ask("Hello?").text
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.last_reply is None
    assert chat.ask("Hello?").text == first


def test_a_system_prompt_is_optional(tiny_loaded):
    chat = Chat(tiny_loaded)
    assert chat.messages == []
    assert chat.prompt("Hi") == "User: Hi\nFalcon:"
    assert Chat(tiny_loaded, system="").prompt() == "User: \nFalcon:"  # A9


def test_the_inspector_shows_the_very_prompt_and_counts_the_tokens_left(chat, tiny_loaded):
    dropped = False
    for turn in range(9):
        question, left = f"Question {turn}, please", chat.tokens_left()
        prompt = chat.prompt(question)
        reply = chat.ask(question)
        assert reply.prompt_tokens == len(encode(tiny_loaded.tokenizer, prompt))
        everything = tiny_loaded.format.render([*chat.messages[:-2], {"role": "user", "content": question}])
        added = len(encode(tiny_loaded.tokenizer, everything)) - len(encode(tiny_loaded.tokenizer, chat_before(chat)))
        assert (prompt == everything) == (added <= left)
        assert prompt.startswith("System: Be brief.\nUser: Question")
        dropped = dropped or prompt != everything
    assert dropped
    assert chat.tokens_left() < 0
    assert len(chat.messages) == 19  # the transcript itself forgets nothing


def chat_before(chat: Chat) -> str:
    """The unfitted prompt with an empty question, as it was before the last turn."""
    return chat.loaded.format.render([*chat.messages[:-2], {"role": "user", "content": ""}])


def test_tokens_left_of_a_new_chat(chat, tiny_loaded):
    used = len(tiny_loaded.tokenizer.encode("System: Be brief.\nUser: \nFalcon:"))
    assert chat.tokens_left() == context_tokens(tiny_loaded) - 6 - used


def test_save_and_load_go_on_where_the_conversation_was(chat, tiny_loaded, tmp_path):
    chat.ask("Ünïcode 🦅?")
    path = tmp_path / "chat.json"
    chat.save(path)
    text = path.read_text(encoding="utf-8")
    assert "Ünïcode 🦅?" in text
    assert json.loads(text)["model"] == "tests/tiny-falcon"
    loaded = Chat.load(path, tiny_loaded)
    assert (loaded.messages, loaded.sampling, loaded.system) == (chat.messages, SAMPLING, "Be brief.")
    assert loaded.ask("And now?").text == chat.ask("And now?").text


def test_a_saved_chat_that_its_owner_closed_stays_closed(tiny_loaded, tmp_path):
    path = tmp_path / "chat.json"
    Chat(tiny_loaded).save(path)
    path.chmod(0o600)
    Chat(tiny_loaded, system="A secret.").save(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_new_chat_is_saved_and_loaded(tiny_loaded, tmp_path):
    Chat(tiny_loaded).save(tmp_path / "new.json")
    assert Chat.load(tmp_path / "new.json", tiny_loaded).messages == []


@pytest.mark.parametrize(
    "change",
    [
        {"turns": [{"role": "user", "content": "no reply"}]},
        {"turns": [{"role": "system", "content": "s"}, *[{"role": r, "content": "x"} for r in ("user", "assistant")]]},
        {"turns": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]},
        {"turns": "text"},
        {"turns": None},
        {"system": 5},
        {"sampling": {"unknown": 1}},
        {"sampling": None},
    ],
)
def test_a_damaged_file_is_refused(chat, tiny_loaded, tmp_path, change):
    path = tmp_path / "chat.json"
    chat.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WorkbookError, match=r"chat\.json is not a conversation"):
        Chat.load(path, tiny_loaded)


def test_files_that_are_no_conversation_at_all(tiny_loaded, tmp_path):
    (tmp_path / "x.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "other.json").write_text("{}")
    for name in ("x.json", "list.json", "other.json"):
        with pytest.raises(WorkbookError, match="is not a conversation"):
            Chat.load(tmp_path / name, tiny_loaded)
    with pytest.raises(WorkbookError, match="no saved conversation at"):
        Chat.load(tmp_path / "missing.json", tiny_loaded)


def test_play_shows_each_reply_as_it_comes(chat):
    shown = []
    replies = play(chat, ["One?", "Two?"], lambda question, reply: shown.append((question, reply, len(chat.messages))))
    assert shown == [("One?", replies[0], 3), ("Two?", replies[1], 5)]


def writing(loaded, *texts):
    """The model, whose logits are forced so that it writes these texts, one for each prompt."""
    model = copy.deepcopy(loaded.model)
    rows = iter([[*loaded.tokenizer.encode(text, split_special_tokens=True), 0] for text in texts])
    left = []

    def force(_module, _inputs, options, output):
        if options["input_ids"].shape[1] > 1:  # a prompt is read
            left[:] = next(rows)
        output.logits = torch.full_like(output.logits, -1e4)
        output.logits[:, -1, left.pop(0)] = 0
        return output

    model.register_forward_hook(force, with_kwargs=True)
    return replace(loaded, model=model)


GREEDY = Sampling(temperature=0, max_new_tokens=12)


def test_the_history_holds_what_the_format_was_trained_on(tiny_loaded):
    """A4"""
    chat = Chat(writing(tiny_loaded, " Fine.\n\nUser: x", "\n I see. "), sampling=GREEDY)
    assert chat.ask("How are you?").text == "Fine."
    assert "".join(chat.stream("And now?")) == "I see."
    assert chat.prompt("So?") == "User: How are you?\nFalcon: Fine.\nUser: And now?\nFalcon: I see.\nUser: So?\nFalcon:"


@pytest.mark.parametrize("nothing", ["\nUser: x", "", " \n ", "\u200b", "\u00a0\nUser:"])
def test_a_blank_reply_is_kept_in_the_transcript_and_not_shown_to_the_model(tiny_loaded, tmp_path, nothing):
    """A3, A4: and the seeds count it, so that the same question is not drawn alike for ever."""
    chat = Chat(writing(tiny_loaded, " Fine.", nothing), system="S", sampling=GREEDY)
    chat.ask("One?")
    chat.ask("Two?")
    assert chat.prompt("Three?") == "System: S\nUser: One?\nFalcon: Fine.\nUser: Three?\nFalcon:"
    assert [message["content"] for message in chat.messages] == ["S", "One?", "Fine."]
    assert [message["content"] for message in chat.transcript][:4] == ["S", "One?", "Fine.", "Two?"]
    assert chat._turn_sampling().seed == GREEDY.seed + 2
    chat.save(tmp_path / "chat.json")
    assert Chat.load(tmp_path / "chat.json", tiny_loaded).transcript == chat.transcript


def test_turns_with_a_blank_reply_are_not_shown_to_the_model(tiny_loaded):
    """A3: also in messages that a caller keeps."""
    question = {"role": "user", "content": "Two?"}
    blank = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "\u200b"}, question]
    assert generate(tiny_loaded, blank, GREEDY).prompt_tokens == generate(tiny_loaded, [question], GREEDY).prompt_tokens


@pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u00a0", "\u200b", "\ufeff\u2060"])
def test_a_blank_question_is_refused(tiny_loaded, blank):
    """A3"""
    with pytest.raises(WorkbookError, match="blank"):
        Chat(tiny_loaded).ask(blank)
    with pytest.raises(WorkbookError, match="blank"):
        generate(tiny_loaded, [{"role": "user", "content": blank}], GREEDY)


@pytest.mark.parametrize("fault", ["a half character", "a folder in its place", "no folder"])
def test_what_cannot_be_saved_leaves_the_earlier_file_as_it_was(fault, tiny_loaded, tmp_path):
    """A7"""
    path = tmp_path / "chat.json"
    Chat(tiny_loaded, system="Be brief.", sampling=SAMPLING).save(path)
    earlier = path.read_bytes()
    system, target = "Be brief.", path
    if fault == "a half character":
        system = "Be \ud83d."
    elif fault == "a folder in its place":
        target = tmp_path
    else:
        target = tmp_path / "none" / "chat.json"
    with pytest.raises(WorkbookError, match=r"was not saved to|Cannot write"):
        Chat(tiny_loaded, system=system, sampling=SAMPLING).save(target)
    assert path.read_bytes() == earlier
    assert [file.name for file in tmp_path.iterdir()] == ["chat.json"]


def test_a_half_character_is_refused_with_a_sentence(chat):
    """A7: a message, a raw prompt."""
    for ask in (lambda: chat.ask("Hi \udc80"), lambda: generate(chat.loaded, "Hi \udc80")):
        with pytest.raises(WorkbookError, match="half of a surrogate pair"):
            ask()
    assert len(chat.messages) == 1
