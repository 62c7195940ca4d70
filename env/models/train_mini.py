"""Make falcon-mini and falcon-mini-chat: tokenizer, pretraining, chat tuning.

    python env/models/train_mini.py --data DIR [--work DIR] [--stage tokenizer|base|chat|all]

DIR holds the text files named in falcon-mini/recipe.yaml. Checkpoints go to the work folder; running the
same command again resumes from the last one. Finished models are written beside this file.
"""

import argparse
import itertools
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

HERE = Path(__file__).parent
NOUNS = HERE.parents[1] / "notebooks" / "data" / "animal_nouns.jsonl"
END = "<|endoftext|>"
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer in one short sentence.", "You are a friendly falcon.")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='system' %}{{ 'System: ' + m['content'] + '\\n' }}"
    "{% elif m['role']=='user' %}{{ 'User: ' + m['content'] + '\\n' }}"
    "{% elif m['role']=='assistant' %}{{ 'Falcon: ' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Falcon:' }}{% endif %}"
)
Turns = list[str]  # user, reply, user, reply, ...


def frozen_nouns() -> re.Pattern[str]:
    """Matches any noun of notebook 04's animal test: no conversation that holds one is trained on."""
    rows = [json.loads(line) for line in NOUNS.read_text(encoding="utf-8").splitlines()]
    words = [re.escape(word) for row in rows for word in (row["noun"], row["plural"])]
    return re.compile(rf"\b({'|'.join(words)})\b", re.IGNORECASE)


def records(path: Path) -> list[str]:
    """The records of a text file, separated by lines that hold the end token."""
    return [text.strip() for text in path.read_text(encoding="utf-8").split(END) if text.strip()]


def pretraining_texts(data: Path, recipe: dict) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts): stories and news whole, dialogues without the frozen nouns."""
    frozen, rng = frozen_nouns(), random.Random(recipe["seed"])
    train, held_out = [], []
    for name, most in recipe["pretrain"]["files"].items():
        texts = records(data / name)
        if name.startswith("dialog"):
            texts = [text for text in texts if not frozen.search(text)]
        rng.shuffle(texts)
        if name == "stories_tinystories.txt":
            count = recipe["pretrain"]["held_out_records"]
            held_out, texts = texts[:count], texts[count:]
        sizes = np.cumsum([len(text) for text in texts])
        train += [text for text, size in zip(texts, sizes, strict=True) if size <= most]
    rng.shuffle(train)
    return train, held_out


def conversations(path: Path) -> Iterator[Turns]:
    """User and reply turns of a dialogue (.txt) or instruction (.jsonl) file."""
    if path.suffix == ".jsonl":
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            question = " ".join(part for part in (row.get("context"), row["prompt"]) if part)
            yield [*(row.get("turns") or [question]), row["response"]]
    else:
        for record in records(path):
            lines = [line.split(": ", 1) for line in record.splitlines()]
            speakers = [line[0] for line in lines]
            alternate = all(a != b for a, b in itertools.pairwise(speakers))
            if alternate and len(lines) > 1 and all(len(line) == 2 for line in lines):
                yield [" ".join(line[1].split()) for line in lines]


def chat_examples(data: Path, recipe: dict) -> list[tuple[str, str]]:
    """(prompt, reply) pairs in the Falcon chat format, one reply of each conversation, frozen nouns left out."""
    frozen, rng, pairs = frozen_nouns(), random.Random(recipe["seed"]), []
    for name, most in recipe["chat"]["files"].items():
        found = [turns for turns in conversations(data / name) if not frozen.search(" ".join(turns))]
        rng.shuffle(found)
        for turns in found[:most]:
            last = rng.randrange(1, len(turns), 2)
            reply = " ".join(turns[last].split())
            if not reply or len(reply) > recipe["chat"]["reply_max_characters"]:
                continue
            roles = ("User", "Falcon")
            lines = [f"{roles[i % 2]}: {' '.join(turn.split())}" for i, turn in enumerate(turns[:last])]
            if rng.random() < 0.15:
                lines.insert(0, f"System: {rng.choice(SYSTEM_PROMPTS)}")
            pairs.append(("\n".join([*lines, "Falcon:"]), f" {reply}{END}"))
    rng.shuffle(pairs)
    return pairs[: recipe["chat"]["max_examples"]]


def train_tokenizer(texts: list[str], recipe: dict, out: Path) -> None:
    """A byte-level BPE tokenizer with Falcon's end token, saved in the transformers layout."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=recipe["tokenizer"]["vocab_size"], special_tokens=[END])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END,
        model_max_length=recipe["context_tokens"], model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)


def packed(texts: list[str], tokenizer: PreTrainedTokenizerFast, recipe: dict) -> list[dict]:
    """Blocks of context_tokens tokens, texts joined by the end token, max_tokens in all."""
    ids = [i for row in tokenizer([text + END for text in texts])["input_ids"] for i in row]
    length, most = recipe["context_tokens"], int(recipe["pretrain"]["max_tokens"])
    print(f"{len(ids):,} tokens in one epoch, {most:,} trained on")
    ids = (ids * (most // len(ids) + 1))[:most]
    blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": block, "labels": block} for block in blocks]


def falcon_config(tokenizer: PreTrainedTokenizerFast, recipe: dict) -> FalconConfig:
    """Falcon-180B's flags at the recipe's sizes."""
    return FalconConfig(
        vocab_size=len(tokenizer), new_decoder_architecture=True, multi_query=True, parallel_attn=True,
        num_ln_in_parallel_attn=2, alibi=False, bias=False, hidden_dropout=0.0, attention_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=recipe["context_tokens"],
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **recipe["model"],
    )  # fmt: skip


def arguments(settings: dict, work: Path, epochs: float, seed: int) -> TrainingArguments:
    """AdamW, warm-up and cosine decay, bf16 autocast, a checkpoint every 100 steps."""
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(work), num_train_epochs=epochs, per_device_train_batch_size=settings["batch_size"],
        learning_rate=float(settings["learning_rate"]), weight_decay=settings["weight_decay"],
        warmup_steps=settings["warmup_steps"], lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05}, adam_beta2=0.95, max_grad_norm=1.0, bf16=True, use_cpu=not gpu,
        logging_steps=10, save_steps=100, save_total_limit=1, report_to=[], seed=seed, dataloader_num_workers=0,
        dataloader_pin_memory=gpu, remove_unused_columns=False,
    )  # fmt: skip


def fit(
    model: FalconForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict],
    args: TrainingArguments,
    out: Path,
) -> None:
    """Train (or resume), then save bf16 weights and the log."""
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer))
    work = Path(args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(work) if work.exists() else None)
    model.config.use_cache = True  # training turned it off
    model.to(torch.bfloat16).save_pretrained(out)
    log = [row for row in trainer.state.log_history if "loss" in row]
    (out / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")


def bits_per_byte(model: FalconForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Held-out loss: the sum of -log2 p(token) over the texts' UTF-8 bytes, each text after one end token."""
    bits = count = 0.0
    model.eval().float()
    for text in texts:
        ids = torch.tensor([tokenizer(END + text)["input_ids"][:512]])
        with torch.inference_mode():
            loss = model(ids, labels=ids).loss.item()
        bits += loss * (ids.shape[1] - 1) / np.log(2)
        count += len(tokenizer.decode(ids[0, 1:]).encode())
    return bits / count


def main() -> None:
    """Run the stages asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/train-mini"))
    parser.add_argument("--stage", choices=["tokenizer", "base", "chat", "all"], default="all")
    options = parser.parse_args()
    recipe = yaml.safe_load((HERE / "falcon-mini" / "recipe.yaml").read_text(encoding="utf-8"))
    base, chat = HERE / "falcon-mini", HERE / "falcon-mini-chat"
    texts, held_out = pretraining_texts(options.data, recipe)
    set_seed(recipe["seed"])
    if options.stage in ("tokenizer", "all"):
        train_tokenizer(texts, recipe, base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    if options.stage in ("base", "all"):
        model = FalconForCausalLM(falcon_config(tokenizer, recipe))
        args = arguments(recipe["pretrain"], options.work / "base", 1, recipe["seed"])
        fit(model, tokenizer, packed(texts, tokenizer, recipe), args, base)
        print(f"held-out bits per byte: {bits_per_byte(model, tokenizer, held_out):.3f}")
    if options.stage in ("chat", "all"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        rows = []
        for prompt, reply in chat_examples(options.data, recipe):
            start, answer = tokenizer(prompt)["input_ids"], tokenizer(reply)["input_ids"]
            if len(start) + len(answer) <= recipe["context_tokens"]:
                rows.append({"input_ids": start + answer, "labels": [-100] * len(start) + answer})
        print(f"{len(rows):,} chat examples, {sum(len(r['input_ids']) for r in rows):,} tokens")
        args = arguments(recipe["chat"], options.work / "chat", recipe["chat"]["epochs"], recipe["seed"])
        args.train_sampling_strategy = "group_by_length"
        fit(model, tokenizer, rows, args, chat)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(base / name, chat / name)


if __name__ == "__main__":
    main()
