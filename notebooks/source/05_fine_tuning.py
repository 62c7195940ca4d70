# ---
# jupyter:
#   workbook:
#     models:
#       falcon_chat: [nf4]
#       laptop/falcon_chat: [bf16]
#     work:
#       falcon_chat:
#         - {load: 2}
#         - {reply: 336, tokens: 24, prompt: 34, together: questions_at_once}
#         - {read: 64, tokens: 190, together: 4}
#         - {read: 400, tokens: 40, together: batch_size}
#         - {train: steps, tokens: 40, together: batch_size}
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
# - how to tell what a fine-tune repaired from what it broke, with the test of notebook 04;
# - how to avoid four silent traps.
#
# | profile | time | memory |
# |---|---|---|
# | `laptop` | 100 s | 2 GiB |
# | `1x24gb` | minutes, after a download of 14 GB | one 24 GB GPU |
# | `2x80gb`, `8x40gb`, `8x80gb` | hours, after a download of 360 GB | see notebook 00 |
#
# **Before:** [04 · Falcon and Llama](04_falcon_vs_llama.ipynb) · **This is the last notebook.**

# %% tags=["parameters"]
profile = "laptop"
seed = 0
steps = 150
batch_size = 16
learning_rate = 0.002
rank = 16
questions_at_once = 56
gradient_checkpointing = False
merge = True

# %%
import shutil
import tempfile
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
# ## 1 · LoRA, plainly
#
# LoRA freezes a model's matrices `W` and trains two thin ones next to each: the layer computes `W·x + (alpha / rank)·B·A·x`. With
# rank 16 these are a few percent of the weights (0.15% of Falcon-180B's), and only they need gradients and optimizer state. Here
# it is with peft and trl, for three steps, on a small model that runs everywhere: `falcon-mini-chat`.

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
# QLoRA keeps the frozen weights in nf4, a quarter of the memory (the article: two A100 of 80 GB for Falcon-180B, A15). There are
# two traps:
#
# - transformers 5.5 to 5.23 silently leaves Falcon unquantized (notebook 02); `models.load` repairs and proves it.
# - On a CPU with AVX512-BF16, bitsandbytes *repacks* nf4 weights in place at the first inference, even in an evaluation before or
#   during training. After that, training gets no gradient through the frozen layers, and merging gives garbage. `unpacked=True`
#   prevents this (`tests/unit/training/test_finetuning.py` shows both).

# %%
models.unload(mini)
loaded = models.load(settings.falcon_chat, "nf4", unpacked=True)
print("an inference may repack the weights:", models.may_repack(loaded.model))
models.report_table(loaded)

# %% [markdown]
# ## 3 · Before
#
# We run the animal test of notebook 04. We also measure the perplexity of short stories, which are very different from the
# training samples: what does the fine-tune break?

# %%
items = evaluation.read_items(Path("data/animal_items.jsonl"))
short = Sampling(temperature=0, max_new_tokens=24, seed=seed)
before = evaluation.compare(items, {"before": loaded}, short, batch_size=questions_at_once)
before.scores().round(3)

# %%
texts = evaluation.read_texts(Path("data/perplexity_texts.jsonl"))
bits_before = evaluation.perplexity(loaded, texts).bits_per_byte
print(f"{bits_before:.3f} bits per byte on {len(texts)} stories")

# %% [markdown]
# ## 4 · The data, and what counts towards the loss
#
# The samples are questions and short right answers with other nouns: none of the test's nouns occurs in them, singular or plural.
# The questions have the same form as in the test. So the test shows whether the model can apply it to nouns on which it was not
# trained here. The held-out samples, used to follow the loss during training, use yet other nouns.

# %%
train = training.read_conversations(Path("data/animal_training.jsonl"))
held_out = training.read_conversations(Path("data/animal_held_out.jsonl"))
print(f"{len(train)} conversations to train on, {len(held_out)} held out. The first:")
for message in train[0]:
    print(f"{message['role']}: {message['content']}")

# %% [markdown]
# Each reply becomes one example: everything before it in the chat format, the reply, and the end token after it. Only reply and
# end token count towards the loss (the rest has the label -100), because the model should not learn to write the user's lines.

# %%
examples = training.examples(loaded, train)
panels.trained_tokens_html(loaded.tokenizer, examples[0])

# %%
counts = training.token_counts(examples)
counts

# %% tags=["record"]
trained = {part: int(counts.loc[part, "trained"]) for part in ("reply", "end", "user")}
values = {f"trained_{part}_tokens": number for part, number in trained.items()}
runs.record_all(values, unit="tokens")

# %% [markdown]
# *Packing* is a third trap: trl can put several examples in one row, to save padding. Plain transformers builds Falcon's mask
# without the position ids, so packed examples can read each other. The models of `models.load` keep them apart
# (`helpers/models/workarounds/grouped_cache.py`). Even so, `training.finetune` does not pack, so it is also safe for other
# models.
#
# ## 5 · Train
#
# The curve grows while the model trains. The held-out samples are evaluated during training, with the same unpacked weights.
# After an interruption, run the cell again (or `workbook run --resume`): training continues from the last checkpoint and loses at
# most a tenth of the steps.

# %%
recipe = training.Recipe(
    steps=steps,
    batch_size=batch_size,
    learning_rate=learning_rate,
    rank=rank,
    alpha=2 * rank,
    gradient_checkpointing=gradient_checkpointing,
    seed=seed,
)
recipe

# %%
work = base.work_folder("fine-tune")
label = settings.falcon_chat.label
draw = partial(figures.loss_curve, steps=steps, subject=f"{label}, nf4, LoRA rank {rank}")
curve = panels.LiveCurve(draw)
tuned = training.finetune(loaded, train, recipe, work, held_out=held_out, on_point=curve.update)
curve.finish(tuned.history)

# %%
losses = [p.held_out_loss for p in tuned.history if p.held_out_loss is not None]
print(f"held-out loss: {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
print(f"{tuned.left_out} replies were longer than the context and left out")
runs.record_figure("loss", draw(tuned.history))

# %% [markdown]
# A fourth trap concerns training on several processes: `accelerate launch --cpu --num_processes 2` starts *one*. Start them with
# `torchrun --nproc_per_node 2`, and check how many really trained:

# %%
print("processes that trained:", tuned.processes)

# %% tags=["record"]
loss = Measured(round(losses[-1], 3), "nats a token", tolerance=0.05, model=label)
values = {"held_out_loss": loss}
values["trained_parameters"] = Measured(tuned.trainable_parameters, "parameters", model=label)
values["training_time"] = Measured(round(tuned.seconds, 1), "s", model=label)
values["training_processes"] = Measured(tuned.processes, "processes")
runs.record_all(values)

# %% [markdown]
# ## 6 · After: repaired, and broken
#
# The same items again, and the same texts.

# %%
after = evaluation.compare(items, {"after": tuned.loaded}, short, batch_size=questions_at_once)
both = before.beside(after)
saddles = [number for number, item in enumerate(items) if "saddle" in item.question]
panels.replies_html(both, saddles)

# %%
scores = both.scores()
runs.record_figure("before_after", figures.score_intervals(scores, f"{label}, nf4"))

# %%
for side in both.sides:
    score = both.score(side)
    print(f"{side}: {score.estimate:.3f} correct ({score.low:.3f} to {score.high:.3f})")
yes_no = [number for number, item in enumerate(items) if item.kind == "yes_no"]
replies = [after.replies["after"][number].text for number in yes_no]
count = sum(evaluation.names(reply, "yes") for reply in replies)
print(f"after: says yes to {count} of {len(yes_no)}, half of which are animals")
difference = both.difference("after", "before")
low, high = difference.interval.low, difference.interval.high
print(f"after - before: {difference.interval.estimate:+.3f} ({low:+.3f} to {high:+.3f})")
print(f"McNemar's exact p: {difference.p_value:.2g}")

# %% [markdown]
# Look at the figure again: which kinds of question improved, and which did not? (The interval and p treat the items as
# independent; each noun is in four or five of them, so both are somewhat overconfident.)
#
# What did it cost elsewhere, on the stories?

# %%
bits_after = evaluation.perplexity(tuned.loaded, texts).bits_per_byte
print(f"{bits_before:.3f} -> {bits_after:.3f} bits per byte")

# %% tags=["record"]
yes_no_after = both.score("after", kind="yes_no").estimate
values = {"yes_no_after": Measured(round(yes_no_after, 4), tolerance=0.06)}
for side in both.sides:
    score = round(both.score(side).estimate, 4)
    values[f"animal_score_{side}"] = Measured(score, tolerance=0.05)
values["bits_per_byte_before"] = Measured(round(bits_before, 4), "bits/byte")
values["bits_per_byte_after"] = Measured(round(bits_after, 4), "bits/byte", tolerance=0.05)
runs.record_all(values, model=label)

# %% [markdown]
# ## 7 · Save, reload, merge
#
# The adapter's folder holds only the thin matrices. Reloaded onto a fresh nf4 base, the adapter must give the same logits as the
# model in memory.

# %%
import torch

device = tuned.loaded.model.device
ids = torch.tensor([examples[0].input_ids], device=device)
with torch.inference_mode():
    in_memory = tuned.loaded.model(ids).logits.float().cpu()
size = (work / "adapter_model.safetensors").stat().st_size
print(f"adapter: {size / 2**20:.1f} MiB")
models.unload(tuned.loaded)
models.unload(loaded)

# %%
reloaded = training.reload(work)
with torch.inference_mode():
    again = reloaded.model(ids).logits.float().cpu()
distance = (again - in_memory).abs().max().item()
print(f"largest difference of a logit: {distance:.2g}")
models.unload(reloaded)

# %% [markdown]
# *Merging* adds `B·A` to the weights, so that the adapter is no longer needed. If we add it to 4-bit weights, the sum is rounded
# again. If we add it to the original bf16 weights, these are not the weights with which it was trained. The best method in our
# measurements: dequantize the nf4 base, add, save in bf16. (This takes the whole model in 16 bits, in memory and on disk; the
# profiles of the 180B set `merge: false`.)

# %%
if merge:
    with tempfile.TemporaryDirectory() as folder:
        merged = models.load(training.merge(work, Path(folder) / "merged"), "bf16")
        with torch.inference_mode():
            logits = merged.model(ids.to(merged.model.device)).logits.float().cpu()
    error = models.relative_error(logits, in_memory)
    print(f"relative error of the logits: {error:.4f}")
shutil.rmtree(work)

# %% tags=["record"]
values = {"reloaded_equals_memory": distance <= 1e-5}
if merge:
    values["merged_within_2_percent"] = error <= 0.02
runs.record_all(values)

# %% [markdown]
# ## What you saw
#
# A short training on short answers changed what the model says about animals, also for nouns on which it was not trained. The
# same test before and after shows how much it gained, and the perplexity shows what it cost.

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
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
