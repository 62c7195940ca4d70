"""The recipe of falcon-mini: what may be trained on, where the loss is, and that the command makes both checkpoints."""

import copy
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, FalconForCausalLM, Trainer, TrainerCallback
from typer.testing import CliRunner

from helpers import machine, models
from helpers.base import WorkbookError
from helpers.base.files import ROOT
from helpers.cli import app
from helpers.models import ModelRef, load_profile
from helpers.training.miniature import card, talk, texts, training
from helpers.training.miniature.texts import END, _DataError

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = training.read_recipe()
TALK = "A: Hi there\nB: Hello\nA: Any pets?\nB: A dog.\n<|endoftext|>\nA: Is a saddle alive?\nB: No.\n<|endoftext|>\n"
TASKS = [{"prompt": "Name a goat.", "response": "Bill"}, {"prompt": "Two plus two?", "response": "Four"}]
STORY = "Once upon a time there was a little bird who lived in a big tree. It liked to sing in the morning. "


class StopAfter(TrainerCallback):
    """Ends a training after some steps, as Ctrl-C would, at a checkpoint."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


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
    recipe["held_out"] = {"stories": "stories.txt", "records": 2}
    first, *others = recipe["pretrain"]["phases"]
    phases = [first | {"context_tokens": 48, "batch_size": 2}]
    phases += [phase | {"context_tokens": 96, "batch_size": 1} for phase in others]
    recipe["pretrain"]["phases"] = [phase | {"max_steps": 4, "warmup_steps": 1} for phase in phases]
    recipe["pretrain"] |= {"files": {"stories.txt": 2, "dialog_talk.txt": 1}, "repeated_words": 3}
    files = {"dialog_talk.txt": {"held_out": 0, "talks": 9}, "tasks.jsonl": {"held_out": 0, "talks": 9}}
    recipe["chat"] |= {
        "epochs": 1,
        "batch_size": 64,
        "warmup_steps": 1,
        "kinds": 20,
        "facts": 1,
        "files": files,
    }
    return recipe


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_third_of_the_distractors_is_animal_gear():
    kinds = [row["kind"] for row in nouns()]
    gear, other = kinds.count("animal gear"), kinds.count("object")
    assert gear * 3 == gear + other == kinds.count("animal")
    assert len({row["noun"] for row in nouns()}) == len(kinds)
    assert "saddle" in {row["noun"] for row in nouns()}


def test_the_filter_finds_every_noun_in_either_number_and_case():
    frozen = texts._frozen_nouns()
    for row in nouns():
        assert frozen.search(f"Is a {row['noun'].upper()} one?")
        assert frozen.search(f"two {row['plural']}")
    assert not frozen.search("the goatee of a beetlebrowed man with a dog")


def test_dialogues_with_a_frozen_noun_are_left_out_of_both_stages(data, small):
    pretrained = texts._pretraining_texts(data, small)
    chatted = [prompt + reply for prompt, reply in talk._chat_examples(data, small)]
    assert any("Any pets?" in text for text in pretrained)
    assert any("Any pets?" in text for text in chatted)
    assert any("Two plus two?" in text for text in chatted)
    assert not any(word in text for text in pretrained + chatted for word in ("saddle", "goat"))


def test_held_out_records_are_not_trained_on(data, small):
    trained, held_out = texts._pretraining_texts(data, small), texts._held_out_stories(data, small)
    assert len(held_out) == 2
    assert len([text for text in trained if text.startswith("Once")]) == 2 * 6
    assert not set(trained) & set(held_out)


def test_a_pass_reads_a_file_as_often_as_the_recipe_says(data, small):
    small["pretrain"] |= {"files": {"stories.txt": 1.5}, "repeated_words": 0}
    trained = texts._pretraining_texts(data, small)
    assert sorted(trained.count(text) for text in set(trained)) == [1, 1, 1, 2, 2, 2]


def test_repeated_words_repeat_in_order_and_hold_no_frozen_noun():
    made = texts._repeated_words(["goat tree river stone bread"] * 40, 50, random.Random(0))
    for text in made:
        words = re.findall(r"[a-z]+", text.replace(" and ", " "))
        lengths = [n for n in range(1, len(words) // 2 + 1) if words == (words[:n] * 5)[: len(words)]]
        assert lengths, text
        assert set(words) <= {"tree", "river", "stone", "bread"}


def test_held_out_messages_begin_no_conversation_that_is_trained_on(data, small):
    lines = [{"prompt": f"Say {n // 2 if n < 8 else n}", "response": "Yes"} for n in range(20)]
    (data / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    small["chat"]["files"] = {"tasks.jsonl": {"held_out": 5, "talks": 99}}
    messages = [message for message, _ in talk._held_out_talks(data, small)]
    prompts = [prompt for prompt, _ in talk._chat_examples(data, small)]
    assert len(set(messages)) == 5
    assert not any(f"User: {message}\n" in prompt for message in messages for prompt in prompts)
    assert sum("User: Say " in prompt for prompt in prompts) >= 15


def test_held_out_messages_are_in_no_text_of_the_base(data, small):
    (data / "dialog_talk.txt").write_text(f"A: Hi\nB: Yo\n{END}\nA: Oh?\nB: Hm\nA: So it is.\nB: Yes\n{END}\n")
    trained = texts._pretraining_texts(data, small, without=["So it is."])
    assert any("B: Yo" in text for text in trained)
    assert not any("So it is." in text for text in trained)


def test_the_prompt_for_short_answers_stands_before_short_answers_alone():
    pairs = [talk._pair(["Hi", reply], random.Random(n)) for n in range(300) for reply in ("One.", "One. Two.")]
    short = [reply for prompt, reply in pairs if talk.SHORT_PROMPT in prompt]
    assert len(short) > 5
    assert set(short) == {f" One.{END}"}
    assert any("System:" in prompt and "Two" in reply for prompt, reply in pairs)


def test_where_an_animal_is_one_of_two_the_other_is_as_often_the_answer():
    choices = [turns for turns in talk._fact_talks(6000, 0, random.Random(0)) if turns[0].startswith("Which")]
    animals = talk._read_facts()["kinds"]["animal"]
    mixed = [answer for question, answer in choices if any(f" {animal}" in question for animal in animals)]
    share = sum(" is an animal." in answer for answer in mixed) / len(mixed)
    assert 0.4 < share < 0.6
    assert sum("a thing" in question for question, _ in choices) > 0.1 * len(choices)


def test_no_fact_holds_a_frozen_noun_and_each_answer_is_of_the_kind_asked_for():
    facts, frozen = talk._read_facts(), texts._frozen_nouns()
    talks = talk._fact_talks(2000, 1, random.Random(0))
    assert not [turns for turns in talks if frozen.search(" ".join(turns))]
    kinds = {thing: kind for kind, things in facts["kinds"].items() for thing in things}
    choices = [turns for turns in talks if turns[0].startswith("Which") and turns[0].count(" or ") == 1]
    assert len(choices) > 500
    for question, answer in choices:
        named, kind = re.fullmatch(r"(?:An? )?(.+?) is an? (.+)\.", answer, re.IGNORECASE).groups()
        others = set(re.findall(r"[\w-]+", question)) & kinds.keys() - {named.lower()}
        if kind == "thing":
            assert kinds[named.lower()] != "animal"
            assert "animal" in {kinds[other] for other in others}
        else:
            assert kinds[named.lower()] == kind
        assert named.lower() in question


def test_a_story_is_asked_for_by_a_thing_that_it_tells_of(data, small):
    told = "A frog sat by the pond. The frog saw a kite. The big frog was glad."
    (data / "stories.txt").write_text(f"\n{END}\n".join([told, f"{told} It slept.", f"{told} It sang.", STORY]))
    asked = [prompt for prompt, reply in talk._chat_examples(data, small) if "frog sat" in reply]
    about = [prompt for prompt in asked if "about" in prompt]
    assert about
    assert all("about a frog" in prompt for prompt in about)
    assert len(about) == 2 * (len(asked) - len(about))  # each story as such once, and twice by its thing


def test_examples_end_with_the_end_token_after_the_reply_only(data, small):
    for prompt, reply in talk._chat_examples(data, small):
        assert prompt.endswith("\nFalcon:")
        assert prompt.startswith(("User: ", "System: "))
        assert END not in prompt
        assert reply.startswith(" ")
        assert reply.count(END) == 1
        assert reply.endswith(END)


def test_a_missing_file_is_named(tmp_path, small):
    with pytest.raises(_DataError, match=r"stories\.txt is missing"):
        texts._pretraining_texts(tmp_path, small)


# --- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_on_the_reply_alone():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini")
    (row,) = training._reply_rows([("User: Hi\nFalcon:", f" Hello.{END}")], tokenizer, RECIPE)
    trained = [label for label in row["labels"] if label != training.IGNORED]
    assert tokenizer.decode(trained) == f" Hello.{END}"
    assert tokenizer.decode(row["input_ids"]) == f"User: Hi\nFalcon: Hello.{END}"
    assert training._reply_rows([("word " * 600, " No.")], tokenizer, RECIPE) == []


def test_blocks_are_full_and_the_rest_is_cut_off():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini")
    blocks = training._packed(["One day a bird sang.", "It rained."], tokenizer, 4)
    once = tokenizer("One day a bird sang." + END + "It rained." + END)["input_ids"]
    assert [len(row["input_ids"]) for row in blocks] == [4] * (len(once) // 4)
    assert [i for row in blocks for i in row["input_ids"]] == once[: len(once) // 4 * 4]


def unlikelihood_by_hand(logits: torch.Tensor, labels: list[int], weight: float, end: int) -> float:
    """The loss of one row, token by token, from the definition."""
    total = 0.0
    trained = [place for place in range(1, len(labels)) if labels[place] != training.IGNORED]
    for place in trained:
        p = logits[place - 1].softmax(-1)
        total -= p[labels[place]].log().item()
        start = max((q + 1 for q in range(place - 1) if labels[q] == end), default=0)  # of this token's text
        for before in range(start + 1, place - 1):
            three = labels[before - 1 : before + 2]
            again = labels[place - 2 : place] == three[:2] and place - 2 >= start
            if again and training.IGNORED not in three and three[2] != labels[place]:
                total -= weight * torch.log1p(-p[three[2]]).item()
    return total / len(trained)


@pytest.mark.parametrize(
    "labels",
    [
        [5, 6, 7, 5, 6, 8, 5, 6, 7, 3],  # after 5, 6 came 7, then 8: each would repeat where the other is true
        [5, 6, 7, 0, 5, 6, 8, 5, 6, 9],  # 0 ends a text: what stood before it is not repeated
        [-100, -100, 5, 6, 7, 5, 6, 7, 5, 6],  # what carries no loss repeats nothing
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 0],  # nothing would
    ],
)
def test_what_would_repeat_three_tokens_is_made_unlikely(labels):
    torch.manual_seed(0)
    logits = torch.randn(1, len(labels), 10, requires_grad=True)
    output = SimpleNamespace(logits=logits)
    loss = training._unlikelihood_loss(0.7, end=0)(output, torch.tensor([labels]))
    assert loss.item() == pytest.approx(unlikelihood_by_hand(logits[0], labels, 0.7, end=0), abs=1e-5)
    with torch.no_grad():
        held_out = training._unlikelihood_loss(0.7, end=0)(
            SimpleNamespace(logits=logits.detach()), torch.tensor([labels])
        )
    assert held_out.item() == pytest.approx(unlikelihood_by_hand(logits[0], labels, 0.0, end=0), abs=1e-5)


def test_without_a_weight_the_loss_is_the_models_own(tiny_loaded):
    ids = torch.randint(1, 100, (3, 40), generator=torch.Generator().manual_seed(0))
    output = tiny_loaded.model(input_ids=ids, labels=ids)
    assert training._unlikelihood_loss(0.0, end=0)(output, ids).item() == pytest.approx(output.loss.item(), abs=1e-5)


def test_the_optimizer_steps_as_pytorchs_own_muon_and_adamw_do():
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2}
    model = FalconForCausalLM(training._falcon_config(tokenizer, RECIPE | {"model": sizes}))
    settings = {"learning_rate": 0.01, "embedding_learning_rate": 0.005, "weight_decay": 0.1}
    ours, theirs = model, copy.deepcopy(model)
    matrices = [w for name, w in theirs.transformer.h.named_parameters() if w.ndim == 2]
    others = [w for w in theirs.parameters() if all(w is not matrix for matrix in matrices)]
    optimizers = [
        training._muon(ours, settings),
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.005, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0),
    ]
    ids = torch.arange(64).view(2, 32)
    for _ in range(3):
        for each in (ours, theirs):
            each(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) < 1e-5
    assert len(matrices) == 4


def test_the_shipped_checkpoints_have_the_flags_of_the_180b_and_the_recipes_sizes():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "env/models/falcon-mini")
    expected = training._falcon_config(tokenizer, RECIPE)
    published = machine.published_config("tiiuae/falcon-180B")
    flags = ("new_decoder_architecture", "multi_query", "parallel_attn", "alibi", "bias")
    for ref in (load_profile("laptop").falcon, load_profile("laptop").falcon_chat):
        config = models.config(ref)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_kv_heads", "vocab_size"):
            assert getattr(config, name) == getattr(expected, name)
        for name in flags:
            assert getattr(config, name) == getattr(published, name), name
        assert config.head_dim == published.head_dim == 64


def test_all_stages_make_two_checkpoints_that_load(data, small, tmp_path):
    out = tmp_path / "models"
    training.train(data, tmp_path / "work", small, training.STAGES, out)
    names = ("falcon-mini", "falcon-mini-chat")
    refs = [ModelRef(str(out / name), family="falcon", format="falcon-chat", source="embedded") for name in names]
    base, chat = (models.load(ref, "bf16") for ref in refs)
    assert base.report.parameters == chat.report.parameters
    first, second = (loaded.model.transformer.h[0].mlp.dense_h_to_4h.weight for loaded in (base, chat))
    assert not torch.equal(first, second)
    log = [json.loads(line) for line in (out / "falcon-mini" / "training_log.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in log if "held_out_loss" in row] == [
        name for name in ("short", "long", "varied") for _ in range(2)
    ]
    assert [row["tokens"] for row in log if "held_out_loss" in row] == [192, 384] * 3
    assert texts._read_texts(out / "falcon-mini" / training.HELD_OUT) == texts._held_out_stories(data, small)
    # the same call again finds its checkpoints and changes nothing
    before = {path: path.read_bytes() for path in out.glob("*/*") if path.suffix in (".safetensors", ".jsonl")}
    training.train(data, tmp_path / "work", small, ["base", "chat"], out)
    assert {path: path.read_bytes() for path in before} == before


def test_an_unknown_stage_is_refused(data, small, tmp_path):
    with pytest.raises(WorkbookError, match=r"no stage 'cat'\. Choose one of: tokenizer, base, chat"):
        training.train(data, tmp_path, small, ["cat"], tmp_path)


@pytest.mark.parametrize(("stage", "missing"), [("base", "tokenizer first"), ("chat", "tokenizer first")])
def test_a_stage_without_its_forerunner_is_refused(data, small, tmp_path, stage, missing):
    with pytest.raises(WorkbookError, match=missing):
        training.train(data, tmp_path / "work", small, [stage], tmp_path / "models")


def test_checkpoints_of_other_texts_are_refused(data, small, tmp_path):
    training.train(data, tmp_path / "work", small, ["tokenizer", "base"], tmp_path / "models")
    small["pretrain"]["repeated_words"] = 4
    with pytest.raises(WorkbookError, match="of another training"):
        training.train(data, tmp_path / "work", small, ["base"], tmp_path / "models")


def test_the_command_names_what_is_missing(tmp_path):
    result = CliRunner().invoke(app, ["train-mini", "--data", str(tmp_path), "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "is missing" in result.output
    result = CliRunner().invoke(app, ["evaluate-mini", "--models", str(tmp_path)])
    assert result.exit_code == 2
    assert "is missing" in result.output


def test_an_interrupted_training_gives_the_weights_of_an_uninterrupted_one(data, small, tmp_path, monkeypatch):
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    small["pretrain"]["phases"] = small["pretrain"]["phases"][:2]  # one that is interrupted, and one after it
    training.train(data, tmp_path / "work1", small, ["tokenizer", "base"], whole)
    fit = Trainer.train

    def interrupted(self, *args, **kwargs):
        stopped = self.args.output_dir.endswith("short")
        self.add_callback(StopAfter(2 if stopped else 99))
        fit(self, *args, **kwargs)
        if stopped:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train(data, tmp_path / "work2", small, ["tokenizer", "base"], parted)
    monkeypatch.setattr(Trainer, "train", fit)
    training.train(data, tmp_path / "work2", small, ["tokenizer", "base"], parted)
    one, two = (load_file(folder / "falcon-mini" / "model.safetensors") for folder in (whole, parted))
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_is_what_its_template_makes_of_the_measured_figures():
    folder = ROOT / "env/models/falcon-mini"
    assert (folder / "README.md").read_text(encoding="utf-8") == card._text(folder)


def test_the_two_checkpoints_are_small_and_share_a_tokenizer():
    folders = [ROOT / "env/models/falcon-mini", ROOT / "env/models/falcon-mini-chat"]
    sizes = [path.stat().st_size for folder in folders for path in folder.glob("*.safetensors")]
    assert sum(sizes) <= 48e6
    assert max(sizes) < 25e6
    for name in training.TOKENIZER_FILES:
        assert len({(folder / name).read_bytes() for folder in folders}) == 1


def test_the_curve_puts_the_phases_after_each_other(tmp_path):
    rows = [{"phase": "a", "step": 10, "loss": 3.0}, {"phase": "a", "step": 20, "held_out_loss": 2.5}]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"phase": "b", "step": 10, "loss": 2.0}]))
    (axis,) = card._curve(log, "a model").axes
    assert [list(line.get_xdata()) for line in axis.get_lines()] == [[10, 30], [20]]
