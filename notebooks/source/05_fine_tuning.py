# ---
# jupyter:
#   workbook:
#     models:
#       repair: [nf4]
#       laptop/falcon_chat: [bf16, nf4]
#     work:  # two fine-tunes, and seven looks at the held-out samples
#       repair:
#         - {load: 1}
#         - {reply: [3, 168], tokens: 24, prompt: 50, together: questions_at_once}
#         - {reply: 24, tokens: 40, prompt: 50, together: 12}
#         - {read: [3, 144], tokens: 50, together: 16}
#         - {read: 32, tokens: 190, together: 4}
#         - {read: [7, 40], tokens: 60, together: batch_size}
#         - {train: [2, steps], tokens: 60, together: batch_size}
#     parameters:
#       seed: {least: 0, most: 4294967295}
#       steps: {least: 1, most: 1000000}
#       batch_size: {least: 1, most: 100000}
#       learning_rate: {above: 0, most: 1}
#       rank: {least: 1, most: 4096}
#       questions_at_once: {least: 1, most: 100000}
# ---

# %% [markdown]
# # 05 · Fine-tuning: repair what the comparison found
#
# **You will learn**
# - what LoRA trains, and what QLoRA adds to it;
# - which tokens of a conversation count towards the loss, and which are only read;
# - how to train, save, reload and merge an adapter, and how far each step changes the model;
# - how to tell what a fine-tune taught from the mere form of its answers, with a placebo;
# - how to read from the loss when more steps gain little, and what a fine-tune costs elsewhere;
# - how to avoid four silent traps.
#
# **Before:** [04 · Falcon and Llama](04_falcon_vs_llama.ipynb) · **This is the last notebook.** · [Glossary](GLOSSARY.md)

# %% tags=["parameters"]
profile = "laptop"
seed = 0
steps = 36
batch_size = 8
learning_rate = 0.003
rank = 16
questions_at_once = 84
gradient_checkpointing = False

# %%
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from helpers import base, evaluation, exercises, figures, models, panels, runs, training
from helpers.generation import Sampling
from helpers.runs import Measured

notebook_name = "05_fine_tuning"  # recorded and expected values are found by this name
models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# The mechanics, sections 1 to 4, are shown on `falcon-mini-chat`, which is small enough to run everywhere. The repair, from
# section 5 on, is done on the model that the profile names for it.
#
# ## 1 · LoRA, plainly
#
# [LoRA](GLOSSARY.md#lora) freezes a model's matrices `W` and trains two thin ones next to each: the layer computes `W·x + (alpha
# / rank)·B·A·x`. With rank 16 these are a few percent of the weights (0.15% of Falcon-180B's), and only they need
# [gradients](GLOSSARY.md#gradient) and [optimizer](GLOSSARY.md#optimizer) state. Here it is with peft and trl, for three steps.

# %%
runs.record_figure("lora", figures.lora_and_qlora(14848, 59392, 16, "Falcon-180B, dense_h_to_4h"))

# %%
from peft import LoraConfig, get_peft_model

mini = models.load(models.load_profile("laptop").falcon_chat, "bf16")
linear = [mini.model.get_submodule(n) for n in models.quantizable_layers(mini.model)]
targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
config = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
adapted = get_peft_model(mini.model, config)
trainable, everything = adapted.get_nb_trainable_parameters()
print(f"{trainable:,} of {everything:,} parameters are trained")

# %% [markdown]
# By default, peft adapts only `query_key_value` of a Falcon. The four names are all linear layers of the decoder. By hand: a
# layer from `n` to `m` numbers gets `rank · (n + m)` parameters.

# %%
by_hand = sum(16 * (layer.in_features + layer.out_features) for layer in linear)
print(f"{len(linear)} layers, {by_hand:,} parameters by hand")

# %% [markdown]
# trl's `SFTTrainer` takes a prompt and its completion as text, and trains on the completion.

# %%
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

pairs = [{"prompt": "User: Is a dog an animal?\nFalcon:", "completion": " Yes."}] * 3
options = {"per_device_train_batch_size": 1, "max_steps": 3, "packing": False}
options |= {"report_to": [], "disable_tqdm": True, "save_strategy": "no"}
options |= {"use_cpu": adapted.device.type == "cpu", "bf16": adapted.device.type != "cpu"}
with tempfile.TemporaryDirectory() as folder:
    plain = SFTConfig(output_dir=folder, logging_strategy="no", **options)
    plain_trainer = SFTTrainer(
        adapted, plain, train_dataset=Dataset.from_list(pairs), processing_class=mini.tokenizer
    )
    print(f"loss over three steps: {plain_trainer.train().training_loss:.3f}")

# %% tags=["record"]
runs.record_all({"lora_parameters_by_hand": by_hand == trainable})

# %% [markdown]
# ## 2 · The base in four bits
#
# [QLoRA](GLOSSARY.md#qlora) keeps the frozen weights in [nf4](GLOSSARY.md#nf4), a quarter of the memory (the article: two A100 of
# 80 GB for Falcon-180B, A15). There are two traps:
#
# - transformers 5.5 to 5.23 silently leaves Falcon unquantized (notebook 02); `models.load` repairs and proves it.
# - On a CPU with AVX512-BF16, bitsandbytes *repacks* nf4 weights in place at the first inference, even in an evaluation before or
#   during training. After that, training gets no gradient through the frozen layers, and merging gives garbage. `unpacked=True`
#   prevents this (`tests/unit/training/test_finetuning.py` shows both).

# %%
models.unload(mini)
mini = models.load(models.load_profile("laptop").falcon_chat, "nf4", unpacked=True)
print("an inference may repack the weights:", models.may_repack(mini.model))
models.report_table(mini)

# %% [markdown]
# ## 3 · The data, and what counts towards the loss
#
# The samples are questions and short right answers with other nouns: none of the test's nouns occurs in them, singular or plural.
# The questions have the same form as in the test. So the test shows whether the model can apply it to nouns on which it was not
# trained here. The [held-out samples](GLOSSARY.md#held-out), used to follow the [loss](GLOSSARY.md#loss) during training, use yet
# other nouns.

# %%
train = training.read_conversations(Path("data/animal_training.jsonl"))
shuffled = training.read_conversations(Path("data/animal_shuffled.jsonl"))
held_out = training.read_conversations(Path("data/animal_held_out.jsonl"))
print(f"{len(train)} conversations to train on, {len(held_out)} held out. The first:")
for message in train[0]:
    print(f"{message['role']}: {message['content']}")

# %% [markdown]
# Each reply becomes one example: everything before it in the chat format, the reply, and the end token after it. Only reply and
# end token count towards the loss (the rest has the label -100), because the model should not learn to write the user's lines.

# %%
examples = training.examples(mini, train)
panels.trained_tokens_html(mini.tokenizer, examples[0])

# %%
words = [mini.tokenizer.decode([token]) for token in examples[0].input_ids]
runs.record_figure("loss_tokens", figures.loss_tokens(words, examples[0].trained, mini.ref.name))

# %%
counts = training.token_counts(examples)
counts

# %% tags=["record"]
trained = {part: int(counts.loc[part, "trained"]) for part in ("reply", "end", "user")}
values = {f"trained_{part}_tokens": number for part, number in trained.items()}
runs.record_all(values, unit="tokens")

# %% [markdown]
# *[Packing](GLOSSARY.md#packing)* is a third trap: trl can put several examples in one row, to save padding. Plain transformers
# builds Falcon's mask without the position ids, so packed examples can read each other. The models of `models.load` keep them
# apart (`helpers/models/workarounds/grouped_cache.py`). Even so, `training.finetune` does not pack, so it is also safe for other
# models.
#
# ## 4 · Train a few steps, save, reload, merge
#
# `training.finetune` does what section 1 did, with the loss on the replies only and with checkpoints. After an interruption, run
# the cell again (or `workbook run --resume`): training continues from the last checkpoint and loses at most a tenth of the steps.

# %%
few = training.Recipe(steps=4, batch_size=8, warmup_steps=1, log_every=2, seed=seed)
folder = base.work_folder("mechanics")
small = training.finetune(mini, train[:32], few, folder)
print("loss:", [(point.step, round(point.loss, 3)) for point in small.history])

# %% [markdown]
# A fourth trap concerns training on several processes: `accelerate launch --cpu --num_processes 2` starts *one*. Start them with
# `torchrun --nproc_per_node 2`, and check how many really trained:

# %%
print("processes that trained:", small.processes)

# %% [markdown]
# The [adapter](GLOSSARY.md#adapter)'s folder holds only the thin matrices. Reloaded onto a fresh nf4 base, the adapter must give
# the same [logits](GLOSSARY.md#logit) as the model in memory.

# %%
import torch

ids = torch.tensor([examples[0].input_ids], device=small.loaded.model.device)
with torch.inference_mode():
    in_memory = small.loaded.model(ids).logits.float().cpu()
size = (folder / "adapter_model.safetensors").stat().st_size
print(f"adapter: {size / 2**20:.1f} MiB")
models.unload(small.loaded)
models.unload(mini)

# %%
reloaded = training.reload(folder)
with torch.inference_mode():
    again = reloaded.model(ids).logits.float().cpu()
distance = (again - in_memory).abs().max().item()
print(f"largest difference of a logit: {distance:.2g}")
models.unload(reloaded)

# %% [markdown]
# *Merging* adds `B·A` to the weights, so that the adapter is no longer needed. If we add it to 4-bit weights, the sum is rounded
# again. If we add it to the original bf16 weights, these are not the weights with which it was trained. The best method in our
# measurements: dequantize the nf4 base, add, save in bf16. (For Falcon-180B this takes 333 GiB, in memory and on disk.)

# %%
with tempfile.TemporaryDirectory() as place:
    merged = models.load(training.merge(folder, Path(place) / "merged"), "bf16")
    with torch.inference_mode():
        logits = merged.model(ids.to(merged.model.device)).logits.float().cpu()
models.unload(merged)
error = models.relative_error(logits, in_memory)
print(f"relative error of the logits: {error:.4f}")
shutil.rmtree(folder)

# %% tags=["record"]
values = {"reloaded_equals_memory": distance <= 1e-5, "merged_within_2_percent": error <= 0.02}
values["training_processes"] = Measured(small.processes, "processes")
runs.record_all(values)

# %% [markdown]
# ## 5 · Before
#
# The article's anecdote is a list: Falcon-180B counted a saddle among the animals. The profile names the model that we repair
# (`repair:` in `env/profiles`): the Falcon chat model on the GPU profiles, and SmolLM2 on `laptop`. falcon-mini cannot read a
# list yet: when this notebook still repaired it, it named the animals in none of the 24 lists, before 150 steps of 16 samples and
# after them. What a model cannot read, no answer can teach it.

# %%
loaded = models.load(settings.repaired, "nf4", unpacked=True)
name, label = settings.repaired.name, settings.repaired.label
print(f"05 repairs {label}")
items = evaluation.read_items(Path("data/animal_items.jsonl"))
everyday = evaluation.read_items(Path("data/everyday_questions.jsonl"))
texts = evaluation.read_texts(Path("data/perplexity_texts.jsonl"))[:12]

# %% [markdown]
# A reply shows form and knowledge at once: "A stork is a bird" is no yes and no no. So we ask the yes-or-no questions in a second
# way too, which needs no form. Which reply does the model find more *likely*, "Yes." or "No."?


# %%
def yes_or_no(item: evaluation.Item) -> evaluation.Question:
    message = {"role": "user", "content": item.question}
    return evaluation.Question([message], ("Yes.", "No."), ("yes", "no").index(item.answer[0]))


questions = [yes_or_no(item) for item in items if item.kind == "yes_no"]
short = Sampling(temperature=0, max_new_tokens=24, seed=seed)
talk = Sampling(temperature=0, max_new_tokens=40, seed=seed)
compare = partial(evaluation.compare, batch_size=questions_at_once)
before = compare(items, {"before": loaded}, short)
likely = {"before": evaluation.multiple_choice(loaded, questions)}

# %% [markdown]
# A fine-tune may break what the test does not ask. So we also ask twelve everyday questions, and measure the [bits per
# byte](GLOSSARY.md#bits-per-byte) of short stories, which are very different from the training samples.

# %%
daily = compare(everyday, {"before": loaded}, talk)
stories = {"before": evaluation.perplexity(loaded, texts)}
print(f"{stories['before'].bits_per_byte:.3f} bits per byte on {len(texts)} stories")
before.answers().round(3)

# %% [markdown]
# ## 6 · Train twice: on random answers, and on the true ones
#
# If the score rises after training on true answers, was it their truth? Perhaps the model learned nothing but the *form*: to say
# "Yes." or "No.", or one of the nouns, and to stop. To tell the two apart we need a placebo: the same recipe, the same questions,
# and answers of the same form that say nothing about animals. `data/make_animals.py` shuffles the answers among the samples of
# each kind; so each answer, and each place in a list, is as frequent as before.

# %%
for sample, other in zip(train[:6], shuffled[:6], strict=True):
    print(sample[0]["content"])
    print(f"    true: {sample[1]['content']:16} shuffled: {other[1]['content']}")

# %%
recipe = training.Recipe(
    steps=steps,
    batch_size=batch_size,
    learning_rate=learning_rate,
    warmup_steps=min(10, steps // 10),
    rank=rank,
    alpha=2 * rank,
    gradient_checkpointing=gradient_checkpointing,
    evaluate_every=max(1, steps // 4),
    seed=seed,
)
recipe

# %% [markdown]
# First the placebo. Its loss is measured on *true* held-out answers, at the start and at the end. Then we take the adapter off:
# the base below it has not changed.

# %%
work, once = base.work_folder("placebo"), replace(recipe, evaluate_every=steps)
placebo = training.finetune(loaded, shuffled, once, work, held_out=held_out[:40])
after_placebo = compare(items, {"shuffled": placebo.loaded}, short)
likely["shuffled"] = evaluation.multiple_choice(placebo.loaded, questions)
placebo.loaded.model.unload()  # peft: the base again, without the adapter
shutil.rmtree(work)

# %% [markdown]
# Then the true answers. The curve grows while the model trains.

# %%
work = base.work_folder("fine-tune")
draw = partial(figures.loss_curve, steps=steps, subject=f"{name}, nf4, LoRA rank {rank}")
curve = panels.LiveCurve(draw)
options = {"held_out": held_out[:40], "on_point": curve.update}
tuned = training.finetune(loaded, train, recipe, work, **options)
curve.finish(tuned.history)

# %%
losses = {
    stage: [p.held_out_loss for p in run.history if p.held_out_loss is not None]
    for stage, run in (("shuffled", placebo), ("true", tuned))
}
for stage, values in losses.items():
    print(f"{stage}: held-out loss {values[0]:.3f} before, {values[-1]:.3f} after {steps} steps")
settled = tuned.settled_step
fall = "it never fell" if settled is None else f"95% of its fall in the first {settled}"
print(f"true, of {steps} steps: {fall}")
runs.record_figure("loss", draw(tuned.history))

# %% tags=["record"]
options = {"unit": "nats a token", "tolerance": 0.1}
values = {"held_out_loss": Measured(round(losses["true"][-1], 3), **options)}
values["held_out_loss_shuffled"] = Measured(round(losses["shuffled"][-1], 3), **options)
values["trained_parameters"] = Measured(tuned.trainable_parameters, "parameters")
values["training_time"] = Measured(round(placebo.seconds + tuned.seconds, 1), "s")
runs.record_all(values, model=label)
step = settled or "none: it never fell"
runs.record_all({"settled_step": step}, tolerance=steps / 2, model=label)

# %% [markdown]
# ## 7 · After: form, or knowledge?
#
# The same items again. A reply that names no answer at all, such as "A stork is a bird", fails by its form; a wrong one fails by
# what it says.

# %%
after = compare(items, {"true": tuned.loaded}, short)
likely["true"] = evaluation.multiple_choice(tuned.loaded, questions)
test = before.beside(after_placebo).beside(after)
saddles = [number for number, item in enumerate(items) if "saddle" in item.question]
panels.replies_html(test, saddles)

# %%
runs.record_figure("stages", figures.reply_classes(test.answers(), f"{name}, nf4"))

# %% [markdown]
# All three stages answered the same items, so each difference is paired. What random answers gain is form. What true answers
# gain on top of it can be knowledge. By [likelihood](GLOSSARY.md#likelihood) nothing is written: there, random answers can
# only take away a preference for one of the two words. (The [intervals](GLOSSARY.md#interval) treat the items as independent;
# each noun is in four or five of them, so they are somewhat too narrow. And one training is one draw: another seed, `-p
# seed=1`, gives other numbers, mostly for yes and no.)

# %%
gains = {}
for kind in (*test.kinds, None):
    outcomes = [test.verdicts(stage, kind=kind) for stage in test.sides]
    gains[f"{kind or 'all'}, by reply"] = evaluation.Gain(*outcomes)
choices = [likely[stage].correct for stage in test.sides]
gains["yes_no, by likelihood"] = evaluation.Gain(*choices)
evaluation.Gain.table(gains).round(3)

# %%
for measure, gain in gains.items():
    print(f"{measure}: {gain.sentence()}")

# %% tags=["record"]
values = {}
for measure, gain in gains.items():
    key = measure.replace(", ", "_").replace(" ", "_")
    share = gain.form_share.estimate if gain.form_share else float("nan")
    values[f"form_share_{key}"] = base.known(share, "none: no gain", 3)
    for stage, outcomes in zip(test.sides, (gain.before, gain.placebo, gain.true), strict=True):
        values[f"{key}_{stage}"] = round(sum(outcomes) / len(outcomes), 4)
runs.record_all(values, tolerance=0.25, model=label)  # other seeds moved a score by up to a fifth

# %% [markdown]
# ## 8 · What it cost
#
# First as a reader feels it: the same twelve everyday questions, before and after.

# %%
daily = daily.beside(compare(everyday, {"true": tuned.loaded}, talk))
panels.replies_html(daily)

# %%
words = {stage: [len(r.text.split()) for r in daily.replies[stage]] for stage in daily.sides}
shorter = sum(b > a for b, a in zip(words["before"], words["true"], strict=True))
print(f"words in {len(everyday)} replies: {sum(words['before'])} -> {sum(words['true'])}")
print(f"{shorter} of {len(everyday)} replies became shorter")

# %% [markdown]
# Then as a loss: bits per byte of the stories, with the paired interval over the texts.

# %%
stories["true"] = evaluation.perplexity(tuned.loaded, texts)
bits = {stage: measured.bits_per_byte for stage, measured in stories.items()}
cost = base.paired_difference(
    stories["true"].bits, stories["before"].bits, stories["true"].text_bytes
)
print(f"{bits['before']:.3f} -> {bits['true']:.3f} bits per byte")
print(f"change: {cost.estimate:+.3f} ({cost.low:+.3f} to {cost.high:+.3f})")

# %% tags=["record"]
costs = {"bits_per_byte_before": Measured(round(bits["before"], 4), "bits/byte")}
costs["bits_per_byte_after"] = Measured(round(bits["true"], 4), "bits/byte", tolerance=0.05)
costs["everyday_words_before"] = Measured(sum(words["before"]), "words", tolerance=60)
costs["everyday_words_after"] = Measured(sum(words["true"]), "words", tolerance=120)
runs.record_all(costs, model=label)

# %%
models.unload(tuned.loaded)
models.unload(loaded)
shutil.rmtree(work)

# %% [markdown]
# ## 9 · Would more steps help?
#
# Three stages side by side: before, this run, and a longer training that took too long for this notebook, with a lower learning
# rate. Its results are stored with the command that made them (`data/repair_stage.json`). The held-out loss says when more steps gain little *on average*;
# most samples are yes-or-no questions. A hard kind of question may still improve after that, and the stories may still get worse.

# %%
import pandas as pd

columns = [*(f"{kind}_by_reply" for kind in (*test.kinds, "all")), "yes_no_by_likelihood"]
rows = {"before": [values[f"{column}_before"] for column in columns]}
this_run = f"this run: {steps} steps of {batch_size}, rate {learning_rate:g}"
rows[this_run] = [values[f"{column}_true"] for column in columns]
stage = training.stored_stage(Path("data/repair_stage.json"), settings.repaired)
if stage:
    rows[stage.title] = [stage.values[f"{column}_true"] for column in columns]
    print(stage.origin)
    print(stage.lesson(steps))
else:
    print(f"There is no stored stage of {name}.")
pd.DataFrame.from_dict(rows, orient="index", columns=columns).round(3)

# %% [markdown]
# ## What you saw
#
# Each line answers a goal from the top, with the numbers of this run.

# %%
whole, likelihood = gains["all, by reply"], gains["yes_no, by likelihood"]
told = trained["reply"] + trained["end"]
print(
    f"LoRA trained {trainable:,} of {everything:,} parameters of {mini.ref.name}; nf4 kept the rest."
)
print(f"{told:,} of {counts['tokens'].sum():,} tokens counted towards the loss.")
print(f"Reloading moved a logit by at most {distance:.2g}; merging moved them by {error:.2%}.")
print(f"{name}, all items by reply: {whole.sentence()}")
print(f"{name}, yes or no by likelihood: {likelihood.sentence()}")
print(f"{name}, of {steps} steps, held-out loss: {fall}.")
print(f"{name}: {bits['before']:.3f} -> {bits['true']:.3f} bits per byte on stories;")
print(f"{shorter} of {len(everyday)} everyday replies became shorter.")

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
#
# Replace the three dots and run the cell. The check says *not yet* and what is off, or *right*.
# `exercises.hint("05-1")` gives a hint, and one more each time. The solutions are folded. The last exercise asks for a finding:
# there may be several right answers, and the check measures yours.
#
# **1.** How many parameters does LoRA train for one linear layer?


# %% tags=["exercise"]
def lora_parameters(inputs: int, outputs: int, rank: int) -> int: ...


exercises.check("05-1", lora_parameters)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def lora_parameters(inputs: int, outputs: int, rank: int) -> int:
#     return rank * (inputs + outputs)  # A is rank x inputs, B is outputs x rank
#
#
# exercises.check("05-1", lora_parameters)
# ```
#
# </details>

# %% [markdown]
# **2.** Return the labels of an example whose first `prompt` tokens are only read: -100 for these (cross-entropy ignores it), and
# the token itself for the others.


# %% tags=["exercise"]
def labels(ids: list[int], prompt: int) -> list[int]: ...


exercises.check("05-2", labels)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def labels(ids: list[int], prompt: int) -> list[int]:
#     return [-100] * prompt + ids[prompt:]
#
#
# exercises.check("05-2", labels)
# ```
#
# </details>

# %% [markdown]
# **3.** Merge an adapter: return `weight` (outputs x inputs) with `a` (rank x inputs) and `b` (outputs x rank) added.


# %% tags=["exercise"]
def merged_weight(weight, a, b, alpha: float, rank: int): ...


exercises.check("05-3", merged_weight)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def merged_weight(weight, a, b, alpha: float, rank: int):
#     return weight + alpha / rank * (b @ a)
#
#
# exercises.check("05-3", merged_weight)
# ```
#
# </details>

# %% [markdown]
# **4. A finding.** Which rank is enough? Train falcon-mini in nf4 with at least three ranks, the largest at least 8 times the
# smallest: 12 steps of 8 conversations, `warmup_steps=2`, `alpha=2 * rank`, seed 0, and the first 40 held-out conversations.
# Choose the smallest rank whose last held-out loss is within 0.1 nats per token of the best. Give the rank and all the losses. The
# check trains the rank that you chose, and the best, once more (a minute at most).

# %% tags=["exercise"]
choice = ...  # (rank, {rank: held-out loss, ...})

exercises.check("05-4", choice)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# losses = {}
# for rank in (1, 4, 16):
#     mini = models.load(models.load_profile("laptop").falcon_chat, "nf4", unpacked=True)
#     options = {"steps": 12, "batch_size": 8, "warmup_steps": 2, "evaluate_every": 12}
#     recipe = training.Recipe(**options, rank=rank, alpha=2 * rank)
#     with tempfile.TemporaryDirectory() as folder:
#         out = training.finetune(mini, train, recipe, Path(folder), held_out=held_out[:40])
#     losses[rank] = out.history[-1].held_out_loss
# choice = (min(r for r in losses if losses[r] <= min(losses.values()) + 0.1), losses)
#
# exercises.check("05-4", choice)
# ```
#
# </details>

# %% [markdown]
# **Before:** [04 · Falcon and Llama](04_falcon_vs_llama.ipynb) · **This is the last notebook.** · [Glossary](GLOSSARY.md)
