# ---
# jupyter:
#   workbook:
#     models:
#       falcon_chat: [nf4]
#       laptop/falcon_chat: [bf16]
# ---

# %% [markdown]
# # 05 · Fine-tuning: repair what the comparison found
#
# **You will learn**
# - what LoRA trains, and what QLoRA adds to it;
# - which tokens of a conversation carry the loss, and which only are read;
# - how to train, save, reload and merge an adapter, and how far each step changes the model;
# - how to tell what a fine-tune repaired from what it broke, with the test of notebook 04;
# - four silent traps on the way.
#
# | profile | time | memory |
# |---|---|---|
# | `laptop` | 100 s | 2 GiB |
# | `1x24gb` | minutes, after a download of 14 GB | one 24 GB GPU |
# | `2x80gb`, `8x40gb`, `8x80gb` | hours, after a download of 360 GB | see notebook 00 |
#
# **Before:** [04 · Falcon beside Llama](04_falcon_vs_llama.ipynb) · **This is the last notebook.**

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

models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# ## 1 · LoRA, plainly
#
# LoRA freezes a model's matrices `W` and trains two thin ones beside each: the layer computes `W·x + (alpha / rank)·B·A·x`. With rank 16 these
# are a few percent of the weights (0.15% of Falcon-180B's), and only they need gradients and optimizer state. Here is the plain way with peft and trl, for three
# steps, on a small model that runs everywhere: `falcon-mini-chat`.

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
# peft's default for Falcon is `query_key_value` alone; the four names are all linear layers of the decoder. By hand: a layer from `n`
# to `m` numbers gets `rank · (n + m)` parameters.

# %%
by_hand = sum(16 * (layer.in_features + layer.out_features) for layer in linear)
print(f"{len(linear)} layers, {by_hand:,} parameters by hand")
runs.record("lora_parameters_by_hand", by_hand == trainable)

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

# %% [markdown]
# ## 2 · The base in four bits
#
# QLoRA keeps the frozen weights in nf4, a quarter of the memory (the article: two A100 of 80 GB for Falcon-180B, A15). Two traps wait here:
#
# - transformers 5.5 to 5.23 leaves Falcon unquantized without a word (notebook 02); `loading.load` repairs and proves it.
# - On a CPU with AVX512-BF16, bitsandbytes *repacks* nf4 weights in place at the first inference. After that, training gets no gradient through
#   the frozen layers, and merging gives garbage. An evaluation before or during training is enough. `unpacked=True` prevents it (tests/unit/test_finetuning.py shows both).

# %%
models.unload(mini)
loaded = models.load(settings.falcon_chat, "nf4", unpacked=True)
print("an inference may repack the weights:", models.may_repack(loaded.model))
models.report_table(loaded)

# %% [markdown]
# ## 3 · Before
#
# The animal test of notebook 04, and the perplexity of short stories, which are nothing like the samples: what may a fine-tune break?

# %%
items = evaluation.read_items(Path("data/animal_items.jsonl"))
short = Sampling(temperature=0, max_new_tokens=24, seed=seed)
before = evaluation.compare(items, {"before": loaded}, short, batch_size=questions_at_once)
before.scores().round(3)

# %%
import pandas as pd

texts = pd.read_json("data/perplexity_texts.jsonl", lines=True)["text"].tolist()
bits_before = evaluation.perplexity(loaded, texts).bits_per_byte
print(f"{bits_before:.3f} bits per byte on {len(texts)} stories")

# %% [markdown]
# ## 4 · The data, and what carries the loss
#
# Questions and short right answers over other nouns: *none* of the test's is among them, in either number. The form of the questions is the
# test's own: what is tested is whether the model can apply it to nouns that it was not trained on here. The held-out samples, for the
# loss on the way, are made of nouns of their own.

# %%
train = training.read_conversations(Path("data/animal_training.jsonl"))
held_out = training.read_conversations(Path("data/animal_held_out.jsonl"))
print(f"{len(train)} conversations to train on, {len(held_out)} held out. The first:")
for message in train[0]:
    print(f"{message['role']}: {message['content']}")

# %% [markdown]
# Each reply becomes one example: everything before it in the chat format, the reply, and the end token after it. Only reply and end token
# carry the loss (labels of -100 for the rest): the model is not to learn to write the user's lines.

# %%
found = training.examples(loaded, train)
panels.trained_tokens_html(loaded.tokenizer, found[0])

# %%
counts = training.token_counts(found)
runs.record("trained_reply_tokens", int(counts.loc["reply", "trained"]), "tokens")
runs.record("trained_end_tokens", int(counts.loc["end", "trained"]), "tokens")
runs.record("trained_user_tokens", int(counts.loc["user", "trained"]), "tokens")
counts

# %% [markdown]
# A third trap: *packing*, several examples in one row, is trl's way to save padding. Falcon in transformers alone builds its mask without
# looking at position ids, so packed examples would read each other. The models of `loading.load` keep them apart
# (`helpers/grouped_cache.py`); `finetuning` does not pack all the same, so that a model from elsewhere is safe with it too.
#
# ## 5 · Train
#
# The curve grows while the model trains. The held-out samples are evaluated on the way, with the same unpacked weights.
# Interrupted, the same call goes on from its last checkpoint, a tenth of the way at most behind: in the notebook, run the cell again; of a run
# in the terminal, `workbook run --resume` does it.

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
work = base.work_folder("fine-tune")
recipe

# %%
label = settings.falcon_chat.label
draw = partial(figures.loss_curve, steps=steps, subject=f"{label}, nf4, LoRA rank {rank}")
curve = panels.LiveCurve(draw)
tuned = training.finetune(loaded, train, recipe, work, held_out=held_out, on_point=curve.update)
curve.finish(tuned.history)

# %%
runs.record_figure("loss", draw(tuned.history))
losses = [p.held_out_loss for p in tuned.history if p.held_out_loss is not None]
print(f"held-out loss: {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
runs.record("held_out_loss", round(losses[-1], 3), "nats a token", tolerance=0.05, model=label)
runs.record("trained_parameters", tuned.trainable_parameters, "parameters", model=label)
runs.record("training_time", round(tuned.seconds, 1), "s", model=label)
print(f"{tuned.left_out} replies were longer than the context and left out")

# %% [markdown]
# A fourth trap is for several processes: `accelerate launch --cpu --num_processes 2` starts *one*. Start them with `torchrun
# --nproc_per_node 2`, and ask how many really trained:

# %%
runs.record("training_processes", tuned.processes, "processes")

# %% [markdown]
# ## 6 · After: repaired, and broken
#
# The same items again, and the same texts.

# %%
after = evaluation.compare(items, {"after": tuned.loaded}, short, batch_size=questions_at_once)
both = before.beside(after)
shown = [number for number, item in enumerate(items) if "saddle" in item.question]
panels.replies_html(both, shown)

# %%
scores = both.scores()
runs.record_figure("before_after", figures.score_intervals(scores, f"{label}, nf4"))

# %%
for side in both.sides:
    score = both.score(side)
    print(f"{side}: {score.estimate:.3f} correct ({score.low:.3f} to {score.high:.3f})")
    runs.record(f"animal_score_{side}", round(score.estimate, 4), tolerance=0.05, model=label)
asked = [number for number, item in enumerate(items) if item.kind == "yes_no"]
said = sum(evaluation.names(after.replies["after"][number].text, "yes") for number in asked)
print(f"after: says yes to {said} of {len(asked)}, half of which are animals")
yes_no = both.score("after", kind="yes_no").estimate
runs.record("yes_no_after", round(yes_no, 4), tolerance=0.06, model=label)
difference = both.difference("after", "before")
low, high = difference.interval.low, difference.interval.high
print(f"after - before: {difference.interval.estimate:+.3f} ({low:+.3f} to {high:+.3f})")
print(f"McNemar's exact p: {difference.p_value:.2g}")

# %% [markdown]
# Look at the figure again: which kinds of question gained, and which did not? (The interval and p take the items for independent; each noun is in four or five of them, so both are somewhat too sure.)
#
# What it cost elsewhere: the stories.

# %%
bits_after = evaluation.perplexity(tuned.loaded, texts).bits_per_byte
print(f"{bits_before:.3f} -> {bits_after:.3f} bits per byte")
runs.record("bits_per_byte_before", round(bits_before, 4), "bits/byte", model=label)
runs.record("bits_per_byte_after", round(bits_after, 4), "bits/byte", tolerance=0.05, model=label)

# %% [markdown]
# ## 7 · Save, reload, merge
#
# The adapter's folder holds only the thin matrices. Reloaded onto a fresh nf4 base it must give the same logits as the model in memory.

# %%
import torch

device = tuned.loaded.model.device
ids = torch.tensor([found[0].input_ids], device=device)
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
runs.record("reloaded_equals_memory", distance <= 1e-5)
models.unload(reloaded)

# %% [markdown]
# *Merging* adds `B·A` to the weights, so that no adapter is needed any more. Inside 4-bit weights the sum would be rounded anew; added to the original bf16
# weights it meets others than those it was trained on. The best way measured: dequantize the nf4 base, add, save in bf16. (That takes the whole
# model in 16 bits, in memory and on disk; the profiles of the 180B set `merge: false`.)

# %%
if merge:
    with tempfile.TemporaryDirectory() as folder:
        merged = models.load(training.merge(work, Path(folder) / "merged"), "bf16")
        with torch.inference_mode():
            logits = merged.model(ids.to(merged.model.device)).logits.float().cpu()
    error = training.relative_error(logits, in_memory)
    print(f"relative error of the logits: {error:.4f}")
    runs.record("merged_within_2_percent", error <= 0.02)
shutil.rmtree(work)

# %% [markdown]
# ## What you saw
#
# A short training on short answers changed what the model says about animals, also of nouns that it was not trained on; the same test
# before and after shows how much, and the perplexity what it cost.

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
# **2.** The labels of an example whose first `prompt` tokens are only read: -100 there (which cross-entropy leaves out), the token itself
# elsewhere.


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
# **3.** Merge: the weight (outputs x inputs) with `a` (rank x inputs) and `b` (outputs x rank) added.


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
