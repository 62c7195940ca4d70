# ---
# jupyter:
#   workbook:
#     models:
#       falcon: [profile]
#       falcon_chat: [profile]
# ---

# %% [markdown]
# # 03 · Chat prompting: the format it was trained on
#
# **You will learn**
# - what a base model does with a question, and what a chat model does;
# - the exact text Falcon-180B-Chat was trained on, and why the function printed with its announcement builds another;
# - stop strings, history, system prompts, and what happens when the context is full;
# - how the same conversation looks in other models' formats.
#
# | profile | time | memory |
# |---|---|---|
# | `laptop` | 30 s | 2 GiB |
# | `1x24gb` | minutes, after a download of 28 GB | one 24 GB GPU |
# | `2x80gb`, `8x40gb`, `8x80gb` | many minutes, after a download of 720 GB | see notebook 00 |
#
# **Before:** [02 · Quantization](02_quantization.ipynb) · **Next:** [04 · Falcon beside Llama](04_falcon_vs_llama.ipynb)

# %% tags=["parameters"]
profile = "laptop"
seed = 0
question = "What do you like to do on the weekend?"
max_new_tokens = 60

# %%
from helpers import exercises, generation, models, panels, runs
from helpers.generation import Sampling

models.tidy_output()
settings = models.load_profile(profile)
models.table(settings)

# %% [markdown]
# ## 1 · Base against chat
#
# The base model has no prompt format: it continues text, and the article says that it is not meant for conversation but for
# further fine-tuning (A20). The chat model was fine-tuned on conversations (Open-Platypus, UltraChat and Airoboros,
# A23). The same question to both, plainly:

# %%
import torch

base = models.load(settings.falcon, settings.precision)
ids = base.tokenizer(question, return_tensors="pt")["input_ids"].to(base.model.device)
torch.manual_seed(seed)
output = base.model.generate(
    ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=60
)
print(base.tokenizer.decode(output[0]))

# %% [markdown]
# `generation.generate` takes a text as it is, or messages, which it renders in the format of the model. It says why a reply
# ended: at an end token, at a stop string, or at the token limit.

# %%
sampling = Sampling(temperature=0.6, top_p=0.9, max_new_tokens=max_new_tokens, seed=seed)
base_reply = generation.generate(base, question, sampling)
print(f"{question}{base_reply.text}\n\n[ended by: {base_reply.finish_reason}]")

# %%
models.unload(base)
talker = models.load(settings.falcon_chat, settings.precision)
chat_reply = generation.generate(talker, [{"role": "user", "content": question}], sampling)
print(f"{chat_reply.text}\n\n[ended by: {chat_reply.finish_reason}]")

# %% [markdown]
# A base model carries on writing, often both sides of a talk; a chat model answers and ends its turn.

# %%
roles = {"base": (base_reply, settings.falcon), "chat": (chat_reply, settings.falcon_chat)}
for name, (reply, ref) in roles.items():
    as_said = (reply.finish_reason != "length") == (name == "chat")
    runs.record(
        f"{name}_ended_by", reply.finish_reason, claim="A20", model=ref.label, agrees=as_said
    )

# %% [markdown]
# ## 2 · The format, to the letter
#
# One line a turn: `System:`, `User:`, `Falcon:` (A21). The prompt ends with `Falcon:` and *no* space, because the space
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
# The helper renders the same text, and so does the tokenizer's own chat template:

# %%
falcon = models.format_for("falcon-chat")
assert falcon.render(messages) == plain
rendered = talker.format.render(messages)
if talker.tokenizer.chat_template:
    templated = talker.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    options = {"claim": "A21", "model": settings.falcon_chat.label}
    same = rendered == templated
    runs.record("render_equals_template", same, agrees=same, **options)
print(repr(rendered))

# %% [markdown]
# And this is what the model reads: tokens. Hover over one to see its id.

# %%
panels.tokens_html(talker.tokenizer, talker.tokenizer(talker.format.render(messages))["input_ids"])

# %% [markdown]
# ## 3 · The printed `format_prompt` is wrong
#
# The announcement prints a function that builds the prompt from a message, the history and a system prompt. Its last
# line stands *inside* the loop over the history. This is what it does; `prompts.published_format_prompt` does the same.


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
same = wrong(last, [tuple(turn)], system) == plain
runs.record("format_as_printed", same, claim="A21", agrees=same)

# %% [markdown]
# With an empty history the user's message is gone. (The question is the article's, which reports that Falcon-180B once counted
# a saddle among the animals, A29.)

# %%
print(wrong("Is a saddle an animal?", history=[], system_prompt="You are a friendly falcon."))

# %% [markdown]
# With two turns of history the message is asked twice, once in the middle of the past:

# %%
history = [("Hello!", "Hi there."), ("How are you?", "I am well.")]
print(wrong("Is a saddle an animal?", history=history, system_prompt=""))

# %%
roles = ("user", "assistant")
said = [{"role": r, "content": t} for turn in history for r, t in zip(roles, turn, strict=True)]
right = falcon.render([*said, {"role": "user", "content": "Is a saddle an animal?"}])
print(right)

# %%
lost = "saddle" not in wrong("Is a saddle an animal?", history=[], system_prompt="")
asked = wrong("Is a saddle an animal?", history=history, system_prompt="").count("saddle")
runs.record("published_loses_message", lost, claim="A22", agrees=not lost)
runs.record("published_asks_times", asked, "times", claim="A22", agrees=asked == 1)

# %% [markdown]
# Does it matter? Here is the chat model's reply to each, greedily. With the wrong prompt it has never seen the question.

# %%
greedy = Sampling(temperature=0, max_new_tokens=40)
for name, text in (
    ("wrong", wrong(question, history=[], system_prompt="You are a friendly falcon.")),
    ("right", falcon.render([messages[0], {"role": "user", "content": question}])),
):
    reply = generation.generate(talker, text, greedy)
    print(f"{name} prompt: {text!r}\n       reply: {reply.text!r}\n")

# %% [markdown]
# ## 4 · One conversation, four formats
#
# Every family was trained on its own text. A format that the model never saw raises no error; here is what the chat model of this
# profile replies to each.

# %%
for name in ("falcon-chat", "llama-2", "chatml", "plain"):
    text = models.format_for(name).render(messages)
    reply = generation.generate(talker, text, greedy)
    print(f"--- {name} " + "-" * (60 - len(name)))
    print(f"{text}\n>>> {reply.text!r}")

# %% [markdown]
# ## 5 · Where to stop
#
# Falcon-180B-Chat's history holds no end token between turns, so a model may go on and write the user's next line itself. Hence the *stop
# string*: generation ends as soon as `\nUser:` appears, and the string is cut from the reply. In a stream the first
# characters of a possible stop string have to be held back until it is clear whether it comes.

# %%
print("stop strings:", talker.format.stop_strings)
text = "I like to fly.\nUser: Why?\nFalcon: It is fun."
for stop in talker.format.stop_strings:
    text = text.split(stop)[0]
print("cut:", repr(text))

# %% [markdown]
# ## 6 · A conversation
#
# A chat is a list of messages that grows. Plainly, each turn renders the whole list again:

# %%
turns = []
for question_text in ("Hello!", "What is your favorite movie?"):
    turns.append({"role": "user", "content": question_text})
    reply = generation.generate(talker, turns, sampling)
    turns.append({"role": "assistant", "content": reply.text})
    print(f"User: {question_text}\nFalcon: {reply.text}")

# %% [markdown]
# `Chat` keeps the list, the system prompt and the seeds, and counts the tokens left. It saves to a JSON file.

# %%
way = generation.for_profile(settings, talker)  # as the profile says; see notebook 01, section 8
conversation = generation.Chat(
    talker, system="You are a friendly falcon.", sampling=sampling, decoding=way
)
for question_text in ("Hello!", "Do you like music?", "What kind of music?"):
    print("User:", question_text)
    print("Falcon:", conversation.ask(question_text).text)
print(f"\n{conversation.tokens_left()} tokens of the context are left")

# %%
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    conversation.save(Path(folder) / "chat.json")
    again = generation.Chat.load(Path(folder) / "chat.json", talker)
runs.record("chat_survives_saving", again.messages == conversation.messages)

# %% [markdown]
# ### When the context is full
#
# Cutting tokens off the front would leave half a turn and no system prompt. `fit` drops whole turns, oldest first, keeps the
# system message and the last question, and raises an error when even these are too long.

# %%
tokenizer, limit = talker.tokenizer, 60
long = [messages[0], *messages[1:3] * 6, messages[-1]]
kept = talker.format.fit(long, tokenizer, limit)
for chosen in (long, kept):
    tokens = len(tokenizer(talker.format.render(chosen))["input_ids"])
    print(f"{len(chosen)} messages, {tokens} tokens (at most {limit} wanted)")
print(talker.format.render(kept))

# %%
runs.record("fit_messages_kept", len(kept), "messages")
runs.record("fit_keeps_system", kept[0] == messages[0])

# %% [markdown]
# ## 7 · Talk to it
#
# Type, change the temperature, stop a reply half-way, look at the literal prompt. In an unattended run the panel plays the
# script below and shows the transcript instead.

# %%
script = ["Hello! How are you?", "What did you do today?", "Tell me a story about a little bird."]
panel_chat = generation.Chat(talker, sampling=sampling, decoding=way)
panels.chat_panel(panel_chat, script=script)

# %% [markdown]
# ## What you saw
#
# The chat format is plain text, and a prompt is right only if it equals, character by character, what the model was trained
# on. The printed function drops or repeats the question, without an error. Stop strings and whole-turn truncation keep a
# long conversation in form.

# %%
runs.recorded()

# %% [markdown]
# ## Exercises
#
# **1.** Repair `format_prompt`: from a message, a history of (user, falcon) pairs and a system prompt (which may be empty)
# to the text of section 2.


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
