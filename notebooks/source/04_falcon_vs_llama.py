# ---
# jupyter:
#   workbook:
#     models:
#       falcon_chat: [profile]
#       llama_chat: [profile]
#     work:  # in_turn: one load for each time that a model is used
#       falcon_chat:
#         - {load: 1, in_turn: 9}
#         - {reply: 1, tokens: 24, prompt: 31}
#         - {reply: 5, tokens: max_new_tokens, prompt: 40}
#         - {reply: 89, tokens: max_new_tokens, prompt: 60, together: batch_size}
#         - {reply: 169, tokens: 24, prompt: 34, together: batch_size}
#         - {read: 434, tokens: 36, together: 16}
#       llama_chat:
#         - {load: 1, in_turn: 9}
#         - {reply: 5, tokens: max_new_tokens, prompt: 50}
#         - {reply: 89, tokens: max_new_tokens, prompt: 75, together: batch_size}
#         - {reply: 168, tokens: 24, prompt: 50, together: batch_size}
#         - {reply: [2, 28], tokens: 24, prompt: 50, together: 28}
#         - {reply: 1, tokens: 24, prompt: 35}
#         - {read: 288, tokens: 50, together: 16}
#         - {read: [2, 40], tokens: 250, together: 16}
#         - {read: [4, tested_pairs], tokens: 250, together: 16}
#     parameters:
#       seed: {least: 0, most: 4294967295}
#       max_new_tokens: {least: 2, most: 100000}
#       batch_size: {least: 1, most: 100000}
#       tested_pairs: {least: 0, most: 100}
# ---

# %% [markdown]
# # 04 · Falcon and Llama: the same questions to both
#
# **You will learn**
# - how to ask two models the same thing fairly: each in its own format, with the same sampling;
# - how to turn one anecdote, a saddle that was called an animal, into a test with a key, rules and an interval;
# - what a paired difference says that two scores do not;
# - why the same model gets two different scores with two ways of scoring;
# - what stand-ins can tell about the real pair, and what they cannot.
#
# **Before:** [03 · Chat prompting](03_chat_prompting.ipynb) · **Next:** [05 · Fine-tuning](05_fine_tuning.ipynb) · [Glossary](GLOSSARY.md)

# %% tags=["parameters"]
profile = "laptop"
seed = 0
max_new_tokens = 40
batch_size = 56
tested_pairs = 6

# %%
import inspect
from dataclasses import replace
from pathlib import Path

from helpers import evaluation, exercises, figures, machine, models, panels, runs
from helpers.base import known, mcnemar
from helpers.generation import Sampling
from helpers.runs import Measured

notebook_name = "04_falcon_vs_llama"  # recorded and expected values are found by this name
models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# ## 1 · One question, two formats
#
# A chat model answers well only in the format on which it was trained (notebook 03). So a fair comparison gives both models the
# same *messages*, not the same text. `evaluation.sides` loads both models if they fit in memory together; otherwise each one is
# loaded when it is needed.

# %%
question = "Which of these are animals: dog, saddle, lion, chair? List only the animals."
sides = evaluation.sides(settings)
messages = [{"role": "user", "content": question}]
for ref in (settings.falcon_chat, settings.llama_chat):
    print(f"--- {ref.label}\n{models.format_for(ref.format).render(messages)}\n")

# %% [markdown]
# Is that fair? On the `laptop` profile one side gets more than the question: the format with which SmolLM2 was trained puts a
# [system message](GLOSSARY.md#system-prompt) first if there is none, and Falcon's does not. Section 3 measures what it does.
#
# In plain transformers: render, tokenize, generate, cut the prompt off. [Greedy decoding](GLOSSARY.md#greedy-decoding) makes the
# run repeatable.

# %%
with evaluation.opened(sides["falcon"], settings.precision) as loaded:
    text = loaded.format.render(messages)
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"].to(loaded.model.device)
    mask = ids.new_ones(ids.shape)
    output = loaded.model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False)
    print(loaded.tokenizer.decode(output[0, ids.shape[1] :]))

# %% [markdown]
# ## 2 · Questions of eleven kinds
#
# The article's readers tried questions of every kind. This file has such questions: most of them with a *key*, which code can
# check, namely words that a right reply names, or rules for its form (`number`, `lines`, `json_keys`, `python` and so on). A
# program in a reply is run in a process of its own, without files, modules or time. Each question says who wrote it.

# %%
import pandas as pd

prompts = evaluation.read_items(Path("data/comparison_prompts.jsonl"), sourced=True)
overview = {}
for kind in dict.fromkeys(item.kind for item in prompts):
    of_kind = [item for item in prompts if item.kind == kind]
    keyed = [item for item in of_kind if item.scored] or of_kind
    key = ", ".join([*keyed[0].answer, *map(str, keyed[0].rules)]) or "none"
    count = sum(item.scored for item in of_kind)
    overview[kind] = [len(of_kind), count, keyed[0].question.splitlines()[-1], key]
columns = ["prompts", "with a key", "for example", "its key"]
pd.set_option("display.max_colwidth", 120)
pd.DataFrame.from_dict(overview, orient="index", columns=columns)

# %% [markdown]
# ### Speed: one question at a time
#
# A model's speed is that of a single reply, so three of the questions are asked one at a time. The table has medians over these
# replies. A conversation takes more memory than the weights: each token adds its keys and values to the cache. The two models
# cut text into different tokens, so only characters per second compare them.

# %%
greedy = Sampling(temperature=0, max_new_tokens=max_new_tokens, seed=seed)
timed = [item for item in prompts if item.id in ("story-1", "fact-5", "opinion-2")]
single = evaluation.compare(timed, sides, greedy, precision=settings.precision)
panels.replies_html(single)

# %%
configs = {"falcon": models.config(settings.falcon_chat)}
configs["llama"] = models.config(settings.llama_chat)
table = single.speed()
for side, name in single.names.items():
    cache = machine.kv_bytes_per_token(configs[side], settings.precision)
    table.loc[name, "cache (KiB per token)"] = cache / 1024
table.round(3)

# %% [markdown]
# ### All questions, in batches
#
# In a batch every step computes one token of many replies. That is far more tokens per second in all, and says nothing about the
# time that one person waits: do not mix the two. Here is one reply of each kind. A reply ends at the limit of new tokens,
# finished or not; a cut reply is judged as it stands. Nobody knows what a guess would score under a rule for the form, so it
# counts as 0 below.

# %%
options = {"precision": settings.precision, "batch_size": batch_size}
talk = evaluation.compare(prompts, sides, greedy, **options)
first_of_kind = {item.kind: number for number, item in reversed([*enumerate(prompts)])}
panels.replies_html(talk, sorted(first_of_kind.values()))

# %%
for side, name in talk.names.items():
    cut = sum(reply.finish_reason == "length" for reply in talk.replies[side])
    print(f"{name}: {cut} of {len(prompts)} replies cut after {max_new_tokens} tokens")
evaluation.findings(talk, "falcon", "llama")

# %% [markdown]
# ### A model as the judge
#
# No rule can say which of two stories is better. A common way is to ask a model: *which reply is better, 1 or 2?* A judge may
# prefer the place rather than the reply, so it sees each pair in both orders, and has decided only if it prefers the same reply
# twice. [Zheng et al. 2023](https://arxiv.org/abs/2306.05685) found this in 65% of pairs for GPT-4 and in 46% for GPT-3.5. What
# is *this* judge worth? It is also asked about pairs that a key decides, where we know the right verdict. (It is one of the two
# models that it judges. Such a judge may prefer its own style, which a key would not show.)

# %%
judged = None
if tested_pairs:  # 0: no judge
    judged = evaluation.judge(
        talk, sides["llama"], tested=tested_pairs, precision=settings.precision
    )
    print(judged.summary())

# %% [markdown]
# ### Win rates by kind
#
# A right reply beats a wrong one; two right or two wrong ones tie, and a tie counts half. A rate of 0.5 means that neither is
# ahead. The [interval](GLOSSARY.md#interval) (95%, from `low` to `high`) is wide for kinds of 4 to 12 questions: a single kind
# can show a large difference only. What a judge says that is worth no more than a coin is no result, and its rows are there to
# be seen as such.

# %%
rates = evaluation.win_rates(talk, judged)
rates.rename(columns={"rate": f"{talk.names['falcon']} wins"}).round(3)

# %%
scores = talk.scores()
subject = " and ".join(talk.labels.values())
figure = figures.score_intervals(scores[scores.rule == "correct"], subject)
runs.record_figure("prompt_scores", figure)

# %% tags=["record"]
columns = {"tokens_per_second": "tokens/s", "characters_per_second": "characters/s"}
columns |= {"first_token": "first token (s)", "weights": "weights (MiB)"}
units = {"first_token": "s", "weights": "MiB"}
values = {}
for side, model in single.labels.items():
    for name, column in columns.items():
        # A model whose replies are empty has no speed, which is recorded as such.
        value = table.loc[single.names[side], column]
        value = known(value, "none: no reply has a second token", 3)
        values[f"{side}_{name}"] = Measured(value, units.get(name, column), model=model)
runs.record_all(values)

# %% tags=["record"]
values = {}
for side, model in talk.labels.items():
    share = round(talk.score(side).estimate, 4)
    values[f"prompts_right_{side}"] = Measured(share, tolerance=0.05, model=model)
rate = round(rates.rate.iloc[-1], 4)
values["prompts_win_rate_falcon"] = Measured(rate, tolerance=0.05, model=talk.labels["falcon"])
if judged:
    agreement, model = round(judged.agreement.estimate, 4), talk.labels["llama"]
    values["judge_agreement"] = Measured(agreement, tolerance=0.1, model=model)
    first_place = round(judged.first_place, 4)
    values["judge_first_place"] = Measured(first_place, tolerance=0.1, model=model)
runs.record_all(values)

# %% [markdown]
# ## 3 · The saddle, as a test
#
# The article reports that Falcon-180B, given a list, counted a *saddle* among the animals, while Llama-2-70B answered briefly and
# correctly (A29). One reply proves little. Here are more questions of this kind. Their nouns were frozen before any of this
# project's models was trained: 36 animals and 36 other things, a third of them animal gear such as saddle, leash and cage.

# %%
items = evaluation.read_items(Path("data/animal_items.jsonl"))
for kind in ("yes_no", "choice", "list"):
    of_kind = [item for item in items if item.kind == kind]
    print(f"{len(of_kind):3} x {kind:7} {of_kind[0].question}")
    print(f"{'':14}key: {', '.join(of_kind[0].answer)}")

# %% [markdown]
# Rules score a reply, the same for both models. They are simple on purpose: you can read them, and see where they are unfair.
# (The question asks for the name only. A reply that also explains why the other thing is *not* an animal names it, and counts as
# wrong.) A reply that names no option at all is *no answer*: that is another failure than a wrong one, and a score hides which of
# the two it was. Only a correct reply can be concise, because gibberish is short too.

# %%
for rule in (evaluation.is_correct, evaluation.classify, evaluation.is_concise):
    print(inspect.getsource(rule))
print("CONCISE_WORDS =", evaluation.CONCISE_WORDS)

# %%
short = Sampling(temperature=0, max_new_tokens=24, seed=seed)
options = {"precision": settings.precision, "batch_size": batch_size}
test = evaluation.compare(items, sides, short, **options)
saddles = [number for number, item in enumerate(items) if "saddle" in item.question]
panels.replies_html(test, saddles)

# %% [markdown]
# ### What does a score have to beat?
#
# A score means nothing without its *controls*. Half of the yes-or-no questions and half of the choices can be guessed. (For a
# list, a guess names each of five words by the toss of a coin.) Two more controls answer without reading the question:
#
# - *always the same answer*: of all answers, the one that is right most often;
# - *only greeted*: the model gets "Hello." in place of each question, and its reply is scored as if it were the answer.

# %%
controls = evaluation.controls(test, sides, short, precision=settings.precision)
with_controls = test.beside(controls)
table = with_controls.answers()
table.round(3)

# %% [markdown]
# `share` is the share of right replies. Its [interval](GLOSSARY.md#interval) (95%, [Wilson's](GLOSSARY.md#wilson): `low` to
# `high`) says how far it may be off by chance. It treats the items as independent, but each noun is in four or five of them, so
# it is somewhat too narrow.

# %%
subject = " and ".join(test.labels.values())
runs.record_figure("scores", figures.reply_classes(table, subject))

# %% [markdown]
# ### The difference, by kind
#
# Both models answered the same items, so compare them item by item: only items on which they differ say anything. The *[paired
# difference](GLOSSARY.md#paired-difference)* has an interval of its own. The [exact McNemar test](GLOSSARY.md#mcnemar) computes
# how likely such an uneven split of the differing items would be if the two were equally good: a small `p` speaks against luck.
# It says nothing about *why* they differ, and the difference over all items mixes kinds of questions, so look at each kind.

# %%
differences = test.differences("falcon", "llama")
differences["p"] = [f"{p:.2g}" for p in differences["p"]]
differences.round(3)

# %% [markdown]
# The *win rate* also counts conciseness. A reply wins if it is correct and the other is not, or if both are correct and only this
# one is concise. Two replies that are not correct tie, however short they are. A tie counts half, so a side that wins nothing can
# still have a rate well above zero.

# %%
difference = test.difference("falcon", "llama")
win = test.win_rate("falcon", "llama")
won, lost = difference.only_first, difference.only_second
name = test.names["falcon"]
print(f"{name}, correctness alone: {won} won, {lost} lost, {len(items) - won - lost} tied")
print(f"{name}, win rate with ties as half: {win.estimate:.3f} ({win.low:.3f} to {win.high:.3f})")

# %% tags=["record"]
values = {}
for side, label in test.labels.items():
    for kind in test.kinds:
        classes = test.classes(side, kind)
        for name, answer in {"right": "right", "unanswered": "no answer"}.items():
            share = round(classes.count(answer) / len(classes), 4)
            values[f"{kind}_{name}_{side}"] = Measured(share, model=label)
label = test.labels["falcon"]
for kind in test.kinds:
    by_kind = test.difference("falcon", "llama", kind=kind)
    values[f"{kind}_guessing"] = round(test.guessing(kind), 4)
    values[f"{kind}_difference"] = Measured(round(by_kind.interval.estimate, 4), model=label)
    values[f"{kind}_p"] = Measured(round(by_kind.p_value, 4), tolerance=0.2, model=label)
runs.record_all(values, tolerance=0.05)

# %% [markdown]
# ### Does the scorer read the key?
#
# A score that does not depend on its key measures nothing. Take ten items that the better side answered correctly, swap right and
# wrong in the key, and score the *same* replies again: the side must lose ten.

# %%
better = max(test.sides, key=lambda side: sum(test.verdicts(side)))
right = [number for number, passed in enumerate(test.verdicts(better)) if passed][:10]
key = list(items)
for number in right:
    key[number] = replace(items[number], answer=items[number].others, others=items[number].answer)
again = test.rescored(key)
lost = sum(test.verdicts(better)) - sum(again.verdicts(better))
print(f"{test.names[better]}: {sum(test.verdicts(better))} correct with the key")
print(f"{lost} fewer with ten answers swapped")

# %% [markdown]
# ### What does the system message do?
#
# In section 1 the two prompts differed in more than their marks: one had a system message. Here that model is asked twice, with
# its format's own system message and with an *empty* one. Both times a sixth of the items, so that the batches are the same: in
# 16 bits, a reply also depends on what shares its batch.

# %%
own, empty = "own system message", "empty system message"
few = items[::6]
both = evaluation.compare(few, {own: sides["llama"]}, short, **options)
both = both.beside(evaluation.compare(few, {empty: sides["llama"]}, short, system="", **options))
both.answers().round(3)

# %%
effect = both.difference(own, empty)
pairs = zip(both.replies[own], both.replies[empty], strict=True)
changed = sum(reply.text != other.text for reply, other in pairs)
print(f"{test.names['llama']}: {changed} of {len(few)} replies differ")
print(f"only right with its {own}: {effect.only_first}, with an {empty}: {effect.only_second}")
print(f"McNemar's exact p: {effect.p_value:.2g}")
tokens = [both.replies[side][0].prompt_tokens for side in (own, empty)]
print(f"the first prompt has {tokens[0]} tokens, and {tokens[1]} with an {empty}")

# %% tags=["record"]
values = {"lost_by_swapping_ten_answers": Measured(lost, "items")}
for side, label in test.labels.items():
    score, concise = test.score(side).estimate, test.score(side, "concise").estimate
    values[f"animal_score_{side}"] = Measured(round(score, 4), "", "A29", 0.05, model=label)
    values[f"animal_concise_{side}"] = Measured(round(concise, 4), "", "A29", 0.05, model=label)
label = test.labels["falcon"]
# Only the real pair can agree or disagree with the statement A28.
not_better = (difference.interval.low <= 0) if settings.falcon_chat.stand_in_for is None else None
estimate = round(difference.interval.estimate, 4)
values["animal_difference"] = Measured(estimate, "", "A28", 0.05, not_better, label)
values["win_rate_falcon"] = Measured(round(win.estimate, 4), tolerance=0.05, model=label)
label = test.labels["llama"]
values["changed_by_system_message"] = Measured(changed, "replies", tolerance=10, model=label)
runs.record_all(values)

# %% [markdown]
# ## 4 · The same items, scored without a reply
#
# In most benchmarks, such as those of the Open LLM Leaderboard, a model does not write. They compare how *likely* the model finds
# each option, and the more likely one counts as its choice. In plain PyTorch, for one item:

# %%
import torch

item = next(item for item in items if item.kind == "choice")
with evaluation.opened(sides["falcon"], settings.precision) as loaded, torch.inference_mode():
    prompt = loaded.format.render([{"role": "user", "content": item.question}])
    start = len(loaded.tokenizer(prompt)["input_ids"])
    for word in (*item.answer, *item.others):
        ids = torch.tensor([loaded.tokenizer(f"{prompt} A {word}")["input_ids"]])
        logits = loaded.model(ids.to(loaded.model.device)).logits[0, start - 1 : -1].float()
        chosen = logits.log_softmax(-1).gather(1, ids[0, start:, None].to(logits.device))
        print(f"{word}: ln p = {chosen.sum().item():.2f}")

# %% [markdown]
# `evaluation.multiple_choice` does this in batches for many items. First we write each item as a question with two options:


# %%
def question_of(item: evaluation.Item) -> evaluation.Question:
    words = sorted((*item.answer, *item.others))
    options = tuple(f"{'An' if word[0] in 'aeiou' else 'A'} {word}" for word in words)
    right = words.index(item.answer[0])
    return evaluation.Question([{"role": "user", "content": item.question}], options, right)


questions = [question_of(item) for item in items if item.kind == "choice"]

# %% [markdown]
# But does the more likely option show that the model *understood*? Some words are more likely whatever the question. As a control,
# we offer the same options after a prompt that asks nothing. Guessing would score 0.5.

# %%
hello = [{"role": "user", "content": evaluation.GREETING}]
control = [replace(question, prompt=hello) for question in questions]
asked, greeted = {}, {}
for side, model in sides.items():
    with evaluation.opened(model, settings.precision) as loaded:
        asked[side] = evaluation.multiple_choice(loaded, questions)
        greeted[side] = evaluation.multiple_choice(loaded, control)

# %%
for side, name in test.names.items():
    shares = {"by reply": test.score(side, kind="choice"), "by likelihood": asked[side].accuracy}
    shares["by likelihood, only greeted"] = greeted[side].accuracy
    for what, share in shares.items():
        print(f"{name}, {what}: {share.estimate:.3f} ({share.low:.3f} to {share.high:.3f})")
    p = mcnemar(asked[side].correct, greeted[side].correct)
    print(f"{name}, question against greeting: McNemar's exact p = {p:.2g}\n")

# %% [markdown]
# The scores by reply and by [likelihood](GLOSSARY.md#likelihood) can differ widely: the second one cannot be "no answer".
# If the greeting alone scores as well as the question, the score measures which words the model prefers, not whether it
# understood. A published score means little without the method behind it and without its control.
#
# ### The same items in EleutherAI's harness
#
# The leaderboard's numbers come from the lm-evaluation-harness. `evaluation.evaluate` runs it on our model with a task file of
# this workbook, offline. Here the options are the bare nouns.

# %%
print(Path("data/tasks/animal_choice.yaml").read_text())

# %%
with evaluation.opened(sides["falcon"], settings.precision) as loaded:
    harness = evaluation.evaluate(loaded, ["animal_choice"])
print("lm-evaluation-harness", harness.version)
harness.table()

# %% [markdown]
# ### Which is better?
#
# A higher score is not yet an answer. The sentences below are computed from everything above: where the difference comes from,
# whether a side always says the same or nothing, whether it beats guessing and its own control. Only a side that has more right
# *and* cannot have it without reading the questions is called better.

# %%
found = evaluation.findings(test, "falcon", "llama", asked, greeted)
found

# %% tags=["record"]
values = {"which_is_better": found.better}
for side, label in test.labels.items():
    for name, result in {"choice_by_likelihood": asked, "choice_greeted": greeted}.items():
        share = round(result[side].accuracy.estimate, 4)
        values[f"{name}_{side}"] = Measured(share, model=label)
value = round(harness.rows[0].value, 4)
values["harness_choice_falcon"] = Measured(value, model=test.labels["falcon"])
runs.record_all(values, tolerance=0.05)

# %% [markdown]
# ## 5 · Ask them yourself
#
# Type a question and watch both replies grow. In an unattended run the panel asks the questions below and shows both replies.

# %%
script = ["Is a saddle an animal?", "What is your favorite food?"]
panels.comparison_panel(sides, greedy, script=script, precision=settings.precision)

# %% [markdown]
# ## 6 · What stand-ins can tell
#
# The *method* is the real one: formats, rules, intervals and the harness work the same on any pair. The *numbers* belong to the
# models in the table at the top, which are [stand-ins](GLOSSARY.md#stand-in) on most profiles. What is known about the real
# pair was published:

# %%
published = pd.read_csv("data/real_pair.csv", index_col=0)
published

# %% [markdown]
# The leaderboard's average, once the reason to call Falcon-180B ahead, was turned round by two more tasks: by 0.02 points, which
# is no difference. What else can be said follows from the published configurations, tokens and GPU hours.

# %%
ids = {"Falcon-180B": "tiiuae/falcon-180B", "Llama-2-70B": "meta-llama/Llama-2-70b-chat-hf"}
tokens = {"Falcon-180B": 3.5e12, "Llama-2-70B": 2e12}
gpu_hours = {"Falcon-180B": 7e6, "Llama-2-70B": 1_720_320}
real = {name: machine.published_config(repository) for name, repository in ids.items()}
sizes = {name: machine.count_parameters(config) for name, config in real.items()}
flop = {name: machine.training_flop(size, tokens[name]) for name, size in sizes.items()}

computed = pd.DataFrame({"parameters (billion)": pd.Series(sizes) / 1e9})
computed["context (tokens)"] = [config.max_position_embeddings for config in real.values()]
computed["tokens per parameter"] = [tokens[name] / sizes[name] for name in ids]
computed["FLOP per token (billion)"] = 2 * computed["parameters (billion)"]
computed["training (10²⁴ FLOP)"] = pd.Series(flop) / 1e24
used = [machine.implied_utilisation(flop[name], gpu_hours[name]) for name in ids]
computed["share of the GPUs' peak (%)"] = [100 * share for share in used]

# %%
# 6·N·D with D = 20·N is 120·N², so 20 tokens per parameter make this size of the same compute.
computed["size by Chinchilla's rule (billion)"] = (pd.Series(flop) / 120) ** 0.5 / 1e9
computed.T.round(1)

# %% [markdown]
# *Tokens per parameter.* For a given training compute, the [loss](GLOSSARY.md#loss) is lowest with about 20 tokens per parameter
# ([Hoffmann et al. 2022](https://arxiv.org/abs/2203.15556), who trained Chinchilla so). Falcon-180B has just the size that this
# rule makes of its compute. Llama-2-70B is smaller than the rule asks for, and was trained for longer. But the rule counts
# training alone. Each token that Llama 2 reads or writes costs 2.6 times less (2·N operations), for as long as it is used. So
# 4.5 times the training compute bought Falcon-180B little on the leaderboard, and made it the dearer one to run.
#
# *Context.* Llama 2 also reads twice as many tokens at once. *Chat.* A person who chats (A28) meets the chat models, not these
# base models. One of them was tuned on conversations alone, the other on human preferences as well, and no score above
# measures that.
#
# How far are this profile's models from the real pair, in parameters?

# %%
ratios = {}
for title, pair in (("the real pair", real), ("this profile", configs)):
    falcon, llama = (machine.count_parameters(config) for config in pair.values())
    ratios[title] = falcon / llama
    print(f"{title}: {falcon:,} and {llama:,} parameters, {falcon / llama:.2f} to 1")

# %% tags=["record"]
ratio, label = round(ratios["this profile"], 3), settings.falcon_chat.label
values = {"size_ratio_here": Measured(ratio, "x", model=label)}
for side, name in zip(talk.sides, ids, strict=True):
    per_parameter = round(tokens[name] / sizes[name], 2)
    values[f"real_tokens_per_parameter_{side}"] = Measured(per_parameter, "tokens", model=ids[name])
runs.record_all(values)

# %% [markdown]
# On the `laptop` profile, the Falcon side is far smaller than the Llama side and was trained on some millions of tokens, not
# trillions: its answers say nothing about Falcon-180B. Notebook 05 repairs some of the errors found here.
#
# ## What you saw
#
# One reply is an anecdote; items with a key, a rule and an interval turn it into a measurement with an error bar. Paired on the
# same items, two models can be told apart with fewer of them. But a difference needs its controls before it is an answer, and a
# score depends on the method of scoring as much as on the model. The numbers of this run:

# %%
print(found.sentences[-1])
for side, name in test.names.items():
    classes = test.classes(side)
    print(f"{name}: {classes.count('no answer')} of {len(classes)} replies are no answer")
    shares = [test.score(side, kind="choice"), asked[side].accuracy, greeted[side].accuracy]
    by_reply, by_likelihood, control = (share.estimate for share in shares)
    print(f"{name}, the same choices: {by_reply:.2f} by reply, {by_likelihood:.2f} by likelihood")
    print(f"{name}, the control of the second, only greeted: {control:.2f}")

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
#
# Replace the three dots and run the cell. The check says *not yet* and what is off, or *right*.
# `exercises.hint("04-1")` gives a hint, and one more each time. The solutions are folded. The last exercise asks for a finding:
# there may be several right answers, and the check measures yours.
#
# **1.** Write the rule of correctness yourself: true if the text contains every word of `answer` and none of `others`, as whole
# words, ignoring case. (A plural may count or not.)


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
# **2.** Compute Wilson's 95% interval of a proportion: with `p = passed / n` and `z = 1.96`, its centre is `(p + z²/2n) / (1 +
# z²/n)` and its half-width `z / (1 + z²/n) · √(p(1 - p)/n + z²/4n²)`.


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
# **3.** Compute McNemar's exact test: of the `a + b` items on which the models differ, `a` favour the first. The p-value is the
# probability of a split at least as uneven, in either direction, if each of them is a fair coin toss.


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

# %% [markdown]
# **4. A finding.** Write an item that both models fail: an `evaluation.Item` whose question offers what it asks for, with the words
# of a right answer and those of a wrong one. At least one of the models must name the wrong ones; it is not enough that both say
# something else. The check asks both models.

# %% tags=["exercise"]
hard_item = ...  # evaluation.Item(id="mine", kind="choice", question=..., answer=..., others=...)

exercises.check("04-4", hard_item, sides=sides, precision=settings.precision)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# # A model that always says No fails wherever Yes is right. Look above at what each model prefers to say.
# hard_item = evaluation.Item(
#     id="mine",
#     kind="yes_no",
#     question="Is a puppy an animal? Answer yes or no.",
#     answer=("yes",),
#     others=("no",),
# )
#
# exercises.check("04-4", hard_item, sides=sides, precision=settings.precision)
# ```
#
# </details>

# %% [markdown]
# **Before:** [03 · Chat prompting](03_chat_prompting.ipynb) · **Next:** [05 · Fine-tuning](05_fine_tuning.ipynb) · [Glossary](GLOSSARY.md)
