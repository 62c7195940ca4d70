# ---
# jupyter:
#   workbook:
#     models:
#       falcon: [profile]
#       falcon_chat: [profile]
#     work:
#       falcon:
#         - {load: 1}
#         - {reply: 1, tokens: 60, prompt: 10}
#         - {reply: 1, tokens: max_new_tokens, prompt: 10}
#       falcon_chat:
#         - {load: 1}
#         - {reply: 9, tokens: max_new_tokens, prompt: 40}
#         - {reply: 7, tokens: 40, prompt: 52}
#     parameters:
#       seed: {least: 0, most: 4294967295}
#       question: {blank: false}
#       max_new_tokens: {least: 1, most: 100000}
# ---

# %% [markdown]
# # 03 · Chat prompting: the format it was trained on
#
# **You will learn**
# - what a base model does with a question, and what a chat model does;
# - the exact text Falcon-180B-Chat was trained on, and why the function printed with its announcement builds a different one;
# - stop strings, history, system prompts, and what happens when the context is full;
# - how the same conversation looks in other models' formats.
#
# **Before:** [02 · Quantization](02_quantization.ipynb) · **Next:** [04 · Falcon and Llama](04_falcon_vs_llama.ipynb) · [Glossary](GLOSSARY.md)

# %% tags=["parameters"]
profile = "laptop"
seed = 0
question = "What do you like to do on the weekend?"
max_new_tokens = 60

# %%
from helpers import exercises, generation, models, panels, runs
from helpers.generation import Sampling
from helpers.runs import Measured

notebook_name = "03_chat_prompting"  # recorded and expected values are found by this name
models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# ## 1 · Base model and chat model
#
# The [base model](GLOSSARY.md#base-model) has no prompt format: it continues text. The article says that it is not meant for
# conversation, but for further fine-tuning (A20). The chat model was fine-tuned on conversations (Open-Platypus, UltraChat and
# Airoboros, A23). First we ask the base model a question, in plain transformers:

# %%
import torch

base = models.load(settings.falcon, settings.precision)
ids = base.tokenizer(question, return_tensors="pt")["input_ids"].to(base.model.device)
mask = torch.ones_like(ids)
torch.manual_seed(seed)
output = base.model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=60)
print(base.tokenizer.decode(output[0]))

# %% [markdown]
# `generation.generate` takes a text as it is, or messages, which it renders in the format of the model. The reply says why it
# ended: at an end token, at a [stop string](GLOSSARY.md#stop-string), or at the token limit.

# %%
sampling = Sampling(temperature=0.6, top_p=0.9, max_new_tokens=max_new_tokens, seed=seed)
base_reply = generation.generate(base, question, sampling)
print(f"{question}{base_reply.text}\n\n[ended by: {base_reply.finish_reason}]")

# %%
models.unload(base)
chat_model = models.load(settings.falcon_chat, settings.precision)
chat_reply = generation.generate(chat_model, [{"role": "user", "content": question}], sampling)
print(f"{chat_reply.text}\n\n[ended by: {chat_reply.finish_reason}]")

# %% [markdown]
# A base model carries on writing, often both sides of a conversation. A chat model answers and ends its turn.

# %% tags=["record"]
base_end, chat_end = base_reply.finish_reason, chat_reply.finish_reason
label = settings.falcon.label
values = {"base_ended_by": Measured(base_end, agrees=base_end == "length", model=label)}
label = settings.falcon_chat.label
values["chat_ended_by"] = Measured(chat_end, agrees=chat_end != "length", model=label)
runs.record_all(values, claim="A20")

# %% [markdown]
# ## 2 · The format, to the letter
#
# One line per turn: `System:`, `User:`, `Falcon:` (A21). The prompt ends with `Falcon:` and *no* space, because the space
# belongs to the first word of the reply. In plain Python:

# %%
messages = [
    {"role": "system", "content": "You are a friendly falcon."},
    {"role": "user", "content": "Hello! How are you?"},
    {"role": "assistant", "content": "I am well, thank you."},
    {"role": "user", "content": "What do you eat?"},
]
names = {"system": "System", "user": "User", "assistant": "Falcon"}
plain = "\n".join(f"{names[m['role']]}: {m['content']}" for m in messages) + "\nFalcon:"
print(plain)

# %% [markdown]
# The model's format renders the same text, and so does the [chat template](GLOSSARY.md#chat-template) of its tokenizer, if it has
# one:

# %%
falcon = models.format_for("falcon-chat")
assert falcon.render(messages) == plain
rendered = chat_model.format.render(messages)
tokenizer, templated = chat_model.tokenizer, None
if tokenizer.chat_template:
    options = {"tokenize": False, "add_generation_prompt": True}
    templated = tokenizer.apply_chat_template(messages, **options)
    print("the tokenizer's template gives the same text:", templated == rendered)
print(repr(rendered))

# %% [markdown]
# The model reads tokens. `encode` gives the ids of a conversation: the text's, except that nothing a user writes becomes a
# control token such as `<|endoftext|>`. Hover over a token to see its id.

# %%
panels.tokens_html(tokenizer, chat_model.format.encode(tokenizer, messages))

# %% tags=["record"]
if templated is not None:
    same, label = rendered == templated, settings.falcon_chat.label
    values = {"render_equals_template": Measured(same, agrees=same, model=label)}
    display(runs.record_all(values, claim="A21"))

# %% [markdown]
# ## 3 · The printed `format_prompt` is wrong
#
# The announcement prints a function that builds the prompt from a message, the history and a [system
# prompt](GLOSSARY.md#system-prompt). Its last line is *inside* the loop over the history. This function does the same, and so
# does `models.published_format_prompt`.


# %%
def format_prompt(message, history, system_prompt):
    prompt = f"System: {system_prompt}\n" if system_prompt else ""
    for user_message, reply in history:
        prompt += f"User: {user_message}\nFalcon: {reply}\n"
        prompt += f"User: {message}\nFalcon:"  # inside the loop
    return prompt


wrong = models.published_format_prompt
past = [("a", "b"), ("c", "d")]
assert all(wrong("e", past[:n], "s") == format_prompt("e", past[:n], "s") for n in range(3))

# %% [markdown]
# With one turn of history it does give the format of section 2:

# %%
system, *turn, last = [message["content"] for message in messages]
one_turn = wrong(last, [tuple(turn)], system) == plain
print("with one turn of history, the same text:", one_turn)

# %% [markdown]
# With an empty history, the user's message is missing. (The question comes from the article: it reports that Falcon-180B once
# counted a saddle among the animals, A29.)

# %%
saddle = "Is a saddle an animal?"
no_turn = wrong(saddle, history=[], system_prompt="You are a friendly falcon.")
print(no_turn)

# %% [markdown]
# With two turns of history, the prompt asks the question twice, once in the middle of the past:

# %%
history = [("Hello!", "Hi there."), ("How are you?", "I am well.")]
two_turns = wrong(saddle, history=history, system_prompt="")
print(two_turns)

# %% [markdown]
# This is the right prompt:

# %%
conversation = []
for user_message, reply in history:
    conversation.append({"role": "user", "content": user_message})
    conversation.append({"role": "assistant", "content": reply})
print(falcon.render([*conversation, {"role": "user", "content": saddle}]))

# %% [markdown]
# Does it matter? The chat model replies to both prompts with [greedy decoding](GLOSSARY.md#greedy-decoding). With the wrong
# prompt, it never sees the question.

# %%
greedy = Sampling(temperature=0, max_new_tokens=40)
prompts = {"wrong": wrong(question, history=[], system_prompt="You are a friendly falcon.")}
prompts["right"] = chat_model.format.render([messages[0], {"role": "user", "content": question}])
for name, text in prompts.items():
    reply = generation.generate(chat_model, text, greedy)
    print(f"{name} prompt: {text!r}\n       reply: {reply.text!r}\n")

# %% tags=["record"]
lost, asked = "saddle" not in no_turn, two_turns.count("saddle")
values = {"format_as_printed": Measured(one_turn, claim="A21", agrees=one_turn)}
values["published_loses_message"] = Measured(lost, claim="A22", agrees=not lost)
values["published_asks_times"] = Measured(asked, "times", "A22", agrees=asked == 1)
runs.record_all(values)

# %% [markdown]
# ## 4 · One conversation, five formats
#
# Every family of models was trained on its own format; falcon-7b-instruct, from the same makers, on another than the 180B. A
# format that the model never saw raises no error. This is what the chat model of this profile replies to each.

# %%
different = {}
for name in ("falcon-chat", "falcon-instruct", "llama-2", "chatml", "plain"):
    text = models.format_for(name).render(messages)
    reply = generation.generate(chat_model, text, greedy)
    print(f"--- {name} " + "-" * (60 - len(name)))
    print(f"{text}\n>>> {reply.text!r}")
    different[name] = reply.text

# %% [markdown]
# ## 5 · Where to stop
#
# Falcon-180B-Chat's history has no end token between turns, so a model may continue and write the user's next line itself. A
# *stop string* prevents this: generation ends as soon as `\nUser:` appears, and the string is cut from the reply, with the white
# space before it. A stream holds back what may still be cut until it is clear what follows.

# %%
print("stop strings:", chat_model.format.stop_strings)
text = "I like to fly.\nUser: Why?\nFalcon: It is fun."
for stop in chat_model.format.stop_strings:
    text = text.split(stop)[0]
print("cut:", repr(text))

# %% [markdown]
# ## 6 · A conversation
#
# A chat is a list of messages that grows. In plain Python, each turn renders the whole list again:

# %%
turns = []
for user_message in ("Hello!", "What is your favorite movie?"):
    turns.append({"role": "user", "content": user_message})
    reply = generation.generate(chat_model, turns, sampling)
    turns.append({"role": "assistant", "content": reply.text})
    print(f"User: {user_message}\nFalcon: {reply.text}")

# %% [markdown]
# `generation.Chat` keeps the list, the system prompt and the seeds, and counts the tokens left. It can be saved to a JSON file.

# %%
# The decoding method of the profile; see notebook 01, section 8.
decoding = generation.for_profile(settings, chat_model)
system = "You are a friendly falcon."
chat = generation.Chat(chat_model, system=system, sampling=sampling, decoding=decoding)
for user_message in ("Hello!", "Do you like music?", "What kind of music?"):
    print("User:", user_message)
    print("Falcon:", chat.ask(user_message).text)
print(f"\n{chat.tokens_left()} tokens of the context are left")

# %%
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    chat.save(Path(folder) / "chat.json")
    again = generation.Chat.load(Path(folder) / "chat.json", chat_model)
print("the same messages after loading:", again.messages == chat.messages)

# %% [markdown]
# ### When the context is full
#
# If we cut tokens off the front, half a turn is left, and the system prompt is lost. `fit` drops whole turns, oldest first. It
# keeps the system message and the last question, and raises an error if even these are too long.

# %%
limit = 60
long = [messages[0], *messages[1:3] * 6, messages[-1]]
kept = chat_model.format.fit(long, tokenizer, limit)
for conversation in (long, kept):
    tokens = len(tokenizer(chat_model.format.render(conversation))["input_ids"])
    print(f"{len(conversation)} messages, {tokens} tokens (limit: {limit})")
print(chat_model.format.render(kept))

# %% tags=["record"]
values = {"chat_survives_saving": again.messages == chat.messages}
values["fit_messages_kept"] = Measured(len(kept), "messages")
values["fit_keeps_system"] = kept[0] == messages[0]
runs.record_all(values)

# %% [markdown]
# ## 7 · Talk to it
#
# Type a message, change the [temperature](GLOSSARY.md#temperature), stop a reply half-way, look at the literal prompt. In an
# unattended run the panel plays the script below and shows the transcript instead.

# %%
script = ["Hello! How are you?", "What did you do today?", "Tell me a story about a little bird."]
panel_chat = generation.Chat(chat_model, sampling=sampling, decoding=decoding)
panels.chat_panel(panel_chat, script=script)

# %% [markdown]
# ## What you saw
#
# The chat format is plain text. A prompt is right only if it equals, character by character, the text on which the model was
# trained. The answers to the goals at the top, with what happened in this run:

# %%
ends = {"end": "by itself", "stop": "at a stop string", "length": "at the token limit"}
answers = [
    f"The base model ended {ends[base_end]}, the chat model {ends[chat_end]}.",
    f"The printed function lost the question: {lost}; with two turns it asked {asked} times.",
    f"{len(kept)} of {len(long)} messages fit {limit} tokens; system prompt kept: {kept[0] == long[0]}.",
    f"One conversation in {len(different)} formats: {len(set(different.values()))} different replies.",
]
print(*answers, sep="\n")

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
#
# Replace the three dots and run the cell. The check says *not yet* and what is off, or *right*.
# `exercises.hint("03-1")` gives a hint, and one more each time. The solutions are folded. The last exercise asks for a finding:
# there may be several right answers, and the check measures yours.
#
# **1.** Repair `format_prompt`: it takes a message, a history of (user, falcon) pairs and a system prompt (which may be empty),
# and returns the text of section 2.


# %% tags=["exercise"]
def format_prompt(message: str, history: list[tuple[str, str]], system_prompt: str) -> str:
    prompt = f"System: {system_prompt}\n" if system_prompt else ""
    for user_message, reply in history:
        prompt += f"User: {user_message}\nFalcon: {reply}\n"
        prompt += f"User: {message}\nFalcon:"
    return prompt


exercises.check("03-1", format_prompt)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def format_prompt(message: str, history: list[tuple[str, str]], system_prompt: str) -> str:
#     prompt = f"System: {system_prompt}\n" if system_prompt else ""
#     for user, falcon in history:
#         prompt += f"User: {user}\nFalcon: {falcon}\n"
#     return prompt + f"User: {message}\nFalcon:"  # after the loop, not in it
#
#
# exercises.check("03-1", format_prompt)
# ```
#
# </details>

# %% [markdown]
# **2.** Fit a history into a limit: drop whole turns, oldest first, until the words of all turns and of the question are at
# most `limit`. Count words with `str.split`.


# %% tags=["exercise"]
def trim(history: list[tuple[str, str]], question: str, limit: int) -> list[tuple[str, str]]: ...


exercises.check("03-2", trim)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def trim(history: list[tuple[str, str]], question: str, limit: int) -> list[tuple[str, str]]:
#     def words(turns):
#         return len(question.split()) + sum(len(text.split()) for turn in turns for text in turn)
#
#     while history and words(history) > limit:
#         history = history[1:]
#     return history
#
#
# exercises.check("03-2", trim)
# ```
#
# </details>

# %% [markdown]
# **3.** Cut a reply at the earliest of several stop strings.


# %% tags=["exercise"]
def cut(text: str, stop_strings: tuple[str, ...]) -> str: ...


exercises.check("03-3", cut)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def cut(text: str, stop_strings: tuple[str, ...]) -> str:
#     found = [text.find(stop) for stop in stop_strings if stop in text]
#     return text[: min(found, default=len(text))]
#
#
# exercises.check("03-3", cut)
# ```
#
# </details>

# %% [markdown]
# **4. A finding.** Does the chat model read its history? Design an experiment: one past turn with a gap `{}`, a last question
# without it, and two words for the gap. If the reply names the word that was in the gap, for both words, and never the other one,
# the model must have read it there. The check asks the model, with greedy decoding.

# %% tags=["exercise"]
experiment = ...  # {"user": ..., "reply": ..., "question": ..., "words": (..., ...)}

exercises.check("03-4", experiment, model=chat_model)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# # falcon-mini does so with some words and not with others; another model may need other words.
# experiment = {"user": "Do you like {}?", "reply": "I love {}.", "question": "Why?"}
# experiment["words"] = ("pizza", "music")
#
# exercises.check("03-4", experiment, model=chat_model)
# ```
#
# </details>

# %% [markdown]
# **Before:** [02 · Quantization](02_quantization.ipynb) · **Next:** [04 · Falcon and Llama](04_falcon_vs_llama.ipynb) · [Glossary](GLOSSARY.md)
