# ---
# jupyter:
#   workbook:
#     models: {}
#     work: {}
#     parameters:
#       seed: {least: 0, most: 4294967295}
# ---

# %% [markdown]
# # 00 · Start here: what Falcon-180B is, and what this machine can run
#
# In September 2023 the Technology Innovation Institute (TII) released Falcon-180B: 180 billion parameters, trained on
# 3.5 trillion tokens. For a time it was the highest-ranked open model. An article, based on the model's
# [announcement](https://huggingface.co/blog/falcon-180b), listed many figures. This notebook takes these figures one by one
# and checks each of them if arithmetic is enough. It loads no model. Codes such as A5 number the article's statements; section 6
# lists them.
#
# **You will learn**
# - how to count a model's parameters from its configuration, without downloading its weights;
# - how training compute, GPU hours and utilisation are related;
# - what a key-value cache costs, and what *multi-query attention* saves;
# - which machine runs Falcon-180B in which precision, and what *your* machine can run.
#
# | profile | time | memory |
# |---|---|---|
# | `laptop` | 15 s | 1 GiB |
# | all others | 15 s | 1 GiB |
#
# **Next:** [01 · Loading](01_loading.ipynb)

# %% tags=["parameters"]
profile = "laptop"
seed = 0  # nothing here is random, but all notebooks take a seed

# %% [markdown]
# These are the models of this profile. On a laptop, *stand-ins* take the place of the real ones: tiny models with the same
# architecture. What a stand-in says or scores is **not** what Falcon-180B says or scores, so its name is always shown with the
# word *stand-in*.

# %%
from helpers import exercises, figures, machine, models, panels, runs
from helpers.runs import Measured

notebook_name = "00_start_here"  # recorded and expected values are found by this name
models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# ## 1 · One hundred and eighty billion?
#
# A configuration of a few hundred bytes fixes the shape of every weight. On PyTorch's *meta* device a model has shapes but no
# storage, so all 80 layers can be built and counted in a moment. `word_embeddings` and `lm_head` may share one matrix
# (*tied*); counting it twice gives the larger number.

# %%
import torch
from transformers import FalconForCausalLM

config = machine.published_config("tiiuae/falcon-180B")
with torch.device("meta"):
    model = FalconForCausalLM(config)
tied = model.num_parameters()
untied = tied + model.lm_head.weight.numel()
print(f"{tied:,} parameters with the head tied to the embeddings")
print(f"{untied:,} with the head counted separately")

# %% [markdown]
# `machine.count_parameters` computes the same numbers with a formula. The planner below uses it too.
#
# *180 billion* is fair. The article calls Falcon-180B a scaled-up Falcon-40B, after models of 1.3B, 7.5B and 40B (A7). Here are
# two of this family and the rival, counted from their configurations. The article says that Falcon-180B is 2.5 times as large as
# Llama-2-70B; counting gives a little more.

# %%
import pandas as pd

assert machine.count_parameters(config) == tied
names = ["tiiuae/falcon-7b", "tiiuae/falcon-40b", "tiiuae/falcon-180B"]
names.append("meta-llama/Llama-2-70b-chat-hf")
rows = []
for name in names:
    shape = machine.published_config(name)
    billions = machine.count_parameters(shape) / 1e9
    rows.append((name, f"{billions:.2f}", shape.num_hidden_layers, shape.hidden_size))
llama = machine.count_parameters(machine.published_config("meta-llama/Llama-2-70b-chat-hf"))
print(f"Falcon-180B is {tied / llama:.2f} times as large as Llama-2-70B")
columns = ["model", "billion parameters", "layers", "hidden size"]
pd.DataFrame(rows, columns=columns).set_index("model")

# %% [markdown]
# Each section ends with a cell that records its values for the report. *Expected* values come from earlier runs of this
# notebook, so *as expected* means *reproduced*; it does not mean that the article is right. *Unmeasured* means that there is no
# value to compare with.


# %% tags=["record"]
def near(value, published):
    return abs(value / published - 1) < 0.05  # a rounded figure agrees if it is within 5%


small = machine.count_parameters(machine.published_config("tiiuae/falcon-7b"), tied=False)
middle = machine.count_parameters(machine.published_config("tiiuae/falcon-40b"), tied=False)
ratio = round(tied / llama, 3)
values = {"parameters_tied": Measured(tied, claim="A1", agrees=near(tied, 180e9))}
values["parameters_untied"] = Measured(untied, claim="A1")
values["parameters_falcon-7b"] = Measured(small, claim="A7", agrees=near(small, 7.5e9))
values["parameters_falcon-40b"] = Measured(middle, claim="A7", agrees=near(middle, 40e9))
values["size_ratio_to_llama"] = Measured(ratio, "x", "A5", agrees=near(ratio, 2.5))
runs.record_all(values, unit="parameters")

# %% [markdown]
# ## 2 · Four times the compute
#
# Training a dense transformer of N parameters on D tokens takes about 6·N·D floating-point operations: for each parameter and
# token, two in the forward pass and four in the backward pass ([Kaplan et al. 2020](https://arxiv.org/abs/2001.08361)).
# Falcon-180B saw 3.5 trillion tokens, less than one epoch of its data; Llama 2 saw 2 trillion.

# %%
falcon_flop = 6 * tied * 3.5e12
llama_flop = 6 * llama * 2e12
assert falcon_flop == machine.training_flop(tied, 3.5e12)
print(f"{falcon_flop / llama_flop:.2f} times the training compute of Llama-2-70B")
compute = {"Falcon-180B": falcon_flop, "Llama-2-70B": llama_flop}
runs.record_figure("training_compute", figures.training_compute(compute))

# %% [markdown]
# *Four times* is rounded down. We can also check *less than one epoch* (A2): 85% of the tokens come from RefinedWeb, which has
# five trillion ([Penedo et al. 2023](https://arxiv.org/abs/2306.01116)).
#
# Training ran on up to 4096 GPUs at once on Amazon SageMaker (A100s, says the model card), for about 7,000,000 GPU hours. An A100
# has a peak of 312 TFLOP/s in bf16 (NVIDIA's data sheet). What share of that peak do these figures imply?

# %%
web = 0.85 * 3.5e12
utilisation = machine.implied_utilisation(falcon_flop, gpu_hours=7e6, peak=312e12)
days = 7e6 / 4096 / 24
print(f"web tokens used: {web / 5e12:.1%} of RefinedWeb")
print(f"utilisation: {utilisation:.1%} of the peak; {days:.0f} days on 4096 GPUs")

# %% [markdown]
# This utilisation is a little above the best of the runs in the PaLM paper (21% to 46%,
# [Chowdhery et al. 2022](https://arxiv.org/abs/2204.02311), table 3) and below the 54.2% that others reached on 2240 A100s
# ([Korthikanti et al. 2022](https://arxiv.org/abs/2205.05198)). So the three figures are consistent, but only just. With 4096
# GPUs all the time, training would have taken ten weeks.

# %% tags=["record"]
ratio = round(falcon_flop / llama_flop, 3)
reached = 0.2 < utilisation < 0.542  # the shares of the peak in the papers above
values = {"compute_ratio_to_llama": Measured(ratio, "x", "A6", agrees=near(ratio, 4))}
share = round(web / 5e12, 3)
values["share_of_refinedweb"] = Measured(share, "of its tokens", "A2", agrees=web < 5e12)
values["implied_utilisation"] = Measured(round(utilisation, 3), "of peak", "A4", agrees=reached)
values["days_on_4096_gpus"] = Measured(round(days, 1), "days", "A4")
runs.record_all(values)

# %% [markdown]
# ## 3 · Multi-query attention: a cache of 8 heads, not 232
#
# While a model writes, it keeps the keys and values of all tokens so far: the *KV cache*. With one key-value head for all query
# heads, attention is called *multi-query*; with a few, *grouped-query*. The article uses the first name for the 8 key-value heads
# of Falcon-180B. Llama-2-70B has 8 as well.
#
# Falcon-180B has 232 query heads. A token takes *2 · layers · heads · head size · bytes* of cache (2: keys and values), with 8
# heads instead of 232. The article says that this improves *scalability*. Here is how much it saves:

# %%
head_size = config.hidden_size // config.num_attention_heads
eight = 2 * config.num_hidden_layers * config.num_kv_heads * head_size * 2
all_heads = 2 * config.num_hidden_layers * config.num_attention_heads * head_size * 2
assert eight == machine.kv_bytes_per_token(config, "bf16", heads="kv")
assert all_heads == machine.kv_bytes_per_token(config, "bf16", heads="library")
print(f"8 heads: {eight / 2**10:.0f} KiB per token; 232: {all_heads / 2**20:.2f} MiB per token")
caches = {"8 heads": eight, "232 heads": all_heads}
figure = figures.cache_growth(caches, config.max_position_embeddings, "Falcon-180B")
runs.record_figure("cache_growth", figure)

# %% [markdown]
# The upper line is a surprise: transformers copies the 8 heads to all 232 *before* it stores them, so Falcon-180B needs 29 times
# as much cache in plain transformers. The models of this workbook store 8, as vLLM and llama.cpp do. Notebook 01 measures both on
# real caches.

# %% tags=["record"]
values = {"kv_bytes_8_heads": Measured(eight, agrees=eight < all_heads)}
values["kv_bytes_232_heads"] = all_heads
runs.record_all(values, unit="bytes/token", claim="A8")

# %% [markdown]
# ## 4 · Which machine?
#
# For each kind of work, the article lists the machine on which it was tried. A smaller machine may be enough. The table compares
# the published machine with the sum of the bytes: weights, cache for 2048 tokens, gradients, optimizer and activations.
#
# For inference, a GPU holds whole layers, and 5% of it is kept free. For training, weights and optimizer state are split evenly
# (ZeRO-3). Each GPU also holds its own sequence and the layers that it has just gathered, so the total grows with the number of
# GPUs. What comes and goes leaves fragments: we count 37%, computed from one published run; another run left more, so the number
# of GPUs for full fine-tuning is a rough one. With these terms, the plan is within 10% of nearly all memory figures that others
# published for fine-tuning Falcon and Llama 2 (`tests/unit/machine/test_published_memory.py`).

# %%
machines_table = machine.hardware_claims()
machines_table

# %% [markdown]
# And by precision, for generating text:

# %%
estimates = {p: machine.estimate(config, p) for p in ("bf16", "int8", "nf4")}
machines = {"8x A100 80GB": 8 * 80e9, "8x A100 40GB": 8 * 40e9, "2x A100 80GB": 2 * 80e9}
figure = figures.memory_by_precision(list(estimates.values()), machines, "Falcon-180B")
runs.record_figure("memory_by_precision", figure)

# %% tags=["record"]
values = {}
for row in machines_table.to_dict("records"):
    use, claim = row["use"].replace(" ", "_"), row["claim"]
    size = 40 if "40GB" in row["published machine"] else 80
    holds = size * row[f"least {size} GB GPUs"] <= row["published GB"]
    values[f"least_80gb_gpus_{use}"] = Measured(row["least 80 GB GPUs"], "GPUs", claim)
    values[f"published_machine_holds_{use}"] = Measured(holds, "", claim, agrees=holds)
for precision, estimate in estimates.items():
    values[f"inference_{precision}"] = Measured(round(estimate.total / 2**30, 1), "GiB")
runs.record_all(values)

# %% [markdown]
# ### Plan your own
#
# Choose a model, a precision, the work and a machine. In an unattended run this cell shows the plan for the first
# settings instead of sliders.

# %%
panels.memory_planner()

# %% [markdown]
# ## 5 · What this machine can run

# %%
this_machine = machine.detect()
memory_gib = this_machine.ram_bytes / 2**30
gpus = len(this_machine.gpus)
print(f"{this_machine.cpu_count} CPUs, {memory_gib:.1f} GiB of memory, {gpus} GPUs")
print(f"{this_machine.disk_free_bytes / 2**30:.0f} GiB free on disk")
rows = []
for name in models.available():
    candidate = models.load_profile(name)
    missing = models.missing(candidate, this_machine, models.downloaded_bytes(candidate))
    rows.append((name, "; ".join(missing) or "runs here"))
pd.DataFrame(rows, columns=["profile", "on this machine"]).set_index("profile")

# %% [markdown]
# To write one token, a model reads all its weights once. For a single reply, the memory bandwidth divided by the size of the
# weights is therefore an upper limit on tokens per second. Here is this machine's bandwidth, and the limit it would set if
# Falcon-180B's weights were in its memory:

# %%
bandwidth = machine.memory_bandwidth()
rows = [
    (p, f"{bandwidth.best / machine.weight_bytes(config, p):.3f}") for p in ("bf16", "int8", "nf4")
]
print(f"memory bandwidth: {bandwidth}")
pd.DataFrame(rows, columns=["precision", "tokens/s at most"]).set_index("precision")

# %% [markdown]
# ## 6 · What the article says, and where this workbook tests it
#
# | | the article says | here |
# |---|---|---|
# | A1, A5, A7 | 180 billion parameters, 2.5 times Llama-2-70B; after 1.3B, 7.5B and 40B | section 1 |
# | A4, A6 | up to 4096 GPUs, 7,000,000 GPU hours; 4 times the compute of Llama 2 | section 2 |
# | A8 | multi-query attention improves scalability | section 3, notebook 01 |
# | A13 to A17 | hardware: full fine-tune 5120 GB, LoRA 1280, QLoRA 160, bf16 inference 640, int4 inference 320 | section 4 |
# | A27 | dense, although a mixture of experts was due | below |
# | A2 | 3.5 trillion tokens, less than one epoch | section 2: the web part by arithmetic; the number of tokens itself is cited |
# | A3 | about 85% RefinedWeb, the rest conversations, technical papers and a small share of code | cited, and disputed: a critic quoted there says 5% code, the model's announcement about 3% |
# | A9 | Open LLM Leaderboard (ARC 25-shot, HellaSwag 10, MMLU 5, TruthfulQA 0): Falcon-180B 68.74, Llama 2 67.35; the announcement adds LLaMA-65B 64.23, Falcon-40B 61.48, MPT-30B 56.15 | cited; `workbook leaderboard` measures it on large profiles |
# | A10, A11 | above Llama-2-70B and GPT-3.5 on MMLU; level with PaLM 2-Large on thirteen tasks | cited; MMLU is part of `workbook leaderboard`, the thirteen are the task group `article_tasks` |
# | A12 | near GPT-4, or between GPT-3.5 and GPT-4 | cited; not testable here |
# | A18, A19 | 8-bit and 4-bit cost almost nothing in quality; 8-bit is much faster than 4-bit | notebook 02 |
# | A20, A21, A22 | the base model has no prompt format; the chat model's format; the printed function that builds it | notebook 03 |
# | A23 | the chat model was tuned on Open-Platypus, UltraChat and Airoboros | cited |
# | A24, A25 | usable from transformers 4.33; the example prompt and its settings | notebook 01 |
# | A26 | free for commercial use | **not as simple as that**, see below |
# | A28, A29 | a reader found the chat model no better than Llama-2-70B; it counted a saddle among the animals | notebook 04 |
#
# **Licence.** The article says *free for commercial use*. The licence (Falcon-180B TII License, based on Apache 2.0) has an
# acceptable use policy. It does not allow hosting use, that is offering the model as a service to others, without a
# separate agreement with TII. Read it before you build on the model.

# %% [markdown]
# ### A27 · Dense, although a mixture of experts was due?
#
# A critic quoted in the article made two points. A model trained on so little code cannot claim GPT-3.5's level (cited; not
# testable here). And above 30 billion parameters a *mixture of experts* is due: a router sends each token through only a few
# expert MLPs, so only a few of the parameters are *active*. A forward pass costs about two operations per active parameter.
# Mixtral 8x7B, released three months later, has 47 billion parameters and uses 13 billion
# ([Jiang et al. 2024](https://arxiv.org/abs/2401.04088)).

# %%
active = {"Falcon-180B": tied, "Llama-2-70B": llama, "Mixtral 8x7B": 13e9}
total = {**active, "Mixtral 8x7B": 47e9}
rows = []
for name, n in active.items():
    sizes = (f"{total[name] / 1e9:.1f}", f"{n / 1e9:.1f}")
    rows.append((name, *sizes, f"{2 * n / 1e9:.0f}", f"{tied / n:.1f}x"))
columns = ["model", "billion parameters", "active", "GFLOP per token", "Falcon-180B costs"]
pd.DataFrame(rows, columns=columns).set_index("model")

# %% tags=["record"]
runs.record_all({"dense_over_mixture": round(tied / 13e9, 1)}, unit="x", claim="A27")

# %% [markdown]
# ## What you saw
#
# The published size, compute and GPU hours are consistent. Counting gives 2.6 times Llama's size (the article says 2.5), 4.5
# times its compute (the article says 4), and a utilisation at the upper end of what was reached at the time. For the cache,
# theory and practice differ: multi-query attention could save a factor of 29, but transformers throws the saving away. The
# machines in the article are those that were tried, and 4-bit weights need far less.

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
#
# Replace the three dots and run the cell. The check says *right* or *not yet*. Each solution is folded below.
#
# **1.** Write a function that returns the bytes of one token in the KV cache.


# %% tags=["exercise"]
def kv_bytes(layers: int, kv_heads: int, head_size: int, bytes_per_value: int) -> int: ...


exercises.check("00-1", kv_bytes)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def kv_bytes(layers: int, kv_heads: int, head_size: int, bytes_per_value: int) -> int:
#     return 2 * layers * kv_heads * head_size * bytes_per_value  # 2: keys and values
#
#
# exercises.check("00-1", kv_bytes)
# ```
#
# </details>

# %% [markdown]
# **2.** How many days would 4096 A100s need to train Falcon-180B (tied count, 3.5 trillion tokens) at 40% of their peak of
# 312 TFLOP/s?

# %% tags=["exercise"]
training_days = ...

exercises.check("00-2", training_days)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# training_days = 6 * 178_557_088_768 * 3.5e12 / (4096 * 0.40 * 312e12) / 86_400
#
# exercises.check("00-2", training_days)
# ```
#
# </details>

# %% [markdown]
# **3.** Eight GPUs of 80 GB (640e9 bytes) hold the bf16 weights (`machine.weight_bytes`). How many tokens of cache fit into
# the rest, with the 232 heads that transformers itself stores?

# %% tags=["exercise"]
longest_context = ...

exercises.check("00-3", longest_context)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# falcon = machine.published_config("tiiuae/falcon-180B")
# free = 8 * 80e9 - machine.weight_bytes(falcon, "bf16")
# longest_context = free / machine.kv_bytes_per_token(falcon, "bf16", heads="library")
#
# exercises.check("00-3", longest_context)
# ```
#
# </details>
