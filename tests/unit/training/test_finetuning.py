"""Fine-tuning: what carries the loss, what is trained, and that every step leads to the same model."""

import copy
import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn.modules import has_avx512bf16
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from helpers import models, training
from helpers.base.files import ROOT
from helpers.generation import Sampling, generate
from helpers.models import format_for, load_profile
from helpers.models.workarounds.nf4_repacking import _keep_unpacked
from helpers.training import (
    FinetuneError,
    Recipe,
    TrainingStoppedError,
    conversations,
    examples,
    finetune,
    finetuning,
    merge,
    read_conversations,
    reload,
    token_counts,
)  # fmt: skip
from helpers.training.recipe import TARGETS

pytestmark = pytest.mark.usefixtures("one_thread")
REF = load_profile("laptop").falcon_chat
DOUBLE = models.LoadOptions(double_quant=True)
SHORT = Recipe(steps=4, batch_size=4, log_every=1, warmup_steps=1, rank=4, alpha=8, evaluate_every=2)
repacks = pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no AVX512-BF16, so nothing is repacked")


def talk(*texts: str, system: str | None = None) -> list[dict]:
    said = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *said] if system else said


DATA = [talk(f"Is {thing} an animal?", answer) for thing, answer in (("a dog", "Yes."), ("a box", "No."))] * 4
TWO_TURNS = talk("Hi there", "Hello!", "Is a dog alive?", "Yes, it is.", system="Be brief.")


@pytest.fixture
def nf4():
    return models.load(REF, "nf4", unpacked=True)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A finished fine-tune of the nf4 model, with an inference before it."""
    loaded = models.load(REF, "nf4", unpacked=True)
    generate(loaded, "Once upon a time", Sampling(temperature=0, max_new_tokens=4))
    return finetune(loaded, DATA, SHORT, tmp_path_factory.mktemp("tuned"), held_out=DATA[:2])


def logits(model, text="User: Is a dog an animal?\nFalcon:"):
    ids = AutoTokenizer.from_pretrained(ROOT / REF.id)(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return model(ids).logits.float()


# --- what carries the loss --------------------------------------------------------------------------------------------


def test_each_reply_is_one_example_with_the_end_token_after_it_alone(tiny_loaded):
    first, second = examples(tiny_loaded, [TWO_TURNS])
    decode, end = tiny_loaded.tokenizer.decode, tiny_loaded.tokenizer.eos_token
    assert decode(first.input_ids) == f"System: Be brief.\nUser: Hi there\nFalcon: Hello!{end}"
    assert decode(second.input_ids) == (
        "System: Be brief.\nUser: Hi there\nFalcon: Hello!\nUser: Is a dog alive?\nFalcon: Yes, it is." + end
    )
    for example, reply in ((first, " Hello!"), (second, " Yes, it is.")):
        trained = [i for i, carries in zip(example.input_ids, example.trained, strict=True) if carries]
        assert decode(trained) == reply + end


def test_every_token_has_the_role_of_the_message_it_stands_in(tiny_loaded):
    example = examples(tiny_loaded, [TWO_TURNS])[1]
    texts: dict[str, str] = {}
    for token, role in zip(example.input_ids, example.roles, strict=True):
        texts[role] = texts.get(role, "") + tiny_loaded.tokenizer.decode([token])
    assert texts == {
        "format": "System:\nUser:\nFalcon:\nUser:\nFalcon:",
        "system": " Be brief.",
        "user": " Hi there Is a dog alive?",
        "assistant": " Hello!",
        "reply": " Yes, it is.",
        "end": "<|endoftext|>",
    }


def test_the_counts_by_role_add_up(tiny_loaded):
    found = examples(tiny_loaded, [TWO_TURNS])
    counts = token_counts(found)
    assert counts["tokens"].sum() == sum(len(example.input_ids) for example in found)
    assert counts.loc["end"].tolist() == [2, 2]
    assert counts.loc["reply", "trained"] == counts.loc["reply", "tokens"] > 0
    assert not counts.loc[["system", "user", "assistant", "format"], "trained"].any()


def test_labels_equal_those_that_trl_makes_from_prompt_and_completion(tiny_loaded, tmp_path):
    form = tiny_loaded.format
    pairs = [{"prompt": form.render(c[:1]), "completion": " " + c[1]["content"]} for c in DATA[:2]]
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    model = copy.deepcopy(tiny_loaded.model)
    theirs = SFTTrainer(
        model, config, train_dataset=Dataset.from_list(pairs), processing_class=tiny_loaded.tokenizer
    ).train_dataset
    for row, example in zip(theirs, examples(tiny_loaded, DATA[:2]), strict=True):
        assert row["input_ids"] == list(example.input_ids)
        labels = [i if trained else -100 for i, trained in zip(example.input_ids, example.trained, strict=True)]
        assert row["labels"] == labels


def test_a_format_that_ends_replies_itself_gets_no_second_end_token(tiny_loaded):
    folder = models.resolve(load_profile("laptop").llama_chat)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = dataclasses.replace(tiny_loaded, tokenizer=tokenizer, format=format_for("chatml"))
    (example,) = examples(loaded, [talk("Hi", "Hello!")])
    trained = [i for i, carries in zip(example.input_ids, example.trained, strict=True) if carries]
    assert tokenizer.decode(trained) == "Hello!<|im_end|>"


def test_examples_longer_than_the_context_are_left_out(tiny_loaded):
    long = talk("word " * 200, "Yes.")
    assert len(examples(tiny_loaded, [long, DATA[0]])) == 1
    with pytest.raises(FinetuneError, match="None of the 1 replies fits"):
        examples(tiny_loaded, [long])


def test_a_line_that_is_no_conversation_is_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"messages": DATA[0]}) + '\n{"text": "hi"}\n')
    with pytest.raises(FinetuneError, match=r"samples\.jsonl: 1 of 2 rows .*\n  line 2 \(row 2\): "):
        read_conversations(path)


FORMATS = [
    ("falcon-chat", "falcon_chat"),
    ("llama-2", "falcon_chat"),
    ("chatml", "llama_chat"),
    ("plain", "falcon_chat"),
]


@pytest.mark.parametrize(("name", "role"), FORMATS, ids=[f"A2-{name}" for name, _ in FORMATS])
def test_an_end_token_written_out_is_not_taught_as_letters(name, role, tiny_loaded):
    tokenizer = AutoTokenizer.from_pretrained(models.resolve(getattr(load_profile("laptop"), role)))
    loaded = dataclasses.replace(tiny_loaded, tokenizer=tokenizer, format=format_for(name))
    (right,) = examples(loaded, [talk("Hi", "Bye.")])
    assert right.roles.count("end") == 1
    assert right.input_ids[-1] == tokenizer.eos_token_id
    for closer in (tokenizer.eos_token, *loaded.format.control_strings):
        for reply in (f"Bye.{closer}", f" Bye. {closer}\n", f"Bye.{closer}{closer}"):
            (example,) = examples(loaded, [talk("Hi", reply)])
            assert example == right
        first, second = examples(loaded, [talk("Hi", f"Bye.{closer}", "And?", "No.")])
        assert (first, second) == tuple(examples(loaded, [talk("Hi", "Bye.", "And?", "No.")]))


@pytest.mark.parametrize("blank", ["", "  \n", "\u00a0", "\u200b\ufeff", "<|endoftext|>", "\nUser:"], ids=ascii)
def test_a_turn_with_a_blank_reply_is_left_out(blank, tiny_loaded):
    """A3: so is it from what later replies read."""
    with_blank = [talk("Hi", blank, "Is a dog alive?", "Yes."), talk("Hi", "Hello!", "And?", blank), talk("Hi", blank)]
    without = [talk("Is a dog alive?", "Yes."), talk("Hi", "Hello!")]
    assert examples(tiny_loaded, with_blank) == examples(tiny_loaded, without)
    assert conversations._select(tiny_loaded, with_blank).blank == 3
    with pytest.raises(FinetuneError, match=r"None of the 1 replies .* 1 are blank"):
        examples(tiny_loaded, with_blank[2:])


def test_a_content_that_the_format_changes_keeps_its_role(tiny_loaded):
    (example,) = examples(tiny_loaded, [talk("  Is it\nUser: mine? ", "No.")])
    said = [i for i, role in zip(example.input_ids, example.roles, strict=True) if role == "user"]
    assert "mine" in tiny_loaded.tokenizer.decode(said)


def test_long_conversations_cost_no_more_than_what_fits(tiny_loaded, monkeypatch):
    """A12: counted, not timed."""
    encoded = []
    one = conversations._Writer._example
    monkeypatch.setattr(conversations._Writer, "_example", lambda *a: encoded.append(1) or one(*a))
    found = examples(tiny_loaded, [talk(*["A dog is alive."] * 400)])
    assert len(encoded) == len(found) + 1 < 20
    started = time.perf_counter()
    assert len(examples(tiny_loaded, [DATA[0], talk("word " * 2_000_000, "Yes.")])) == 1
    assert time.perf_counter() - started < 2


BAD_ROWS = {
    "order": ([DATA[0][1], DATA[0][0]], "Message 0 has the role 'assistant'"),
    "system": ([*DATA[0], {"role": "system", "content": "x"}], "Message 2 has the role 'system'"),
    "null": ([DATA[0][0], {"role": "assistant", "content": None}], "The content of message 1 must be a string"),
    "no-reply": (talk("Hi"), "There is no reply to train on"),
    "blank-question": (talk("\u200b", "Hi"), "Message 0, a question, is blank."),
    "role": ([{"role": "human", "content": "Hi"}, DATA[0][1]], "Message 0 has the role 'human'"),
    "no-content": ([{"role": "user"}, DATA[0][1]], "Message 0 is not a mapping with 'role' and 'content'"),
    "empty": ([], '"messages" must be a list of messages'),
    "text": ("Hi", '"messages" must be a list of messages'),
    "missing": (None, '"messages" must be a list of messages'),
    "half-character": (talk("Hi", "\ud83d"), "half of a surrogate pair"),
}


def rows_file(tmp_path, *messages):
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(json.dumps({"messages": each}) for each in messages))
    return path


@pytest.mark.parametrize(("messages", "reason"), BAD_ROWS.values(), ids=[f"A6-{name}" for name in BAD_ROWS])
def test_a_bad_row_is_refused_by_line_or_dropped_and_counted(messages, reason, tmp_path):
    path = rows_file(tmp_path, *DATA, messages, *DATA)
    with pytest.raises(FinetuneError, match=r"samples\.jsonl: 1 of 17 rows") as refusal:
        read_conversations(path)
    assert "line 9 (row 9): " in str(refusal.value)
    assert reason in str(refusal.value)
    kept = read_conversations(path, skip_bad_rows=True)
    assert kept == [*DATA, *DATA]
    assert [(row.line, row.row) for row in kept.dropped] == [(9, 9)]


def test_blank_replies_are_counted_when_a_file_is_read(tmp_path):
    """A3"""
    assert read_conversations(rows_file(tmp_path, talk("Hi", "\u00a0"), *DATA)).blank_replies == 1
    with pytest.raises(FinetuneError, match="no reply to train on"):
        read_conversations(rows_file(tmp_path, talk("Hi", "\u00a0"), talk("Hi", "<|im_end|>")))


@pytest.mark.parametrize("given", [DATA[0], ["Hi"], [{"prompt": "Hi", "completion": "Hello."}], ["Hi", "Hello."]])
def test_what_is_no_conversation_is_refused_with_an_example(given, tiny_loaded):
    with pytest.raises(FinetuneError, match="Give a list of conversations"):
        examples(tiny_loaded, given)


def test_conversations_without_a_reply_are_refused(tiny_loaded):
    for given in ([], [talk("Hi")], [[{"role": "system", "content": "Hi"}, *talk("Hi")]]):
        with pytest.raises(FinetuneError, match="no reply to train on"):
            examples(tiny_loaded, given)


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("batch_size", 0), ("rank", -1), ("learning_rate", math.nan), ("learning_rate", math.inf),
     ("learning_rate", 0), ("dropout", 1), ("dropout", math.nan), ("warmup_steps", -1), ("seed", -1), ("seed", 2**32)],
)  # fmt: skip
def test_a_recipe_that_trains_nothing_is_refused(name, value):
    """B8"""
    with pytest.raises(FinetuneError, match=f"{name} must be"):
        dataclasses.replace(SHORT, **{name: value})


# --- training -----------------------------------------------------------------------------------------------------


def test_only_the_adapters_are_trained(tuned):
    base = dict(models.load(REF, "nf4", unpacked=True).model.named_parameters())
    after = dict(tuned.loaded.model.base_model.model.named_parameters())
    frozen = {name.replace(".base_layer", ""): p for name, p in after.items() if "lora" not in name}
    assert base.keys() == frozen.keys()
    assert all(torch.equal(base[name], frozen[name]) and not frozen[name].requires_grad for name in base)
    by_hand = 8 * 4 * ((256 + 512) + (256 + 256) + (256 + 1024) + (1024 + 256))
    assert tuned.trainable_parameters == by_hand
    assert {p.dtype for p in tuned.loaded.model.parameters() if p.requires_grad} == {torch.float32}
    assert tuned.processes == 1


def test_the_history_holds_both_losses_and_they_fall(nf4, tmp_path):
    seen = []
    longer = dataclasses.replace(SHORT, steps=10, learning_rate=5e-3)
    done = finetune(nf4, DATA, longer, tmp_path, held_out=DATA[:2], on_point=lambda h: seen.append(len(h)))
    training = [p.loss for p in done.history if p.loss is not None]
    held_out = [(p.step, p.held_out_loss) for p in done.history if p.held_out_loss is not None]
    assert len(training) == 10
    assert [step for step, _ in held_out] == [0, 2, 4, 6, 8, 10]
    assert held_out[-1][1] < held_out[0][1] / 2
    assert seen == list(range(1, len(done.history) + 1))


def test_the_first_held_out_loss_is_the_direct_one(nf4, tmp_path):
    (example,) = examples(nf4, DATA[:1])
    ids = torch.tensor([example.input_ids])
    labels = ids.masked_fill(~torch.tensor([example.trained]), -100)
    with torch.inference_mode():
        direct = nf4.model(ids, labels=labels).loss.item()
    done = finetune(nf4, DATA, dataclasses.replace(SHORT, steps=1), tmp_path, held_out=DATA[:1])
    first = next(p.held_out_loss for p in done.history if p.step == 0)
    assert first == pytest.approx(direct, rel=1e-2)


def test_inference_before_and_evaluation_during_training_change_nothing(tuned, nf4, tmp_path):
    """On a CPU that repacks nf4 weights, an inference would otherwise take the gradients of all frozen layers."""
    untouched = finetune(nf4, DATA, SHORT, tmp_path)
    with_evaluation = [p.loss for p in tuned.history if p.loss is not None]
    assert with_evaluation == [p.loss for p in untouched.history]


def test_the_output_layer_is_given_the_trained_positions_alone_and_the_adapter_is_as_of_all(
    tuned, nf4, tmp_path, monkeypatch
):
    kernel, rows = trl_utils._ChunkedLogProbFunction, []

    class Counted:
        @staticmethod
        def apply(hidden, *rest):
            rows.append(len(hidden))
            return kernel.apply(hidden, *rest)

    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Counted)
    whole = copy.deepcopy(nf4)
    once = finetune(nf4, DATA, replace(SHORT, steps=2), tmp_path / "alone")
    trained = sum(sum(example.trained) for example in examples(once.loaded, DATA))
    assert sum(rows) == trained  # two steps of four: each of the eight examples once
    monkeypatch.setattr(finetuning, "trained_positions_alone", lambda device: nullcontext())
    rows.clear()
    other = finetune(whole, DATA, replace(SHORT, steps=2), tmp_path / "all")
    assert sum(rows) > 3 * trained
    torch.testing.assert_close([p.loss for p in once.history], [p.loss for p in other.history], rtol=1e-6, atol=0)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "all"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@repacks
def test_packed_weights_are_refused(tmp_path):
    with pytest.raises(FinetuneError, match="unpacked=True"):
        finetune(models.load(REF, "nf4"), DATA, SHORT, tmp_path)


def first_gradient(*, unpacked: bool, inference: bool) -> torch.Tensor:
    """The gradient of an adapter in the first layer, perhaps after an inference; zero where none arrives."""
    model = models.load(REF, "nf4", unpacked=unpacked).model
    if inference:
        logits(model)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=list(TARGETS["falcon"]), init_lora_weights=False)
    model = get_peft_model(model, config).train()
    ids = torch.tensor([[5, 17, 80, 200, 9, 11]])
    model(ids, labels=ids).loss.backward()
    adapter = model.base_model.model.transformer.h[0].self_attention.query_key_value.lora_A["default"].weight
    return torch.zeros_like(adapter) if adapter.grad is None else adapter.grad


@repacks
def test_the_trap_is_real():
    """Fails the day bitsandbytes keeps the gradients: then ``unpacked`` is no longer needed."""
    right = first_gradient(unpacked=True, inference=False)
    assert torch.equal(first_gradient(unpacked=True, inference=True), right)
    spoiled = first_gradient(unpacked=False, inference=True)
    assert models.relative_error(spoiled, right) > 0.3


def test_the_same_seed_gives_the_same_adapter(tuned, nf4, tmp_path):
    again = finetune(nf4, DATA, SHORT, tmp_path, held_out=DATA[:2])
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tuned.adapter_dir, again.adapter_dir))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert again.history == tuned.history


def interrupted(nf4, folder, step: int) -> None:
    """A training stopped by Ctrl-C as the loss of a step is logged; the checkpoints of the steps before are there."""

    def interrupt(history):
        if history[-1].step == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(nf4, DATA, SHORT, folder, held_out=DATA[:2], on_point=interrupt)


def test_an_interrupted_training_goes_on_where_it_stopped_and_passes_over_a_checkpoint_that_was_cut_off(
    tuned, nf4, tmp_path
):
    interrupted(nf4, tmp_path, step=3)
    assert (tmp_path / "checkpoints" / "checkpoint-2").is_dir()
    shutil.copytree(tmp_path / "checkpoints" / "checkpoint-2", tmp_path / "checkpoints" / "checkpoint-3")
    (tmp_path / "checkpoints" / "checkpoint-3" / "optimizer.pt").unlink()
    seen = []
    done = finetune(nf4, DATA, SHORT, tmp_path, held_out=DATA[:2], on_point=lambda history: seen.append(history[-1]))
    assert sorted({point.step for point in seen}) == [3, 4]
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (tuned.adapter_dir, tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert done.history == tuned.history
    # the one that was cut off is set aside, and the training's own stands in its place
    assert (tmp_path / "checkpoints" / "incomplete-3" / "scheduler.pt").is_file()


def test_a_finished_training_takes_no_further_step(nf4, tmp_path):
    """C5: it ended within an epoch, where transformers' trainer would go on."""
    recipe = replace(SHORT, steps=3)
    once = finetune(copy.deepcopy(nf4), DATA, recipe, tmp_path, held_out=DATA[:2])
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    again = finetune(nf4, DATA, recipe, tmp_path, held_out=DATA[:2])
    assert again.history == once.history
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(adapter[name], after[name]) for name in adapter)


def test_a_training_stops_before_it_saves_a_number_that_is_not_finite(nf4, tmp_path):
    """B1: gradients overflow from some step on; the checkpoint before is whole, and no adapter is written."""
    wild = replace(SHORT, steps=20, learning_rate=1, alpha=10**12)
    for _ in range(2):  # the same call stops at the same place
        with pytest.raises(TrainingStoppedError, match=r"stopped at step \d+: the .*(not finite|nan|inf)"):
            finetune(nf4, DATA, wild, tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    for file in (tmp_path / "checkpoints").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


@pytest.mark.parametrize(
    ("part", "recipe", "data", "options"),
    [
        ("recipe", dataclasses.replace(SHORT, seed=1), DATA, {"precision": "nf4", "unpacked": True}),
        ("precision", SHORT, DATA, {"precision": "bf16"}),
        ("double_quant", SHORT, DATA, {"precision": "nf4", "unpacked": True, "options": DOUBLE}),
        ("data_sha256", SHORT, DATA[:4], {"precision": "nf4", "unpacked": True}),
    ],
)
def test_a_folder_with_another_fine_tune_is_refused(part, recipe, data, options, tuned):
    with pytest.raises(FinetuneError, match=f"another {part}"):
        finetune(models.load(REF, **options), data, recipe, tuned.adapter_dir, held_out=DATA[:2])


def test_a_double_quantized_base_is_reloaded_as_one(tmp_path):
    loaded = models.load(REF, "nf4", unpacked=True, options=DOUBLE)
    done = finetune(loaded, DATA, dataclasses.replace(SHORT, steps=1), tmp_path)
    assert (logits(reload(tmp_path).model) - logits(done.loaded.model)).abs().max() <= 1e-5


def test_bf16_training_leaves_no_autocast_behind(nf4, tmp_path, monkeypatch):
    """A GPU trains so; a model with autocast would differ from the reloaded one."""
    config = finetuning._config
    monkeypatch.setattr(finetuning, "_config", lambda *a, **k: dataclasses.replace(config(*a, **k), bf16=True))
    done = finetune(nf4, DATA, SHORT, tmp_path)
    assert (logits(reload(tmp_path).model) - logits(done.loaded.model)).abs().max() <= 1e-5


@repacks
def test_weights_that_are_packed_already_are_refused(tmp_path):
    loaded = models.load(REF, "nf4")
    logits(loaded.model)
    _keep_unpacked(loaded.model)
    with pytest.raises(FinetuneError, match="unpacked=True"):
        finetune(loaded, DATA, SHORT, tmp_path)


def test_a_model_with_adapters_is_refused(tuned, tmp_path):
    with pytest.raises(FinetuneError, match="adapters already"):
        finetune(tuned.loaded, DATA, SHORT, tmp_path)


def test_replies_that_do_not_fit_are_counted(nf4, tmp_path):
    done = finetune(nf4, [*DATA, talk("word " * 600, "Yes.")], dataclasses.replace(SHORT, steps=1), tmp_path)
    assert (done.examples, done.left_out) == (len(DATA), 1)


@pytest.mark.slow
def test_torchrun_trains_in_as_many_processes_as_asked(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "from helpers import models, training\n"
        "loaded = models.load(models.load_profile('laptop').falcon_chat, 'bf16')\n"
        "data = [[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'}]] * 8\n"
        "recipe = training.Recipe(steps=1, batch_size=2)\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "done = training.finetune(loaded, data, recipe, out)\n"
        "(out / f'rank{os.environ[\"RANK\"]}').write_text(str(done.processes))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(tmp_path / "o")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / "o" / f"rank{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    assert (tmp_path / "o" / "adapter_model.safetensors").is_file()


# --- saving, reloading, merging ----------------------------------------------------------------------------------


def test_the_reloaded_adapter_gives_the_logits_of_the_one_in_memory(tuned):
    again = reload(tuned.adapter_dir)
    assert again.report.precision == "nf4"
    assert (logits(again.model) - logits(tuned.loaded.model)).abs().max() <= 1e-5


def test_the_merged_model_is_within_two_percent_of_the_trained_one(nf4, tmp_path):
    strong = dataclasses.replace(SHORT, steps=10, learning_rate=1e-2)
    done = finetune(nf4, DATA, strong, tmp_path / "adapter")
    trained, plain = logits(done.loaded.model), logits(models.load(REF, "nf4", unpacked=True).model)
    assert models.relative_error(plain, trained) > 0.1, "the adapter must matter for this test to mean something"
    merged = models.load(merge(tmp_path / "adapter", tmp_path / "merged"), "bf16")
    assert models.relative_error(logits(merged.model), trained) <= 0.02
    assert not any("lora" in name for name, _ in merged.model.named_parameters())


def test_a_folder_without_an_adapter_is_named(tmp_path):
    with pytest.raises(FinetuneError, match=r"fine_tune\.json is missing"):
        reload(tmp_path)


def changed(tuned, tmp_path, change):
    """A copy of the adapter's folder without its checkpoints, changed."""
    folder = tmp_path / "adapter"
    shutil.copytree(tuned.adapter_dir, folder, ignore=shutil.ignore_patterns("checkpoints"))
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def halve(tensors, config):
    for name in list(tensors)[::2]:
        del tensors[name]


def rename(tensors, config):
    for name in list(tensors):
        tensors[name.replace("query_key_value", "other")] = tensors.pop(name)


def spoil(tensors, config):
    tensors[next(iter(tensors))][0, 0] = math.nan


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (halve, "32 of 64 tensors are missing"),
        (rename, "16 of 64 tensors are missing"),
        (spoil, "holds a nan or an infinity in base_model"),
        (lambda tensors, config: tensors[next(iter(tensors))].mul_(1.5), "adapter_model.safetensors is not the file"),
        (lambda tensors, config: config.update(lora_alpha=1000), "alpha is 1000 in adapter_config.json, not 8"),
        (lambda tensors, config: config.update(r=2), "rank is 2 in adapter_config.json, not 4"),
        (lambda tensors, config: config.update(base_model_name_or_path="x"), "adapter_config.json is not the file"),
    ],
    ids=["C6-half", "C6-names", "C6-nan", "C6-values", "C6-alpha", "C6-rank", "C6-base"],
)  # fmt: skip
def test_an_adapter_that_is_not_the_one_that_was_saved_is_refused(change, reason, tuned, tmp_path):
    folder = changed(tuned, tmp_path, change)
    for use in (reload, lambda adapter: merge(adapter, tmp_path / "merged")):
        with pytest.raises(FinetuneError, match="is not the one that was saved") as refusal:
            use(folder)
        assert reason in str(refusal.value)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_whose_base_was_replaced_is_refused(tmp_path):
    """C7: resumed, reloaded and merged."""
    base = tmp_path / "base"
    shutil.copytree(ROOT / REF.id, base)
    ref = replace(REF, id=str(base))
    one = replace(SHORT, steps=1)
    finetune(models.load(ref, "bf16"), DATA, one, tmp_path / "adapter")
    assert logits(reload(tmp_path / "adapter").model).isfinite().all()
    weights = load_file(base / "model.safetensors")
    weights["transformer.ln_f.bias"] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for use in (reload, lambda adapter: merge(adapter, tmp_path / "merged")):
        with pytest.raises(FinetuneError, match=r"with other files than it has now: model\.safetensors"):
            use(tmp_path / "adapter")
    with pytest.raises(FinetuneError, match="another base_files"):
        finetune(models.load(ref, "bf16"), DATA, one, tmp_path / "adapter")


def test_nothing_is_merged_over_what_is_there(tuned, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("kept")
    with pytest.raises(FinetuneError, match="is there already"):
        merge(tuned.adapter_dir, tmp_path / "merged")
    assert (tmp_path / "merged" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([3.0, 1.04, 1.0, 1.2], 10),  # 1.96 of a fall of 2 is 98%
        ([3.0, 1.2, 1.0, 1.2], 20),  # 1.8 of 2 is 90%
        ([3.0, 2.0, 1.5, 1.0], 30),
        ([3.0, 3.5], None),
        ([3.0], None),
        ([], None),
    ],
)
def test_the_step_by_which_the_held_out_loss_has_settled(losses, step, tuned):
    history = [training.Point(10 * number, held_out_loss=loss) for number, loss in enumerate(losses)]
    history.insert(1, training.Point(5, loss=0.1))  # the training loss says nothing about it
    assert replace(tuned, history=tuple(history)).settled_step == step
