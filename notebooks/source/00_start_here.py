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
# **Next:** [01 · Loading](01_loading.ipynb) · [Glossary](GLOSSARY.md)

# %% tags=["parameters"]
profile = "laptop"
seed = 0  # nothing here is random, but all notebooks take a seed

# %% [markdown]
# These are the models of this profile. On a laptop, *[stand-ins](GLOSSARY.md#stand-in)* take the place of the real ones: tiny
# models with the same architecture. What a stand-in says or scores is **not** what Falcon-180B says or scores, so its name is
# always shown with the word *stand-in*.

# %%
from helpers import exercises, figures, machine, models, panels, runs
from helpers.runs import Measured

notebook_name = "00_start_here"  # recorded and expected values are found by this name
models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# How long should each notebook take with this profile, and when does a run end one that takes too long? A dash means that it was
# not measured yet. The report of a run shows the time that each notebook really took.

# %%
models.times(settings)

# %% [markdown]
# ## 1 · One hundred and eighty billion?
#
# A configuration of a few hundred bytes fixes the shape of every weight. On PyTorch's *[meta](GLOSSARY.md#meta-device)* device a
# model has shapes but no storage, so all 80 layers can be built and counted in a moment. `word_embeddings` and `lm_head` may
# share one matrix (*[tied](GLOSSARY.md#tied)*); counting it twice gives the larger number.

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
# Each section ends with a cell that records its values for the report. Two questions are answered beside each value:
#
# - **Does this run agree with the article?** What counts is the wording of the statement, which is written down in
#   `notebooks/data/claims.yaml`: a rounded figure agrees within 5%, and *at least eight* is refuted by seven.
# - **Is it as in earlier runs?** *As expected* means *reproduced*. It does not mean that the article is right.

# %% tags=["record"]
small = machine.count_parameters(machine.published_config("tiiuae/falcon-7b"), tied=False)
middle = machine.count_parameters(machine.published_config("tiiuae/falcon-40b"), tied=False)
ratio = round(tied / llama, 3)
values = {"parameters_tied": Measured(tied, claim="A1")}
values["parameters_untied"] = Measured(untied, claim="A1")
values["parameters_falcon-7b"] = Measured(small, claim="A7")
values["parameters_falcon-40b"] = Measured(middle, claim="A7")
values["size_ratio_to_llama"] = Measured(ratio, "x", "A5")
runs.record_all(values, unit="parameters")

# %% [markdown]
# ## 2 · Four times the compute, counted in two ways
#
# The announcement gives about 7,000,000 GPU hours on up to 4096 GPUs at once and concludes: *four times* Llama 2's compute (A6).
# So it counts GPU hours. Llama-2-70B took 1,720,320 hours, also on A100s
# ([Touvron et al. 2023](https://arxiv.org/abs/2307.09288), table 2).
#
# The other way is to count the work itself. Training a dense transformer of N parameters on D tokens takes about 6·N·D
# [floating-point operations](GLOSSARY.md#flop): for each parameter and token, two in the forward pass and four in the backward
# pass ([Kaplan et al. 2020](https://arxiv.org/abs/2001.08361)). Falcon-180B saw 3.5 trillion tokens, Llama 2 saw 2 trillion.

# %%
falcon_hours, llama_hours = 7e6, 1_720_320
falcon_flop = 6 * tied * 3.5e12
llama_flop = 6 * llama * 2e12
assert falcon_flop == machine.training_flop(tied, 3.5e12)
print(f"{falcon_hours / llama_hours:.2f} times the GPU hours of Llama-2-70B")
print(f"{falcon_flop / llama_flop:.2f} times its operations")
compute = {"Falcon-180B": falcon_flop, "Llama-2-70B": llama_flop}
runs.record_figure("training_compute", figures.training_compute(compute))

# %% [markdown]
# The two ratios differ, and both are right: an hour of one run did more work than an hour of the other.
# *[Utilisation](GLOSSARY.md#utilisation)* is the share of a GPU's peak that a run turns into operations. An A100 has a peak of
# 312 TFLOP/s in bf16 (NVIDIA's data sheet), and
#
# *operations = GPU hours · peak · utilisation*
#
# So the ratio of the operations is the ratio of the hours times the ratio of the utilisations. That is the lesson: "compute"
# alone says too little. If you compare two trainings, say what you count.

# %%
utilisation = machine.implied_utilisation(falcon_flop, gpu_hours=falcon_hours, peak=312e12)
llama_utilisation = machine.implied_utilisation(llama_flop, gpu_hours=llama_hours, peak=312e12)
gain = utilisation / llama_utilisation
print(f"utilisation: {utilisation:.1%} for Falcon-180B, {llama_utilisation:.1%} for Llama-2-70B")
print(f"{falcon_hours / llama_hours:.3f} (hours) x {gain:.3f} (utilisation)", end=" ")
print(f"= {falcon_flop / llama_flop:.3f} (operations)")
# "About 7,000,000" is rounded: what if it was half a million less or more?
for hours in (6.5e6, 7.5e6):
    share = machine.implied_utilisation(falcon_flop, gpu_hours=hours, peak=312e12)
    print(f"with {hours:,.0f} hours: {hours / llama_hours:.2f} times the hours, at {share:.1%}")

# %% [markdown]
# Falcon-180B's utilisation is a little above the best of the runs in the PaLM paper (21% to 46%,
# [Chowdhery et al. 2022](https://arxiv.org/abs/2204.02311), table 3) and below the 54.2% that others reached on 2240 A100s
# ([Korthikanti et al. 2022](https://arxiv.org/abs/2205.05198)). So the three published figures (parameters, tokens, hours) are
# consistent, but only just (A4). How long would it have taken with 4096 GPUs all the time? And are 3.5 trillion tokens *less than
# one [epoch](GLOSSARY.md#epoch)* (A2)? 85% of the tokens come from RefinedWeb, which has five trillion
# ([Penedo et al. 2023](https://arxiv.org/abs/2306.01116)).

# %%
web = 0.85 * 3.5e12
days = falcon_hours / 4096 / 24
print(f"{days:.0f} days on 4096 GPUs; web tokens used: {web / 5e12:.1%} of RefinedWeb")

# %% tags=["record"]
reached = 0.2 < utilisation < 0.542  # the shares of the peak in the papers above
values = {"gpu_hours_ratio_to_llama": Measured(round(falcon_hours / llama_hours, 3), "x", "A6")}
values["compute_ratio_to_llama"] = Measured(round(falcon_flop / llama_flop, 3), "x", "A6")
share = round(web / 5e12, 3)
values["share_of_refinedweb"] = Measured(share, "of its tokens", "A2", agrees=web < 5e12)
values["implied_utilisation"] = Measured(round(utilisation, 3), "of peak", "A4", agrees=reached)
values["implied_utilisation_llama"] = Measured(round(llama_utilisation, 3), "of peak")
values["days_on_4096_gpus"] = Measured(round(days, 1), "days", "A4")
runs.record_all(values)

# %% [markdown]
# ## 3 · Multi-query attention: a cache of 8 heads, not 232
#
# While a model writes, it keeps the keys and values of all tokens so far: the *[KV cache](GLOSSARY.md#kv-cache)*. With one
# key-value head for all query heads, attention is called *[multi-query](GLOSSARY.md#multi-query-attention)*; with a few,
# *[grouped-query](GLOSSARY.md#grouped-query-attention)*. The article uses the first name for the 8 key-value heads of
# Falcon-180B. Llama-2-70B has 8 as well.
#
# Falcon-180B has 232 query heads. A token takes *2 · layers · heads · head size · bytes* of cache (2: keys and values), with 8
# heads instead of 232. The article says that this improves *scalability*. Here is how much it saves:

# %%
runs.record_figure("shared_heads", figures.shared_heads(config, "Falcon-180B"))

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
# For each kind of work, the article names a machine that it takes *at least* (A13 to A17). Such a claim says two things: this
# machine is enough, and no smaller one is. That somebody used the machine shows only the first. A smaller one that will do
# refutes the second. The table compares the published machine with the sum of the bytes: weights, cache for 2048 tokens,
# [gradients](GLOSSARY.md#gradient), [optimizer](GLOSSARY.md#optimizer) and [activations](GLOSSARY.md#activations).
#
# For inference, a GPU holds whole layers, and 5% of it is kept free. For training, weights and optimizer state are split evenly
# ([ZeRO-3](GLOSSARY.md#zero-3)). Each GPU also holds its own sequence and the layers that it has just gathered, so the total
# grows with the number of GPUs. What comes and goes leaves fragments: we count 37%, computed from one published run; another run
# left more, so the number of GPUs for full fine-tuning is a rough one. With these terms, the plan is within 10% of nearly all
# memory figures that others published for fine-tuning Falcon and Llama 2 (`tests/unit/machine/test_published_memory.py`).

# %%
machines_table = machine.hardware_claims()
columns = ["use", "published machine", "published GB", "estimate GB", "estimate GiB"]
columns += ["least 80 GB GPUs", "least 40 GB GPUs"]
machines_table[columns].set_index("use")

# %%
for row in machines_table.to_dict("records"):
    size, named = row["GB per GPU"], row["published GPUs"]
    least = row[f"least {size} GB GPUs"]
    print(f"{row['use']}: the article says at least {named} of {size} GB; {least} by our count")

# %% [markdown]
# A count below the article's number refutes *at least*, and the machine named is nevertheless large enough. Only a count that is
# below by less than a tenth decides nothing, because the plan for training is no better than that. The announcement headed its
# column *minimum requirement* at release. Its page says today that these are not the minimum numbers, only the minimum for the
# configurations that its authors had. The [model card](https://huggingface.co/tiiuae/falcon-180B) asks for at least 400 GB to
# generate text, which is five GPUs of 80 GB.

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
    use = row["use"].replace(" ", "_")
    for size in {80, row["GB per GPU"]}:
        least = row[f"least {size} GB GPUs"]
        values[f"least_{size}gb_gpus_{use}"] = Measured(least, "GPUs", row["claim"])
for precision, estimate in estimates.items():
    values[f"inference_{precision}"] = Measured(round(estimate.total / 2**30, 1), "GiB")
hardware = runs.record_all(values)
hardware

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
# | A4, A6 | up to 4096 GPUs, 7,000,000 GPU hours; 4 times the compute of Llama 2 | section 2: it depends on what is counted |
# | A8 | multi-query attention improves scalability | section 3, notebook 01 |
# | A13 to A17 | hardware, at least: full fine-tune 5120 GB, LoRA 1280, QLoRA 160, bf16 inference 640, int4 inference 320 | section 4: enough, but mostly not the least |
# | A27 | dense, although a mixture of experts was due | below |
# | A2 | 3.5 trillion tokens, less than one epoch | section 2: the web part by arithmetic; the number of tokens itself is cited |
# | A3 | about 85% RefinedWeb, the rest conversations, technical papers and a small share of code | cited, with two shares of code: about 3% in the announcement of Falcon-180B; the 5% of a critic quoted there is in the model card of Falcon-40B, and the card of Falcon-180B repeated that table, with tokens that add up to 1,000 billion and not to 3,500 billion |
# | A9 | Open LLM Leaderboard (ARC 25-shot, HellaSwag 10, MMLU 5, TruthfulQA 0): Falcon-180B 68.74, Llama 2 67.35; the announcement adds LLaMA-65B 64.23, Falcon-40B 61.48, MPT-30B 56.15 | cited: so it was in September 2023. The announcement's page says today 67.85 and 67.87, so Llama 2 is ahead by 0.02 since two more tasks count. `workbook leaderboard` measures the four tasks on large profiles |
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
# testable here). And above 30 billion parameters a *[mixture of experts](GLOSSARY.md#mixture-of-experts)* is due: a router sends
# each token through only a few expert MLPs, so only a few of the parameters are *active*. A forward pass costs about two
# operations per active parameter. Mixtral 8x7B, released three months later, has 47 billion parameters and uses 13 billion
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
# The published size, tokens and GPU hours are consistent. Here are the findings, with the numbers of this run:

# %%
print(f"Size: {tied / llama:.2f} times Llama-2-70B's; the article says 2.5.")
print(f"Compute: {falcon_hours / llama_hours:.2f} times its GPU hours,", end=" ")
print(f"{falcon_flop / llama_flop:.2f} times its operations; the article says 4.")
print(f"Cache: {all_heads / eight:.0f} times smaller with 8 heads than with 232,", end=" ")
print("and plain transformers stores all 232.")
for answer in ("agrees", "does not agree", "too close to tell"):
    claims = [record.content.claim for record in hardware if record.answer == answer]
    print(f"Smallest machine named in {', '.join(claims) or 'none'}: {answer}")

# %% [markdown]
# The table answers two questions about each value: is it as in earlier runs, and does it agree with the article?

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
#
# Replace the three dots and run the cell. The check says *not yet* and what is off, or *right*.
# `exercises.hint("00-1")` gives a hint, and one more each time. The solutions are folded. The last exercise asks for a finding:
# there may be several right answers, and the check measures yours.
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

# %% [markdown]
# **4. A finding.** Falcon-180B in int8 is to write 8 replies at once, each with a full context of 2048 tokens. There are cards
# of 24, 40, 48, 80, 96 and 141 GB; a machine has one kind of them. Which machine holds it with the fewest bytes in all? Give the
# number of GPUs and the gigabytes of one. The check asks the planner.

# %% tags=["exercise"]
smallest_machine = ...

exercises.check("00-4", smallest_machine)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# falcon = machine.Resident(machine.published_config("tiiuae/falcon-180B"), "int8")
# load = machine.Workload(batch_size=8, context_tokens=2048)
# cards = (24, 40, 48, 80, 96, 141)
# candidates = [(machine.least_gpus([falcon], size * 1e9, load), size) for size in cards]
# smallest_machine = min(candidates, key=lambda pair: pair[0] * pair[1])
#
# exercises.check("00-4", smallest_machine)
# ```
#
# </details>

# %% [markdown]
# **Next:** [01 · Loading](01_loading.ipynb) · [Glossary](GLOSSARY.md)
