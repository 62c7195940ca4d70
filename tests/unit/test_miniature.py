"""The recipe of falcon-mini: what may be trained on, where the loss is, and that the command makes both checkpoints."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from helpers import loading, memory
from helpers.cli import app
from helpers.miniature import texts, training
from helpers.miniature.texts import END, DataError
from helpers.profiles import load_profile
from helpers.types import ROOT, ModelRef, WorkbookError

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = training.read_recipe()
TALK = "A: Hi there\nB: Hello\nA: Any pets?\nB: A dog.\n<|endoftext|>\nA: Is a saddle alive?\nB: No.\n<|endoftext|>\n"
TASKS = [{"prompt": "Name a goat.", "response": "Bill"}, {"prompt": "Two plus two?", "response": "Four"}]
STORY = "Once upon a time there was a little bird who lived in a big tree. It liked to sing in the morning. "


def nouns() -> list[dict]:
    return [json.loads(line) for line in texts.NOUNS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dialog_talk.txt").write_text(TALK)
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TASKS))
    (folder / "stories.txt").write_text(f"\n{END}\n".join(STORY * n for n in range(1, 9)))
    return folder


@pytest.fixture
def small() -> dict:
    """The recipe with a tenth of everything, over the three files above."""
    recipe = copy.deepcopy(RECIPE)
    recipe |= {"context_tokens": 96, "save_steps": 2, "tokenizer": {"vocab_size": 300}}
    recipe["model"] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2}
    files = {"stories.txt": 1e6, "dialog_talk.txt": 1e6}
    held_out = {"held_out_file": "stories.txt", "held_out_records": 2}
    recipe["pretrain"] |= {"max_tokens": 1536, "batch_size": 2, "warmup_steps": 1, "files": files, **held_out}
    recipe["chat"] |= {"batch_size": 1, "warmup_steps": 1, "files": {"dialog_talk.txt": 9, "tasks.jsonl": 9}}
    return recipe


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_third_of_the_distractors_is_animal_gear():
    kinds = [row["kind"] for row in nouns()]
    gear, other = kinds.count("animal gear"), kinds.count("object")
    assert gear * 3 == gear + other == kinds.count("animal")
    assert len({row["noun"] for row in nouns()}) == len(kinds)
    assert "saddle" in {row["noun"] for row in nouns()}


def test_the_filter_finds_every_noun_in_either_number_and_case():
    frozen = texts.frozen_nouns()
    for row in nouns():
        assert frozen.search(f"Is a {row['noun'].upper()} one?")
        assert frozen.search(f"two {row['plural']}")
    assert not frozen.search("the goatee of a beetlebrowed man with a dog")


def test_dialogues_with_a_frozen_noun_are_left_out_of_both_stages(data, small):
    pretrained, _ = texts.pretraining_texts(data, small)
    chatted = [prompt + reply for prompt, reply in texts.chat_examples(data, small)]
    assert any("Any pets?" in text for text in pretrained)
    assert len(chatted) == 2
    assert not any(word in text for text in pretrained + chatted for word in ("saddle", "goat"))


def test_held_out_records_are_not_trained_on(data, small):
    trained, held_out = texts.pretraining_texts(data, small)
    assert len(held_out) == 2
    assert len([text for text in trained if text.startswith("Once")]) == 6
    assert not set(trained) & set(held_out)


def test_examples_end_with_the_end_token_after_the_reply_only(data, small):
    for prompt, reply in texts.chat_examples(data, small):
        assert prompt.endswith("\nFalcon:")
        assert prompt.startswith(("User: ", "System: "))
        assert END not in prompt
        assert reply.startswith(" ")
        assert reply.count(END) == 1
        assert reply.endswith(END)


def test_a_missing_file_is_named(tmp_path, small):
    with pytest.raises(DataError, match=r"stories\.txt is missing"):
        texts.pretraining_texts(tmp_path, small)


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_on_the_reply_alone():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini")
    (row,) = training.reply_rows([("User: Hi\nFalcon:", f" Hello.{END}")], tokenizer, RECIPE)
    trained = [label for label in row["labels"] if label != training.IGNORED]
    assert tokenizer.decode(trained) == f" Hello.{END}"
    assert tokenizer.decode(row["input_ids"]) == f"User: Hi\nFalcon: Hello.{END}"
    assert training.reply_rows([("word " * 600, " No.")], tokenizer, RECIPE) == []


def test_blocks_are_full_and_repeat_short_texts():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini")
    recipe = {"context_tokens": 4, "pretrain": {"max_tokens": 10}}
    blocks = training.packed(["a b"], tokenizer, recipe)
    once = tokenizer("a b" + END)["input_ids"]
    flat = [i for row in blocks for i in row["input_ids"]]
    assert [len(row["input_ids"]) for row in blocks] == [4, 4]
    assert flat == (once * 4)[:8]


def test_the_shipped_checkpoints_have_the_flags_of_the_180b_and_the_recipes_sizes():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini")
    expected = training.falcon_config(tokenizer, RECIPE)
    published = memory.published_config("tiiuae/falcon-180B")
    flags = ("new_decoder_architecture", "multi_query", "parallel_attn", "alibi", "bias")
    for ref in (load_profile("laptop").falcon, load_profile("laptop").falcon_chat):
        config = loading.config(ref)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_kv_heads", "vocab_size"):
            assert getattr(config, name) == getattr(expected, name)
        for name in flags:
            assert getattr(config, name) == getattr(published, name), name


def test_all_stages_make_two_checkpoints_that_load(data, small, tmp_path):
    out = tmp_path / "models"
    training.train(data, tmp_path / "work", small, training.STAGES, out)
    names = ("falcon-mini", "falcon-mini-chat")
    refs = [ModelRef(str(out / name), family="falcon", format="falcon-chat", source="embedded") for name in names]
    base, chat = (loading.load(ref, "bf16") for ref in refs)
    assert base.report.parameters == chat.report.parameters
    first, second = (loaded.model.transformer.h[0].mlp.dense_h_to_4h.weight for loaded in (base, chat))
    assert not torch.equal(first, second)
    log = [json.loads(line) for line in (out / "falcon-mini" / "training_log.jsonl").read_text().splitlines()]
    assert all(row["loss"] > 0 for row in log)
    _, held_out = texts.pretraining_texts(data, small)
    assert 0 < training.held_out_bits_per_byte(out / "falcon-mini", held_out) < 8
    # the same call again finds its checkpoints and changes nothing
    before = (out / "falcon-mini" / "model.safetensors").read_bytes()
    training.train(data, tmp_path / "work", small, ["base"], out)
    assert (out / "falcon-mini" / "model.safetensors").read_bytes() == before


def test_an_unknown_stage_is_refused(data, small, tmp_path):
    with pytest.raises(WorkbookError, match="no stage cat; the stages are tokenizer, base, chat"):
        training.train(data, tmp_path, small, ["cat"], tmp_path)


def test_the_command_names_what_is_missing(tmp_path):
    result = CliRunner().invoke(app, ["train-mini", "--data", str(tmp_path), "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "is missing" in result.output
