# ---
# jupyter:
#   workbook:
#     models:
#       falcon_chat: [profile]
#       llama_chat: [profile]
# ---

# %% [markdown]
# # 04 · Falcon beside Llama: the same questions to both
#
# **You will learn**
# - how to ask two models the same thing fairly: each in its own format, with the same sampling;
# - how to turn one anecdote, a saddle that was called an animal, into a test with a key, rules and an interval;
# - what a paired difference says that two scores do not;
# - why the same model gets two scores by two ways of scoring;
# - what stand-ins can tell about the real pair, and what they cannot.
#
# | profile | time | memory |
# |---|---|---|
# | `laptop` | 60 s | 2 GiB |
# | `1x24gb` | minutes, after a download of 28 GB | one 24 GB GPU |
# | `2x80gb`, `8x40gb`, `8x80gb` | an hour or more, after a download of 500 GB | see notebook 00 |
#
# **Before:** [03 · Chat prompting](03_chat_prompting.ipynb) · **Next:** [05 · Fine-tuning](05_fine_tuning.ipynb)

# %% tags=["parameters"]
profile = "laptop"
seed = 0
max_new_tokens = 40
batch_size = 56

# %%
import inspect
from dataclasses import replace
from pathlib import Path

from helpers import evaluation, exercises, figures, machine, models, panels, runs
from helpers.models import ModelRef
from helpers.generation import Sampling

models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# ## 1 · One question, two formats
#
# A chat model answers well only in the format that it was trained on (notebook 03), so a fair comparison gives both the same *messages*, not
# the same text. `comparison.sides` loads both models where they fit in memory together; where they do not, each is
# loaded for its turn.

# %%
question = "Which of these are animals: dog, saddle, lion, chair? List only the animals."
both_models = evaluation.sides(settings)
messages = [{"role": "user", "content": question}]
for side, model in both_models.items():
    ref = model if isinstance(model, ModelRef) else model.ref
    print(f"--- {side}: {ref.label}\n{models.format_for(ref.format).render(messages)}\n")

# %% [markdown]
# The plain way to ask: render, tokenize, generate, cut the prompt off. Greedily, so that a run can be repeated.

# %%
with evaluation.opened(both_models["falcon"], settings.precision) as loaded:
    text = loaded.format.render(messages)
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"].to(loaded.model.device)
    mask = ids.new_ones(ids.shape)
    output = loaded.model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    print(loaded.tokenizer.decode(output[0, ids.shape[1] :]))

# %% [markdown]
# ## 2 · Stories, facts, instructions
#
# The article's readers tried questions of every kind. `comparison.compare` asks each model each of them, one at a time, and keeps
# replies and times.

# %%
asked = evaluation.read_items(Path("data/comparison_prompts.jsonl"))
greedy = Sampling(temperature=0, max_new_tokens=max_new_tokens, seed=seed)
talk = evaluation.compare(asked, both_models, greedy, precision=settings.precision)
panels.replies_html(talk)

# %% [markdown]
# Speed, time to the first token and memory, medians over these replies. The weights are not all that a conversation takes: each
# token adds its keys and values to the cache.

# %%
table = talk.speed()
configs = {
    "falcon": models.config(settings.falcon_chat),
    "llama": models.config(settings.llama_chat),
}
table["cache (KiB a token)"] = [
    machine.kv_bytes_per_token(configs[side], settings.precision) / 1024 for side in table.index
]
table.round(3)

# %%
columns = {"tokens_per_second": "tokens/s", "first_token": "first token (s)"}
columns |= {"weights": "weights (MiB)"}
units = {"tokens_per_second": "tokens/s", "first_token": "s", "weights": "MiB"}
for side in talk.sides:
    for name, column in columns.items():
        value = round(table.loc[side, column], 3)
        runs.record(f"{side}_{name}", value, units[name], model=talk.labels[side])

# %% [markdown]
# ## 3 · The saddle, as a test
#
# The article reports that Falcon-180B, given a list, counted a *saddle* among the animals, while Llama-2-70B answered briefly and
# correctly (A29). One reply proves little. Here are the same kind of questions with nouns that were frozen before any of this project's models
# was trained: 36 animals and 36 other things, a third of them animal gear such as saddle, leash and cage.

# %%
items = evaluation.read_items(Path("data/animal_items.jsonl"))
for kind in ("yes_no", "choice", "list"):
    found = [item for item in items if item.kind == kind]
    print(
        f"{len(found):3} x {kind:7} {found[0].question}\n{'':14}key: {', '.join(found[0].answer)}"
    )

# %% [markdown]
# Two rules score a reply, the same for both models. They are simple on purpose: you can read them, and say where they are
# unfair. (A reply that explains why the other thing is *no* animal names it, and is counted as wrong, although the question asks for
# the name only.)

# %%
print(inspect.getsource(evaluation.is_correct))
print(inspect.getsource(evaluation.is_concise))
print("CONCISE_WORDS =", evaluation.CONCISE_WORDS)

# %%
short = Sampling(temperature=0, max_new_tokens=24, seed=seed)
test = evaluation.compare(
    items, both_models, short, precision=settings.precision, batch_size=batch_size
)
saddles = [number for number, item in enumerate(items) if "saddle" in item.question]
panels.replies_html(test, saddles)

# %% [markdown]
# A share of so many items is an estimate; the interval (95%, Wilson's) says how far it may be off by chance. It takes the items for
# independent; as each noun is in four or five of them, it is somewhat too narrow.

# %%
scores = test.scores()
scores.round(3)

# %%
subject = " and ".join(test.labels.values())
runs.record_figure("scores", figures.score_intervals(scores, subject))

# %%
for side in test.sides:
    score = test.score(side)
    print(f"{side}: {score.estimate:.3f} correct, 95% interval {score.low:.3f} to {score.high:.3f}")
    label = test.labels[side]
    options = {"claim": "A29", "model": label, "tolerance": 0.05}
    runs.record(f"animal_score_{side}", round(score.estimate, 4), **options)
    concise = test.score(side, "concise").estimate
    runs.record(f"animal_concise_{side}", round(concise, 4), **options)

# %% [markdown]
# What would guessing score? Half of the yes-or-no questions and half of the choices. A model that always says the same is no better than
# one that guesses, so look at how often each says yes (half would be right):

# %%
yes_no = [number for number, item in enumerate(items) if item.kind == "yes_no"]
for side in test.sides:
    said = sum(evaluation.names(test.replies[side][number].text, "yes") for number in yes_no)
    print(f"{side}: says yes to {said} of {len(yes_no)}")
    label = test.labels[side]
    runs.record(f"says_yes_{side}", round(said / len(yes_no), 4), tolerance=0.05, model=label)

# %% [markdown]
# ### Which is better?
#
# Both answered the same items, so compare them item by item: only items on which they differ say anything. The *paired
# difference* has an interval of its own, and the exact McNemar test asks how surprising the split of the differing items
# would be if the two were equally good.

# %%
difference = test.difference("falcon", "llama")
interval = difference.interval
print(f"falcon - llama: {interval.estimate:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})")
print(f"only falcon right: {difference.only_first}, only llama right: {difference.only_second}")
print(f"McNemar's exact p: {difference.p_value:.2g}")
real = settings.falcon_chat.stand_in_for is None
not_better = (interval.low <= 0) if real else None
options = {"claim": "A28", "model": test.labels["falcon"], "agrees": not_better, "tolerance": 0.05}
runs.record("animal_difference", round(interval.estimate, 4), **options)

# %% [markdown]
# Counting conciseness too: a reply wins that is correct where the other is not, or correct and concise where the other is only correct. Two
# wrong replies tie, however short, and a tie counts half: a side that wins nothing can still have a rate well above zero.

# %%
win = test.win_rate("falcon", "llama")
ties = len(items) - difference.only_first - difference.only_second
print(f"correctness alone: {difference.only_first} won, {difference.only_second} lost, {ties} tied")
print(f"win rate, ties half: {win.estimate:.3f} ({win.low:.3f} to {win.high:.3f})")
label = test.labels["falcon"]
runs.record("win_rate_falcon", round(win.estimate, 4), tolerance=0.05, model=label)

# %% [markdown]
# ### Is the scorer real?
#
# A score that does not depend on its key measures nothing. Take ten items that the better side got right, swap their answers, and score the
# *same* replies again: it must lose ten.

# %%
better = max(test.sides, key=lambda side: sum(test.verdicts(side)))
right = [number for number, passed in enumerate(test.verdicts(better)) if passed][:10]
key = list(items)
for number in right:
    key[number] = replace(items[number], answer=items[number].others, others=items[number].answer)
again = test.rescored(key)
lost = sum(test.verdicts(better)) - sum(again.verdicts(better))
print(f"{better}: {sum(test.verdicts(better))} correct with the key, {lost} fewer with ten swapped")
runs.record("lost_by_swapping_ten_answers", lost, "items")

# %% [markdown]
# ## 4 · The same items, scored without a reply
#
# Benchmarks such as those of the Open LLM Leaderboard mostly let no model talk: they compare how *likely* it finds each option, and the
# likelier one counts as its choice. Plainly, for one item:

# %%
import torch

item = next(item for item in items if item.kind == "choice")
with evaluation.opened(both_models["falcon"], settings.precision) as loaded, torch.inference_mode():
    prompt = loaded.format.render([{"role": "user", "content": item.question}])
    start = len(loaded.tokenizer(prompt)["input_ids"])
    for word in (*item.answer, *item.others):
        ids = torch.tensor([loaded.tokenizer(f"{prompt} A {word}")["input_ids"]])
        logits = loaded.model(ids.to(loaded.model.device)).logits[0, start - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[0, start:, None].to(logits.device))
        print(f"{word}: ln p = {chosen.sum().item():.2f}")

# %% [markdown]
# `evaluation.multiple_choice` does this for many items in batches, for both sides.


# %%
def question_of(item: evaluation.Item) -> evaluation.Question:
    words = sorted((*item.answer, *item.others))
    options = tuple(f"{'An' if word[0] in 'aeiou' else 'A'} {word}" for word in words)
    right = words.index(item.answer[0])
    return evaluation.Question([{"role": "user", "content": item.question}], options, right)


questions = [question_of(item) for item in items if item.kind == "choice"]
print(questions[0])

# %%
by_likelihood = {}
for side, model in both_models.items():
    with evaluation.opened(model, settings.precision) as loaded:
        by_likelihood[side] = evaluation.multiple_choice(loaded, questions)
    share = by_likelihood[side].accuracy
    replied = test.score(side, kind="choice").estimate
    print(f"{side}: {share.estimate:.3f} by likelihood, {replied:.3f} by reply")
    label = test.labels[side]
    runs.record(
        f"choice_by_likelihood_{side}", round(share.estimate, 4), tolerance=0.05, model=label
    )

# %% [markdown]
# The two ways can disagree widely. But does the likelier option show that the model *understood*? Some words are likelier anyhow. The control:
# the same options after a prompt that asks nothing. Guessing would score 0.5.

# %%
hello = [{"role": "user", "content": "Hello."}]
control = [replace(question, prompt=hello) for question in questions]
for side, model in both_models.items():
    with evaluation.opened(model, settings.precision) as loaded:
        greeted = evaluation.multiple_choice(loaded, control)
    for name, found in (("the question", by_likelihood[side]), ("only a greeting", greeted)):
        share = found.accuracy
        print(f"{side}, {name}: {share.estimate:.3f} ({share.low:.3f} to {share.high:.3f})")

# %% [markdown]
# Where the greeting alone scores as well as the question, the score is a taste for words, not an answer. A published score means little without
# the way it was made, and without its control.
#
# ### The same through EleutherAI's harness
#
# The leaderboard's numbers come from the lm-evaluation-harness. `evaluation.evaluate` runs it on our model over a task file of this
# workbook, offline, here with the bare nouns as options.

# %%
print(Path("data/tasks/animal_choice.yaml").read_text())

# %%
with evaluation.opened(both_models["falcon"], settings.precision) as loaded:
    harness = evaluation.evaluate(loaded, ["animal_choice"])
value = harness.rows[0].value
options = {"model": test.labels["falcon"], "tolerance": 0.05}
runs.record("harness_choice_falcon", round(value, 4), **options)
print("lm-evaluation-harness", harness.version)
harness.table()

# %% [markdown]
# ## 5 · Ask them yourself
#
# Type a question and watch both replies grow. In an unattended run the panel asks the questions below and shows both replies.

# %%
script = ["Is a saddle an animal?", "What is your favorite food?"]
panels.comparison_panel(both_models, greedy, script=script, precision=settings.precision)

# %% [markdown]
# ## 6 · What stand-ins can tell
#
# The *machinery* is the real one: formats, rules, intervals and the harness work the same on any pair. The *numbers* belong to the
# models in the table at the top. How unlike the real pair a pair of stand-ins is, by parameters:

# %%
names = {"falcon": "tiiuae/falcon-180B", "llama": "meta-llama/Llama-2-70b-chat-hf"}
real = {
    side: machine.count_parameters(machine.published_config(name)) for side, name in names.items()
}
here = {side: machine.count_parameters(configs[side]) for side in names}
for title, counts in (("the real pair", real), ("this profile", here)):
    falcon, llama = counts["falcon"], counts["llama"]
    print(f"{title}: {falcon:,} against {llama:,}, {falcon / llama:.2f} to 1")
label = settings.falcon_chat.label
runs.record("size_ratio_here", round(here["falcon"] / here["llama"], 3), "x", model=label)

# %% [markdown]
# On the `laptop` profile the Falcon side is far the smaller one and was trained on some millions of tokens, not trillions: how well it
# answers says nothing about Falcon-180B. Notebook 05 repairs some of what was found here.
#
# ## What you saw
#
# One reply is an anecdote; items with a key, a rule and an interval make it a finding with a width. Paired on the same
# items, two models can be told apart with fewer of them. And a score belongs to its way of scoring as much as to its model.

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
#
# **1.** Write the rule of correctness yourself: true when the text holds every word of `answer` and none of `others`, as whole
# words, in any case. (A plural may count or not.)


# %% tags=["exercise"]
def is_right(text: str, answer: list[str], others: list[str]) -> bool: ...


exercises.check("04-1", is_right)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# import re
#
#
# def is_right(text: str, answer: list[str], others: list[str]) -> bool:
#     words = re.findall(r"\w+", text.lower())
#     return all(w in words for w in answer) and not any(w in words for w in others)
#
#
# exercises.check("04-1", is_right)
# ```
#
# </details>

# %% [markdown]
# **2.** Wilson's 95% interval of a share: with `p = passed / n` and `z = 1.96`, its centre is `(p + z²/2n) / (1 + z²/n)` and its
# half-width `z / (1 + z²/n) · √(p(1 - p)/n + z²/4n²)`.


# %% tags=["exercise"]
def wilson(passed: int, n: int) -> tuple[float, float]: ...


exercises.check("04-2", wilson)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def wilson(passed: int, n: int) -> tuple[float, float]:
#     p, z = passed / n, 1.96
#     centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
#     half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
#     return centre - half, centre + half
#
#
# exercises.check("04-2", wilson)
# ```
#
# </details>

# %% [markdown]
# **3.** McNemar's exact test: of the `a + b` items on which the models differ, `a` favour the first. The p-value is the chance of a split at
# least as uneven, in either direction, when each of them is a fair coin toss.


# %% tags=["exercise"]
def p_value(a: int, b: int) -> float: ...


exercises.check("04-3", p_value)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# from math import comb
#
#
# def p_value(a: int, b: int) -> float:
#     n = a + b
#     tail = sum(comb(n, k) for k in range(min(a, b) + 1)) / 2**n
#     return min(1.0, 2 * tail)
#
#
# exercises.check("04-3", p_value)
# ```
#
# </details>
