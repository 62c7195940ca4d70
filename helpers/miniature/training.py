"""The tokenizer and the two checkpoints of falcon-mini, made with transformers' Trainer; it resumes by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.miniature.texts import END, chat_examples, pretraining_texts
from helpers.types import ROOT, ModelRef, WorkbookError

if TYPE_CHECKING:
    from transformers import FalconConfig, FalconForCausalLM, PreTrainedTokenizerFast, TrainingArguments

RECIPE = ROOT / "env" / "models" / "falcon-mini" / "recipe.yaml"
STAGES = ("tokenizer", "base", "chat")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='system' %}{{ 'System: ' + m['content'] + '\\n' }}"
    "{% elif m['role']=='user' %}{{ 'User: ' + m['content'] + '\\n' }}"
    "{% elif m['role']=='assistant' %}{{ 'Falcon: ' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Falcon:' }}{% endif %}"
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
IGNORED = -100  # the label of a token that carries no loss
Row = dict[str, list[int]]


def read_recipe(path: Path = RECIPE) -> dict[str, Any]:
    """The settings of a recipe file."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def train(
    data: Path,
    work: Path,
    recipe: Mapping[str, Any],
    stages: Sequence[str],
    out: Path,
) -> None:
    """Make falcon-mini and falcon-mini-chat in ``out`` from the text files in ``data``.

    Checkpoints go to ``work``; the same call resumes from the newest. A stage takes what the stages before it left in
    ``out``. Raises WorkbookError for an unknown stage, DataError for a missing file.
    """
    from transformers import PreTrainedTokenizerFast, set_seed

    if unknown := set(stages) - set(STAGES):
        raise WorkbookError(f"There is no stage {', '.join(sorted(unknown))}; the stages are {', '.join(STAGES)}.")
    base, chat = out / "falcon-mini", out / "falcon-mini-chat"
    texts, _ = pretraining_texts(data, recipe)
    set_seed(recipe["seed"])
    if "tokenizer" in stages:
        train_tokenizer(texts, recipe, base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    if "base" in stages:
        _train_base(texts, tokenizer, recipe, work / "base", base)
    if "chat" in stages:
        _train_chat(chat_examples(data, recipe), tokenizer, recipe, work / "chat", chat)
        for name in TOKENIZER_FILES:
            shutil.copy(base / name, chat / name)


def train_tokenizer(texts: Sequence[str], recipe: Mapping[str, Any], out: Path) -> None:
    """A byte-level BPE tokenizer with Falcon's end token, saved in the transformers layout."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    size = recipe["tokenizer"]["vocab_size"]
    bpe.train_from_iterator(texts, vocab_size=size, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=recipe["context_tokens"],
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)


def falcon_config(tokenizer: PreTrainedTokenizerFast, recipe: Mapping[str, Any]) -> FalconConfig:
    """Falcon-180B's flags at the recipe's sizes."""
    from transformers import FalconConfig

    return FalconConfig(
        vocab_size=len(tokenizer),
        new_decoder_architecture=True,
        multi_query=True,
        parallel_attn=True,
        num_ln_in_parallel_attn=2,
        alibi=False,
        bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=recipe["context_tokens"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **recipe["model"],
    )


def packed(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, recipe: Mapping[str, Any]) -> list[Row]:
    """Blocks of ``context_tokens`` tokens, texts joined by the end token; repeated, or cut off, to ``max_tokens``."""
    ids = [i for row in tokenizer([text + END for text in texts], verbose=False)["input_ids"] for i in row]
    length, most = recipe["context_tokens"], int(recipe["pretrain"]["max_tokens"])
    ids = (ids * (most // len(ids) + 1))[:most]
    blocks = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": block, "labels": block} for block in blocks]


def reply_rows(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, recipe: Mapping[str, Any]
) -> list[Row]:
    """The pairs that fit the context, with loss on the reply and its end token alone."""
    rows = []
    for prompt, reply in pairs:
        start, answer = (tokenizer(text, verbose=False)["input_ids"] for text in (prompt, reply))
        if len(start) + len(answer) <= recipe["context_tokens"]:
            rows.append({"input_ids": start + answer, "labels": [IGNORED] * len(start) + answer})
    return rows


def held_out_bits_per_byte(folder: Path, texts: Sequence[str]) -> float:
    """Bits per byte of a checkpoint, in fp32, on texts that no training step saw."""
    from helpers.evaluation import perplexity
    from helpers.loading import load

    ref = ModelRef(id=str(folder.resolve()), family="falcon", format="plain", source="embedded")
    return perplexity(load(ref, "fp32"), texts).bits_per_byte


def _train_base(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, recipe: Mapping[str, Any], work: Path, out: Path
) -> None:
    from transformers import FalconForCausalLM

    model = FalconForCausalLM(falcon_config(tokenizer, recipe))
    _fit(model, tokenizer, packed(texts, tokenizer, recipe), _arguments(recipe, "pretrain", work), out)


def _train_chat(
    pairs: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Mapping[str, Any],
    work: Path,
    out: Path,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out.parent / "falcon-mini", dtype=torch.float32)
    arguments = _arguments(recipe, "chat", work)
    arguments.train_sampling_strategy = "group_by_length"
    _fit(model, tokenizer, reply_rows(pairs, tokenizer, recipe), arguments, out)


def _arguments(recipe: Mapping[str, Any], stage: str, work: Path) -> TrainingArguments:
    """Warm-up and cosine decay, bf16 autocast, a checkpoint every ``save_steps``; on the GPU where there is one."""
    import torch
    from transformers import TrainingArguments

    settings, gpu = recipe[stage], torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(work),
        num_train_epochs=settings.get("epochs", 1),
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=float(settings["learning_rate"]),
        weight_decay=float(settings["weight_decay"]),
        adam_beta2=0.95,
        warmup_steps=settings["warmup_steps"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not gpu,
        logging_steps=10,
        save_steps=recipe["save_steps"],
        save_total_limit=1,
        report_to=[],
        seed=recipe["seed"],
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
    )


def _fit(
    model: FalconForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    arguments: TrainingArguments,
    out: Path,
) -> None:
    """Train or resume, then save bf16 weights and the log."""
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer
    from transformers.trainer_utils import get_last_checkpoint

    work = Path(arguments.output_dir)
    trainer = Trainer(model, arguments, train_dataset=list(rows), data_collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(work) if work.is_dir() else None)
    model.config.use_cache = True  # training turned it off
    model.to(torch.bfloat16).save_pretrained(out)
    log = [row for row in trainer.state.log_history if "loss" in row]
    (out / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
