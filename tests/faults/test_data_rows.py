"""Files of prompts, items, texts and conversations, as they are found: read if valid, refused by line if not."""

import copy
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from helpers.base.files import ROOT
from helpers.evaluation import Item, compare, is_correct, read_items, read_texts
from helpers.generation import Chat, Sampling, generate
from helpers.models import format_for, load_profile
from helpers.training import examples, read_conversations

from .judge import Fault, kept, refused, same, workbook

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello."}
READERS = {
    "items": (read_items, lambda n: {"id": f"i{n}", "kind": "a\u2028b", "question": "é?", "answer": ["x"]}),
    "texts": (read_texts, lambda n: {"text": f"{n} é\u2029\x85"}),
    "conversations": (read_conversations, lambda n: {"messages": [{**HI, "content": f"{n} \u2028é"}, HELLO]}),
}


def saved(folder, content):
    path = folder / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def as_lines(rows, end="\n", ascii_only=False):
    return end.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)


WRITTEN = {
    "A5-unicode-separators": as_lines,
    "A5-escaped": lambda rows: as_lines(rows, ascii_only=True),
    "A5-windows": lambda rows: "\ufeff" + as_lines(rows, "\r\n") + "\r\n\r\n",
    "A5-old-mac": lambda rows: as_lines(rows, "\r"),
    "A5-powershell": lambda rows: as_lines(rows, "\r\n").encode("utf-16"),
    "A5-utf16-big-endian": lambda rows: ("\ufeff" + as_lines(rows)).encode("utf-16-be"),
    "A5-utf32": lambda rows: as_lines(rows).encode("utf-32"),
    "A5-blank-lines": lambda rows: "\n\n \t\n" + as_lines(rows, "\n\n") + "\n \n",
    "A5-spaces-around": lambda rows: "  " + as_lines(rows, "  \n\t") + " ",
    "A5-array": json.dumps,
    "A5-array-marked-and-indented": lambda rows: "\ufeff\n" + json.dumps(rows, indent=2, ensure_ascii=False) + "\n",
    "A5-array-utf16": lambda rows: json.dumps(rows, ensure_ascii=False).encode("utf-16"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
def test_one_content_however_it_is_written(write, reader, tmp_path):
    read, row = READERS[reader]
    rows = [row(number) for number in range(3)]
    same(read(saved(tmp_path, write(rows))), read(saved(tmp_path, as_lines(rows))))


GOOD = as_lines([READERS["texts"][1](0)])
BROKEN = {
    "A5-latin1": ((GOOD + "\n" + GOOD + "\n").encode() + '{"text": "é"}'.encode("latin-1"), "line 3", "0xe9"),
    "A5-windows-1252": (GOOD.encode() + b"\n\n" + '{"text": "“"}'.encode("cp1252"), "line 3", "0x93"),
    "A5-utf16-cut": ((GOOD + "\n" + GOOD).encode("utf-16")[:-1], "line 2", "UTF-16"),
    "A5-raw-surrogate": (GOOD + '\n{"text": "\ud83d"}', "line 2", "0xed"),
    "A5-array-cut": (f"[{GOOD},\n{GOOD},\n" + '{"text": "a', "line 3", "Unterminated string"),
    "A5-array-in-array": (f"[{GOOD},\n[{GOOD}]]", "line 2", "a list"),
    "A5-zip": (b"PK\x03\x04\x14\x00\x08\x00\xff\xfe", "line 1", "not UTF-8"),
    "A5-web-page": ("<!DOCTYPE html>\n<html></html>", "2 of 2", "not valid JSON"),
    "A5-pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "3 of 3", "not valid JSON"),
    "A5-csv": ("text,label\nHello,1\n", "line 1", "not valid JSON"),
    "A5-python": (GOOD + "\n{'text': 'a'}", "line 2", "double quotes"),
    "A5-nan": (GOOD + '\n{"text": "a", "score": NaN}', "line 2", "NaN"),
    "A5-infinity": (GOOD + '\n{"text": "a", "score": -Infinity}', "line 2", "Infinity"),
    "A5-overflow": (GOOD + '\n{"text": "a", "score": 1e400}', "line 2", "too large"),
    "A5-many-digits": (GOOD + '\n{"text": "a", "score": ' + "9" * 5000 + "}", "line 2", "digits"),
    "A5-control-character": (GOOD + '\n{"text": "a\tb"}', "line 2", "control character"),
    "A7-half-in-a-value": (GOOD + '\n{"text": "\\udc00"}', "line 2", "half of a surrogate pair"),
    "A7-half-in-a-key": (GOOD + '\n{"text": "a", "\\ud800": 1}', "line 2", "half of a surrogate pair"),
    "A7-halves-in-wrong-order": (GOOD + '\n{"text": "\\ude00\\ud83d"}', "line 2", "half of a surrogate pair"),
    "A12-key-twice": (GOOD + '\n{"text": "a", "text": "b"}', "line 2", "'text' is there twice"),
    "A12-key-twice-inside": (GOOD + '\n{"text": "a", "m": [{"k": 1, "k": 1}]}', "line 2", "'k' is there twice"),
    "A12-deep-list": (GOOD + '\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2", "too deeply"),
    "A12-deep-object": (GOOD + "\n" + '{"text": ' * 100_000, "line 2", "too deeply"),
    "A12-deep-array": ("[" * 100_000, "line 1", "too deeply"),
    "A12-two-on-a-line": (GOOD + "\n" + GOOD + GOOD, "line 2", "Extra data"),
    "A3-blank-text": (GOOD + '\n{"text": "\\u200b\\u00a0 "}', "line 2", "blank"),
    "A6-null-text": (GOOD + '\n{"text": null}', "line 2", "null"),
    "A5-empty": ("", "is empty"),
    "A5-only-a-mark": ("\ufeff", "is empty"),
    "A5-empty-array": ("[ ]", "is empty"),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_what_is_not_valid_is_named(case, tmp_path):
    content, *words = case
    message = refused(lambda: read_texts(saved(tmp_path, content)), "rows.jsonl", *words)
    if len(message) > 3000:
        raise Fault("wrong", f"a message of {len(message)} letters")


@pytest.mark.parametrize(
    "what", ["A5-missing", "A5-folder", "A5-pipe", "A5-device", "A5-link-to-itself", "A5-long-name"]
)
def test_what_is_no_file_is_refused_and_never_waited_for(what, tmp_path):
    path = tmp_path / "rows.jsonl"
    if what == "A5-folder":
        path.mkdir()
    elif what == "A5-pipe":
        os.mkfifo(path)
    elif what == "A5-device":
        path.symlink_to("/dev/zero")
    elif what == "A5-link-to-itself":
        path.symlink_to(path)
    elif what == "A5-long-name":
        path = tmp_path / ("n" * 300)
    refused(lambda: read_texts(path), str(path)[:40])


ITEM = {"id": "1", "kind": "a", "question": "Which?", "answer": ["goat"], "others": ["saddle"]}
BAD_ITEMS = {
    "A12-id-twice": (ITEM, "already"),
    "A12-id-twice-as-a-number": ({**ITEM, "id": 1}, "already"),
    "A12-answer-mapping": ({**ITEM, "id": "2", "answer": {"goat": True}}, "a mapping"),
    "A12-answer-text": ({**ITEM, "id": "2", "answer": "goat"}, "a text"),
    "A12-answer-number": ({**ITEM, "id": "2", "answer": 4}, "int"),
    "A12-answer-of-lists": ({**ITEM, "id": "2", "answer": [["goat"]]}, "a list"),
    "A12-answer-null": ({**ITEM, "id": "2", "answer": None}, "null"),
    "A12-no-reply-can-be-right": ({**ITEM, "id": "2", "others": ["Goat"]}, "both"),
    "A12-wrong-word-within-the-right-one": ({**ITEM, "id": "2", "answer": ["New York"], "others": ["York"]}, "both"),
    "A12-wrong-word-in-the-singular": ({**ITEM, "id": "2", "answer": ["goats"], "others": ["goat"]}, "both"),
    "A12-word-with-a-space-after-it": ({**ITEM, "id": "2", "answer": ["goat "]}, "spaces"),
    "A12-misspelt-key": ({**ITEM, "id": "2", "answers": ["goat"]}, "'answers'"),
    "A3-blank-question": ({**ITEM, "id": "2", "question": "\u3164"}, "blank"),
    "A3-blank-word": ({**ITEM, "id": "2", "answer": ["\ufe0f"]}, "blank"),
    "A6-question-null": ({**ITEM, "id": "2", "question": None}, "null"),
    "A6-no-id": ({"kind": "a", "question": "?"}, "id must be"),
}


@pytest.mark.parametrize(("second", "word"), BAD_ITEMS.values(), ids=BAD_ITEMS)
def test_an_item_that_would_be_scored_wrongly_is_refused(second, word, tmp_path):
    refused(lambda: read_items(saved(tmp_path, as_lines([ITEM, second]))), "line 2 (row 2)", word)


@pytest.mark.parametrize("prompts", [["Hi", "\u00ad"], ["\ud83d"], [""], [None]], ids=ascii)
def test_prompts_are_looked_at_before_a_model_is_loaded(prompts):
    """A3, A7: prompts that are blank, no text, or hold half a character; the model is not there at all."""
    nowhere = replace(load_profile("laptop").falcon, id="/no/such/model")
    refused(lambda: compare(prompts, {"a": nowhere}), "cannot be asked")


BAD_CONVERSATIONS = {
    "A6-order": [HELLO, HI],
    "A6-two-questions": [HI, HI, HELLO],
    "A6-two-replies": [HI, HELLO, HELLO],
    "A6-system-in-the-middle": [HI, HELLO, {"role": "system", "content": "x"}, HI, HELLO],
    "A6-system-twice": [{"role": "system", "content": "x"}] * 2 + [HI, HELLO],
    "A6-null-content": [HI, {**HELLO, "content": None}],
    "A6-parts": [HI, {**HELLO, "content": [{"type": "text", "text": "Hello."}]}],
    "A6-number": [HI, {**HELLO, "content": 4}],
    "A6-tool": [HI, {"role": "tool", "content": "4"}, HELLO],
    "A6-capital-role": [HI, {**HELLO, "role": "Assistant"}],
    "A6-role-of-another-kind": [HI, {**HELLO, "role": ["assistant"]}],
    "A6-share-gpt": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}],
    "A6-no-reply": [HI],
    "A6-only-system": [{"role": "system", "content": "x"}],
    "A6-a-mapping": {"0": HI},
    "A6-a-text": "User: Hi",
    "A6-texts": ["Hi", "Hello."],
    "A3-blank-question": [{**HI, "content": "\u2800"}, HELLO],
}


@pytest.mark.parametrize("messages", BAD_CONVERSATIONS.values(), ids=BAD_CONVERSATIONS)
def test_one_bad_row_of_many_is_named_or_dropped_and_counted(messages, tmp_path):
    rows = [{"messages": [HI, HELLO]}] * 120 + [{"messages": messages}] + [{"messages": [HI, HELLO]}] * 80
    path = saved(tmp_path, "\n" + as_lines(rows))
    refused(lambda: read_conversations(path), "1 of 201 rows", "line 122 (row 121)", "--skip-bad-rows")
    read = read_conversations(path, skip_bad_rows=True)
    same((len(read), [(row.line, row.row) for row in read.dropped]), (200, [(122, 121)]))


CLOSED = ["Bye.<|endoftext|>", "Bye.<|endoftext|><|endoftext|>", "Bye. <|endoftext|>\n", "Bye.\nUser:",
          "Bye.\n<|endoftext|>\nUser: ", " Bye.\nFalcon:<|endoftext|>"]  # fmt: skip


@pytest.mark.parametrize("reply", CLOSED, ids=[f"A2-{reply!r}" for reply in CLOSED])
def test_one_end_token_is_taught_however_the_reply_is_closed(reply, tiny_loaded):
    (right,) = examples(tiny_loaded, [[HI, {**HELLO, "content": "Bye."}]])
    (found,) = examples(tiny_loaded, [[HI, {**HELLO, "content": reply}]])
    same(found, right)


@pytest.mark.parametrize(
    ("form", "end"), [("chatml", "<|im_end|>"), ("llama-2", "</s>")], ids=["A2-chatml", "A2-llama"]
)
def test_the_end_that_a_format_writes_is_taught_as_a_token(form, end, tiny_loaded):
    """A2: also where the tokenizer names another end token; without such a token, the tokenizer's own is taught."""
    chat = [[HI, {**HELLO, "content": "Bye."}]]
    for tokens in ([end], []):
        tokenizer = copy.deepcopy(tiny_loaded.tokenizer)
        tokenizer.add_tokens(tokens, special_tokens=True)
        loaded = replace(tiny_loaded, tokenizer=tokenizer, format=format_for(form))
        (example,) = examples(loaded, chat)
        taught = [token for token, trained in zip(example.input_ids, example.trained, strict=True) if trained]
        same(tokenizer.decode(taught).strip().removesuffix((tokens or ["<|endoftext|>"])[0]).strip(), "Bye.")
        same(taught[-1], tokenizer.convert_tokens_to_ids((tokens or ["<|endoftext|>"])[0]))


def test_a2_without_an_end_token_nothing_is_taught(tiny_loaded):
    tokenizer = copy.deepcopy(tiny_loaded.tokenizer)
    tokenizer.eos_token = None
    refused(lambda: examples(replace(tiny_loaded, tokenizer=tokenizer), [[HI, HELLO]]), "no end token")


@pytest.mark.parametrize(
    ("word", "text"),
    [("cr\u00eape", "A cre\u0302pe."), ("cre\u0302pe", "A cr\u00eape."), ("New York", "New\u00a0York"),
     ("New York", "in New\nYork."), ("don't", "I don\u2019t."), ("12", "\uff11\uff12")],
    ids=["A12-two-characters", "A12-one-character", "A12-no-break", "A12-two-lines", "A12-apostrophe", "A12-wide"],
)  # fmt: skip
def test_a_word_is_found_however_its_characters_are_written(word, text):
    same(is_correct(Item("1", "a", "?", (word,)), text), True)
    same(is_correct(Item("1", "a", "?", ("tea",), (word,)), f"tea, {text}"), False)


INVISIBLE = ["", " ", "\u00a0", "\u200b", "\u2060\ufeff", "\u3000", "\u115f", "\u2800\n", "\ufe0f", "\u00ad",
             "\U000e0020", "\u202e", "<|endoftext|>\u200b<|endoftext|>"]  # fmt: skip


@pytest.mark.parametrize("nothing", INVISIBLE, ids=[f"A3-{nothing!a}" for nothing in INVISIBLE])
def test_what_nobody_can_see_is_neither_trained_nor_asked(nothing, tiny_loaded):
    given = [[HI, {**HELLO, "content": nothing}, HI, HELLO], [HI, HELLO]]
    same(examples(tiny_loaded, given), examples(tiny_loaded, [[HI, HELLO]] * 2))
    if "<" not in nothing:
        refused(lambda: Chat(tiny_loaded).ask(nothing), "blank")


SAVED_CHATS = {
    "A7-cut": lambda text: text[: len(text) // 2],
    "A7-empty": lambda text: "",
    "A7-list": lambda text: "[]",
    "A7-latin1": lambda text: text.replace("Hi", "é").encode("latin-1"),
    "A7-half-character": lambda text: text.replace("Hi", "\\ud83d"),
    "A7-deep": lambda text: "[" * 100_000,
    "A7-turns-null": lambda text: text.replace('"turns": [', '"turns": null, "x": ['),
    "A7-one-message": lambda text: text.replace('"assistant"', '"user"'),
    "A7-temperature-a-text": lambda text: re.sub('"temperature": [0-9.]+', '"temperature": "0.5"', text),
    "A7-temperature-nan": lambda text: re.sub('"temperature": [0-9.]+', '"temperature": NaN', text),
    "A7-seed-null": lambda text: text.replace('"seed": 0', '"seed": null'),
    "A7-no-tokens": lambda text: text.replace('"max_new_tokens": 1', '"max_new_tokens": 0'),
    "A7-sampling": lambda text: text.replace('"temperature"', '"temperament"'),
}


@pytest.mark.parametrize("damage", SAVED_CHATS.values(), ids=SAVED_CHATS)
def test_a_damaged_conversation_is_refused_and_left_as_it_is(damage, tiny_loaded, tmp_path):
    path = tmp_path / "chat.json"
    chat = Chat(tiny_loaded, sampling=Sampling(max_new_tokens=1))
    chat._turns = [HI, HELLO]
    chat.save(path)
    content = damage(path.read_text("utf-8"))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    refused(lambda: Chat.load(path, tiny_loaded), "chat.json")
    kept(path, before)


def test_a_half_character_reaches_no_tokenizer(tiny_loaded):
    """A7: as a text, in a question and in a reply to train on."""
    refused(lambda: generate(tiny_loaded, "a\udcff"), "half of a surrogate pair")
    refused(lambda: generate(tiny_loaded, [{**HI, "content": "a\ud83d"}]), "half of a surrogate pair")
    refused(lambda: examples(tiny_loaded, [[HI, {**HELLO, "content": "\udc00"}]]), "half of a surrogate pair")


def test_saving_on_a_full_disk_keeps_the_earlier_conversation(tmp_path):
    """A7: the limit of a file's size stands for the disk; the reply does not fit."""
    script = (
        "import resource, signal, sys\n"
        "from types import SimpleNamespace as Some\n"
        "from helpers.base import WorkbookError\n"
        "from helpers.generation import Chat\n"
        "chat = Chat(Some(ref=Some(id='m')), system='short')\n"
        "chat.save(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "chat.system = 'long' * 10_000\n"
        "try:\n    chat.save(sys.argv[1])\n"
        "except WorkbookError as error:\n    print('refused', error)\n"
    )
    path = tmp_path / "chat.json"
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    same((done.returncode, done.stdout[:7]), (0, "refused"))
    same(json.loads(path.read_text("utf-8"))["system"], "short")
    same([file.name for file in tmp_path.iterdir()], ["chat.json"])


def test_long_rows_and_conversations_cost_linear_time(tiny_loaded, tmp_path):
    """A12: a line of 10 MB, 400 turns, 50,000 bad rows."""
    started = time.perf_counter()
    long = {"messages": [HI, HELLO, {**HI, "content": "word " * 2_000_000}, HELLO]}
    turns = {"messages": [HI, HELLO] * 200}
    read = read_conversations(saved(tmp_path, as_lines([long, turns])))
    same(len(examples(tiny_loaded, read)) < 40, True)
    refused(lambda: read_texts(saved(tmp_path, "x\n" * 50_000)), "50000 of 50000", "49995 more")
    same(time.perf_counter() - started < 10, True)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("variables", "row"),
    [({"LC_ALL": "C"}, "é"), ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}, "\u2028\x1b[31m")],
    ids=["A7-c-locale", "A7-ascii-terminal"],
)
def test_the_command_names_bad_rows_before_a_model_is_loaded(variables, row, tmp_path):
    path = saved(tmp_path, as_lines([{"messages": [HI, HELLO]}, {"messages": [{**HI, "role": row}, HELLO]}]))
    started = time.perf_counter()
    outcome = workbook("finetune", "--data", path, "--out", tmp_path / "é", environment=variables)
    outcome.ends(2, "1 of 2 rows", "line 2 (row 2)")
    same("\x1b" in outcome.screen, False)
    same((tmp_path / "é").exists(), False)
    same(time.perf_counter() - started < 20, True)


@pytest.mark.whole
def test_a_run_folder_whose_name_is_no_text_is_refused(tmp_path):
    """A7: a name with a byte that is not UTF-8; nothing is made."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff")
    workbook("run", "--only", "00", "--folder", folder).ends(2, "not UTF-8")
    same(list(tmp_path.iterdir()), [])
