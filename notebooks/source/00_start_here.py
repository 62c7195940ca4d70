# ---
# jupyter:
#   workbook:
#     models: {}
# ---

# %% [markdown]
# # 00 · Start here: what Falcon-180B is, and what this machine can run
#
# In September 2023 the Technology Innovation Institute (TII) released Falcon-180B: 180 billion parameters, trained on
# 3.5 trillion tokens, for a time the highest-ranked open model. An article, built on the model's
# [announcement](https://huggingface.co/blog/falcon-180b), spread a list of figures. This notebook takes those figures one by one
# and, wherever arithmetic is enough, checks them. No model is loaded. Codes such as A5 number the article's statements; the list
# is in section 6.
#
# **You will learn**
# - how to count a model's parameters from its configuration, without downloading a byte of its weights;
# - how training compute, GPU hours and utilisation hang together;
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
seed = 0  # nothing is drawn at random here; one -p seed=... serves all notebooks

# %% [markdown]
# The models of this profile. On a laptop, *stand-ins* take the place of the real ones: tiny models of the same
# architecture. Whatever a stand-in says or scores is **not** what Falcon-180B says or scores; its name is always shown
# with the word *stand-in*.

# %%
from helpers import exercises, figures, machine, models, panels, runs

models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# ## 1 · One hundred and eighty billion?
#
# A configuration of a few hundred bytes fixes every weight's shape. On PyTorch's *meta* device a model has shapes but no
# storage, so all 80 layers can be built in a moment and counted. `word_embeddings` and `lm_head` may share one matrix
# (*tied*); counting it twice gives the larger number.

# %%
import torch
from transformers import FalconForCausalLM

config = machine.published_config("tiiuae/falcon-180B")
with torch.device("meta"):
    model = FalconForCausalLM(config)
tied = model.num_parameters()
print(f"{tied:,} parameters with the head tied to the embeddings")
print(f"{tied + model.lm_head.weight.numel():,} with the head counted separately")

# %% [markdown]
# `helpers.memory` gets the same numbers from a closed formula, which is what the planner below uses. `record` keeps a value for
# the report. What it calls *expected* is what earlier runs of this notebook gave, so *as expected* means *reproduced*, not that
# the article is right; *unmeasured* means that there is nothing to compare with.

# %%
assert machine.count_parameters(config) == tied
near = abs(tied / 180e9 - 1) < 0.05  # a rounded figure agrees when it is within 5%
runs.record("parameters_tied", tied, "parameters", claim="A1", agrees=near)
runs.record(
    "parameters_untied", machine.count_parameters(config, tied=False), "parameters", claim="A1"
)

# %% [markdown]
# *180 billion* is fair. The article calls Falcon-180B a scaled-up Falcon-40B, after models of 1.3B, 7.5B and 40B (A7). Two of
# the family and the rival, counted from their configurations:

# %%
import pandas as pd

names = ["tiiuae/falcon-7b", "tiiuae/falcon-40b", "tiiuae/falcon-180B"]
names.append("meta-llama/Llama-2-70b-chat-hf")
configs = {name: machine.published_config(name) for name in names}
counts = {name: machine.count_parameters(c) for name, c in configs.items()}
rows = [
    (name, f"{counts[name] / 1e9:.2f}", configs[name].num_hidden_layers, configs[name].hidden_size)
    for name in names
]
pd.DataFrame(rows, columns=["model", "billion parameters", "layers", "hidden size"]).set_index(
    "model"
)

# %%
for name, size in (("falcon-7b", 7.5e9), ("falcon-40b", 40e9)):
    count = machine.count_parameters(configs[f"tiiuae/{name}"], tied=False)
    near = abs(count / size - 1) < 0.05
    runs.record(f"parameters_{name}", count, "parameters", claim="A7", agrees=near)

# %%
llama = machine.count_parameters(configs["meta-llama/Llama-2-70b-chat-hf"])
ratio = round(tied / llama, 3)
runs.record("size_ratio_to_llama", ratio, "x", claim="A5", agrees=abs(ratio / 2.5 - 1) < 0.05)

# %% [markdown]
# The article says 2.5 times Llama-2-70B's size; counting says a little more.

# %% [markdown]
# ## 2 · Four times the compute
#
# Training a dense transformer of N parameters on D tokens takes about 6·N·D floating-point operations: two for each
# parameter and token forward, four backward ([Kaplan et al. 2020](https://arxiv.org/abs/2001.08361)). Falcon-180B saw
# 3.5 trillion tokens, less than one epoch of its data; Llama 2 saw 2 trillion.

# %%
falcon_flop = 6 * tied * 3.5e12
llama_flop = 6 * llama * 2e12
assert falcon_flop == machine.training_flop(tied, 3.5e12)
ratio = round(falcon_flop / llama_flop, 3)
runs.record("compute_ratio_to_llama", ratio, "x", claim="A6", agrees=abs(ratio / 4 - 1) < 0.05)

# %%
compute = {"Falcon-180B": falcon_flop, "Llama-2-70B": llama_flop}
runs.record_figure("training_compute", figures.training_compute(compute))

# %% [markdown]
# *Four times* is rounded down. *Less than one epoch* (A2) can be checked too: 85% of the tokens are RefinedWeb's, which holds five
# trillion ([Penedo et al. 2023](https://arxiv.org/abs/2306.01116)).

# %%
web = 0.85 * 3.5e12
runs.record(
    "share_of_refinedweb", round(web / 5e12, 3), "of its tokens", claim="A2", agrees=web < 5e12
)

# %% [markdown]
# Now the machine: up to 4096 GPUs at once on Amazon SageMaker (A100s, as the model card says), about
# 7,000,000 GPU hours. An A100 peaks at 312 TFLOP/s in bf16 (NVIDIA's data sheet). What share of that peak do the figures imply?

# %%
utilisation = machine.implied_utilisation(falcon_flop, gpu_hours=7e6, peak=312e12)
reached = 0.2 < utilisation < 0.542  # the most that was published then, see below
runs.record("implied_utilisation", round(utilisation, 3), "of peak", claim="A4", agrees=reached)

# %%
days = 7e6 / 4096 / 24
runs.record("days_on_4096_gpus", round(days, 1), "days", claim="A4")

# %% [markdown]
# That is a little above the best of the runs that the PaLM paper lists (21% to 46%,
# [Chowdhery et al. 2022](https://arxiv.org/abs/2204.02311), table 3) and below the 54.2% that was reached on 2240 A100s
# ([Korthikanti et al. 2022](https://arxiv.org/abs/2205.05198)), so the three published figures can fit each other, with
# little to spare. At 4096 GPUs all the time it would have taken ten weeks.

# %% [markdown]
# ## 3 · Multi-query attention: a cache of 8 heads, not 232
#
# One key-value head for all queries is *multi-query*, a few heads are *grouped-query* attention; the article uses the first name
# for Falcon-180B's 8. Llama-2-70B has 8 as well.
#
# While it writes, a model keeps the keys and values of all tokens so far: the *KV cache*. Falcon-180B has 232 query heads
# but only 8 key-value heads, so a token needs *2 · layers · heads · head size · bytes* with 8 heads instead of 232 (2: keys
# and values). The article says that this improves *scalability*; this is the size of it.

# %%
head_size = config.hidden_size // config.num_attention_heads
eight = 2 * config.num_hidden_layers * config.num_kv_heads * head_size * 2
all_heads = 2 * config.num_hidden_layers * config.num_attention_heads * head_size * 2
assert eight == machine.kv_bytes_per_token(config, "bf16", heads="kv")
assert all_heads == machine.kv_bytes_per_token(config, "bf16", heads="library")
print(f"8 heads: {eight / 2**10:.0f} KiB a token; 232 heads: {all_heads / 2**20:.2f} MiB a token")

# %%
runs.record("kv_bytes_8_heads", eight, "bytes/token", claim="A8", agrees=eight < all_heads)
runs.record("kv_bytes_232_heads", all_heads, "bytes/token", claim="A8")

# %%
ways = {"8 heads": eight, "232 heads": all_heads}
runs.record_figure(
    "cache_growth", figures.cache_growth(ways, config.max_position_embeddings, "Falcon-180B")
)

# %% [markdown]
# The surprise is the upper line: transformers copies the 8 heads to all 232 *before* it stores them, so whoever runs
# Falcon-180B with it alone pays 29 times as much. This workbook's models store 8, as serving engines such as vLLM and llama.cpp
# do. Notebook 01 measures both on real caches.

# %% [markdown]
# ## 4 · Which machine?
#
# The article lists the machines on which each kind of work was tried. They are not the least that would do. Below, the
# published machine beside what the bytes add up to (weights, cache for 2048 tokens, gradients, optimizer, activations). The
# least numbers of GPUs keep 5% of each free; for inference each holds whole layers; for training everything is spread evenly
# (ZeRO-3), but each GPU also works on a sequence of its own and gathers one layer at a time, so the sum grows with the GPUs.

# %%
machines_table = machine.hardware_claims()
machines_table

# %%
for row in machines_table.to_dict("records"):
    least = row["least 80 GB GPUs"]
    name = f"least_80gb_gpus_{row['use']}".replace(" ", "_")
    runs.record(name, least, "GPUs", claim=row["claim"])
    size = 40 if "40GB" in row["published machine"] else 80
    holds = size * row[f"least {size} GB GPUs"] <= row["published GB"]
    name = f"published_machine_holds_{row['use']}".replace(" ", "_")
    runs.record(name, holds, claim=row["claim"], agrees=holds)

# %% [markdown]
# And by precision, for generating text:

# %%
estimates = {p: machine.estimate(config, p) for p in ("bf16", "int8", "nf4")}
machines = {"8x A100 80GB": 8 * 80e9, "8x A100 40GB": 8 * 40e9, "2x A100 80GB": 2 * 80e9}
figure = figures.memory_by_precision(list(estimates.values()), machines, "Falcon-180B")
runs.record_figure("memory_by_precision", figure)

# %%
for name, estimate in estimates.items():
    runs.record(f"inference_{name}", round(estimate.total / 2**30, 1), "GiB")
runs.recorded().tail(3)

# %% [markdown]
# ### Plan your own
#
# Choose a model, a precision, the work and a machine. In an unattended run this cell shows the plan for its first
# settings instead of sliders.

# %%
panels.memory_planner()

# %% [markdown]
# ## 5 · What this machine can run

# %%
this_machine = machine.detect()
memory_gib = this_machine.ram_bytes / 2**30
print(
    f"{this_machine.cpu_count} CPUs, {memory_gib:.1f} GiB of memory, {len(this_machine.gpus)} GPUs"
)
print(f"{this_machine.disk_free_bytes / 2**30:.0f} GiB free on disk")

# %%
rows = []
for each in map(models.load_profile, models.available()):
    missing = models.missing(each, this_machine, models.downloaded_bytes(each))
    rows.append((each.name, "; ".join(missing) or "runs here"))
pd.DataFrame(rows, columns=["profile", "on this machine"]).set_index("profile")

# %% [markdown]
# To write one token, a model reads all its weights once, so memory bandwidth over bytes bounds the speed of a single reply.
# Measured here, and what it would mean if Falcon-180B's weights had to come through this machine's memory:

# %%
bandwidth = machine.memory_bandwidth()
rows = [(p, f"{bandwidth / machine.weight_bytes(config, p):.3f}") for p in ("bf16", "int8", "nf4")]
print(f"{bandwidth / 1e9:.0f} GB/s of memory bandwidth")
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
# | A27 | dense, where a mixture of experts was due | below |
# | A2 | 3.5 trillion tokens, less than one epoch | section 2: the web part by arithmetic; the number of tokens itself is cited |
# | A3 | about 85% RefinedWeb, the rest conversations, technical papers and a small share of code | cited, and disputed: a critic quoted there says 5% code, the model's announcement about 3% |
# | A9 | Open LLM Leaderboard (ARC 25-shot, HellaSwag 10, MMLU 5, TruthfulQA 0): Falcon-180B 68.74, Llama 2 67.35; the announcement adds LLaMA-65B 64.23, Falcon-40B 61.48, MPT-30B 56.15 | cited; `workbook leaderboard` measures it on large profiles |
# | A10, A11 | above Llama-2-70B and GPT-3.5 on MMLU; level with PaLM 2-Large on thirteen tasks | cited; MMLU is part of `workbook leaderboard`, the thirteen are the task group `article_tasks` |
# | A12 | near GPT-4, or between GPT-3.5 and GPT-4 | cited; not testable here |
# | A18, A19 | 8-bit and 4-bit cost almost nothing in quality; 8-bit is much faster than 4-bit | notebook 02 |
# | A20, A21, A22 | the base model has no prompt format; the chat model's; the printed function that builds it | notebook 03 |
# | A23 | the chat model was tuned on Open-Platypus, UltraChat and Airoboros | cited |
# | A24, A25 | usable from transformers 4.33; the example prompt and its settings | notebook 01 |
# | A26 | free for commercial use | **not as simple as that**, see below |
# | A28, A29 | a reader found the chat model no better than Llama-2-70B; it counted a saddle among the animals | notebook 04 |
#
# **Licence.** The article says *free for commercial use*. The licence (Falcon-180B TII License, based on Apache 2.0) has an
# acceptable use policy and does not allow hosting use, that is offering the model as a service to others, without a
# separate agreement with TII. Read it before you build on it.

# %% [markdown]
# ### A27 · Dense, where a mixture of experts was due?
#
# A critic quoted in the article held that a model trained on so little code cannot claim GPT-3.5's level (cited; not testable
# here), and that above 30 billion parameters a *mixture of experts* is due: a router sends each
# token through a few expert MLPs only, so few of the parameters are *active*. A forward pass costs about two operations
# for each active parameter. Mixtral 8x7B, released three months later, keeps 47 billion and uses 13 billion
# ([Jiang et al. 2024](https://arxiv.org/abs/2401.04088)).

# %%
active = {"Falcon-180B": tied, "Llama-2-70B": llama, "Mixtral 8x7B": 13e9}
total = {**active, "Mixtral 8x7B": 47e9}
rows = [
    (name, f"{total[name] / 1e9:.1f}", f"{n / 1e9:.1f}", f"{2 * n / 1e9:.0f}", f"{tied / n:.1f}x")
    for name, n in active.items()
]
columns = ["model", "billion parameters", "active", "GFLOP a token", "Falcon-180B costs"]
runs.record("dense_over_mixture", round(tied / 13e9, 1), "x", claim="A27")
pd.DataFrame(rows, columns=columns).set_index("model")

# %% [markdown]
# ## What you saw
#
# The published size, compute and GPU hours are compatible: counting gives 2.6 times Llama's size where the article says 2.5, 4.5
# times its compute where it says 4, and an utilisation at the upper end of what was reached then. The cache is where theory and practice
# part: multi-query attention would save a factor of 29, and transformers gives it away. The machines the article names
# are those that were tried, and 4-bit weights need far less.

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
#
# Replace the three dots and run the cell. The check says *right* or *not yet*. Each solution is folded below.
#
# **1.** Write the function that gives the bytes one token takes in the KV cache.


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
# **3.** Eight GPUs of 80 GB (640e9 bytes) hold the bf16 weights (`memory.weight_bytes`). How many tokens of cache fit into
# what is left, with the 232 heads that transformers itself stores?

# %% tags=["exercise"]
longest_context = ...

exercises.check("00-3", longest_context)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# falcon = memory.published_config("tiiuae/falcon-180B")
# free = 8 * 80e9 - memory.weight_bytes(falcon, "bf16")
# longest_context = free / memory.kv_bytes_per_token(falcon, "bf16", heads="library")
#
# exercises.check("00-3", longest_context)
# ```
#
# </details>
