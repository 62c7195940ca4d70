"""Make the tokenizer and the two checkpoints of falcon-mini with transformers' Trainer, which resumes by itself."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from helpers.base.errors import WorkbookError, choose
from helpers.base.files import ROOT, write_text
from helpers.base.hashes import write_hashes
from helpers.training.checkpoints import _STATE, _careful, _is_finished, _last_whole
from helpers.training.miniature.talk import _chat_examples, _chat_pairs, _held_out_talks
from helpers.training.miniature.texts import END, _held_out_stories, _pretraining_texts, _write_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch.optim import Optimizer
    from transformers import (
        FalconConfig,
        FalconForCausalLM,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
        TrainingArguments,
    )

    from helpers.training.miniature.recipe import _OptimizerSettings, _Phase, _Recipe, _TrainingSettings

RECIPE = ROOT / "env" / "models" / "falcon-mini" / "recipe.yaml"
STAGES = ("tokenizer", "base", "chat")
_CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role']=='system' %}{% if m['content'].strip() %}"
    "{{ 'System: ' + m['content'] + '\\n' }}{% endif %}"
    "{% elif m['role']=='user' %}{{ 'User: ' + m['content'] + '\\n' }}"
    "{% elif m['role']=='assistant' %}{{ 'Falcon: ' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Falcon:' }}{% endif %}"
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LOG = "training_log.jsonl"
HELD_OUT = "held_out.jsonl"  # beside the weights: the texts that they are measured on
IGNORED = -100  # the label of a token that carries no loss
Row = dict[str, list[int]]
_LogRow = dict[str, str | float]
_Made = TypeVar("_Made", bound="PreTrainedModel | PreTrainedTokenizerBase")


class _Scored(Protocol):
    """The output of a model with a head: logits (batch, tokens, vocabulary)."""

    logits: torch.Tensor


def read_recipe(path: Path = RECIPE) -> _Recipe:
    """The settings of a recipe file."""
    import yaml

    recipe: _Recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    return recipe


def train(data: Path, work: Path, recipe: _Recipe, stages: Sequence[str], out: Path) -> None:
    """Make falcon-mini and falcon-mini-chat in ``out`` from the text files in ``data``.

    Checkpoints go to ``work``; the same call resumes from the newest. A stage reads what the stages before it left in
    ``out``. Raises WorkbookError for an unknown stage, if a file or the input of a stage is missing, or if ``work``
    holds the checkpoints of another training.
    """
    from transformers import FalconForCausalLM, PreTrainedTokenizerFast, set_seed

    for stage in stages:
        choose(stage, STAGES, "stage")
    base, chat = out / "falcon-mini", out / "falcon-mini-chat"
    talks = _held_out_talks(data, recipe)
    messages = [message for message, _ in talks]
    set_seed(recipe["seed"])
    if {"tokenizer", "base"} & set(stages):
        texts = _pretraining_texts(data, recipe, without=messages)
    if "tokenizer" in stages:
        _train_tokenizer(texts, recipe, base)
    tokenizer = _made(base, "tokenizer.json", "tokenizer", PreTrainedTokenizerFast)
    if "base" in stages:
        stories = _held_out_stories(data, recipe)
        _train_base(texts, stories, tokenizer, recipe=recipe, work=work / "base", out=base)
        _write_texts(base / HELD_OUT, stories)
    if "chat" in stages:
        model = _made(base, "model.safetensors", "base", FalconForCausalLM)
        rows = _reply_rows(_chat_examples(data, recipe), tokenizer, recipe)
        measured = _reply_rows(_chat_pairs(talks), tokenizer, recipe)
        arguments = _arguments(recipe["chat"], recipe, work / "chat")
        log = _fit(model.float(), tokenizer, rows, arguments, recipe["chat"], measured=measured)
        _save(model, [{"phase": "chat", **row} for row in log], chat)
        _write_texts(chat / HELD_OUT, messages)
        for name in TOKENIZER_FILES:
            shutil.copy(base / name, chat / name)
        write_hashes(chat, chat.name)
    if {"tokenizer", "base"} & set(stages):
        write_hashes(base, base.name)


def _made(folder: Path, file: str, stage: str, kind: type[_Made]) -> _Made:
    """What an earlier stage left in ``folder``."""
    if not (folder / file).is_file():
        raise WorkbookError(
            f"{folder / file} is missing. Make the stage {stage} first, or all stages (without --stage)."
        )
    return cast("_Made", kind.from_pretrained(folder, local_files_only=True))


def _train_tokenizer(texts: Sequence[str], recipe: _Recipe, out: Path) -> None:
    """A byte-level BPE tokenizer with Falcon's end token, saved in the transformers layout."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    size = recipe["tokenizer"]["vocab_size"]
    bpe.train_from_iterator(texts, vocab_size=size, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(bpe.to_str()),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=recipe["context_tokens"],
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(out)


def _falcon_config(tokenizer: PreTrainedTokenizerFast, recipe: _Recipe) -> FalconConfig:
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


def _packed(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, length: int) -> list[Row]:
    """Full blocks of ``length`` tokens: the texts joined by the end token. What is left over is cut off."""
    ids: list[int] = []
    for row in tokenizer([text + END for text in texts], verbose=False)["input_ids"]:
        ids += row
    rows = []
    for start in range(0, len(ids) - length + 1, length):
        block = ids[start : start + length]
        rows.append({"input_ids": block, "labels": block})
    return rows


def _reply_rows(pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, recipe: _Recipe) -> list[Row]:
    """The pairs that fit the context, with loss on the reply and its end token alone."""
    rows = []
    for prompt, reply in pairs:
        # separately, so that no token joins the end of the prompt with the reply
        start = tokenizer(prompt, verbose=False)["input_ids"]
        answer = tokenizer(reply, verbose=False)["input_ids"]
        if len(start) + len(answer) <= recipe["context_tokens"]:
            rows.append({"input_ids": start + answer, "labels": [IGNORED] * len(start) + answer})
    return rows


def _muon(model: FalconForCausalLM, settings: _OptimizerSettings) -> Optimizer:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms (Jordan et al. 2024).

    Updates are scaled to AdamW's size (Liu et al. 2025, arXiv:2502.16982). The recipe names both learning rates.
    """
    from pytorch_optimizer import Muon

    embedding = _embedding(model)
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for weight in model.parameters():
        if weight.requires_grad:
            # an embedding is a matrix, but its rows are used one at a time, and Muon mixes all of them
            kind = matrices if weight.ndim == 2 and weight is not embedding else others
            kind.append(weight)
    inner = {"params": matrices, "lr": float(settings["learning_rate"]), "weight_decay": settings["weight_decay"]}
    outer = {"params": others, "lr": float(settings["embedding_learning_rate"]), "weight_decay": 0.0}
    return Muon([inner | {"use_muon": True}, outer | {"use_muon": False}], use_adjusted_lr=True)


def _embedding(model: FalconForCausalLM) -> torch.Tensor:
    return cast("torch.nn.Embedding", model.get_input_embeddings()).weight


def _unlikelihood_loss(weight: float, end: int) -> Callable[..., torch.Tensor]:
    """A loss for Trainer's ``compute_loss_func``: cross-entropy and, in training, a penalty on repeating three tokens.

    If the last two tokens of a text occurred in it before, the token that followed them there, unless it is the true
    next one, adds ``weight`` times -log(1 - p): unlikelihood training (Welleck et al. 2020, arXiv:1908.04319, equation
    4). ``end`` is the token that ends a text. Nats per token, over the tokens that carry loss.
    """
    from torch.nn.functional import nll_loss

    def loss(outputs: _Scored, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        logits = outputs.logits
        log_p, nexts = logits[:, :-1].float().log_softmax(-1), labels[:, 1:]
        # Trainer passes the number of tokens of all batches whose gradients are summed
        count = (nexts != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        total = nll_loss(log_p.flatten(0, 1), nexts.flatten(), ignore_index=IGNORED, reduction="sum")
        if weight and logits.requires_grad:  # the held-out loss is measured without the penalty
            total = total + weight * _repetition_penalty(log_p, nexts, _would_repeat(labels, end))
        return total / count

    return loss


def _repetition_penalty(log_p: torch.Tensor, nexts: torch.Tensor, repeats: torch.Tensor) -> torch.Tensor:
    """The sum of -log(1 - p) over the tokens that would repeat; log_p (batch, t, vocabulary), repeats (batch, t, j)."""
    candidates = nexts.clamp(min=0)[:, None].expand(-1, nexts.shape[1], -1)
    repeating = log_p.gather(2, candidates)[repeats].exp()
    # just below 1, or the logarithm of a certain repetition would be infinite
    return -(-repeating.clamp(max=1 - 1e-5)).log1p().sum()


def _would_repeat(labels: torch.Tensor, end: int) -> torch.Tensor:
    """Whether labels[j + 1] after labels[t] would wrongly repeat labels[j - 1 : j + 2]; (batch, t, j).

    Only within one text, only for tokens that carry loss, and not for the true next token.
    """
    from torch.nn.functional import pad

    ended, known = (labels == end).long(), labels != IGNORED
    text = ended.cumsum(1) - ended  # an end token belongs to the text before it
    same = (labels[:, :, None] == labels[:, None, :]) & (text[:, :, None] == text[:, None, :]) & known[:, :, None]
    wrong = (labels[:, :, None] != labels[:, None, :]) & known[:, :, None] & known[:, None, :]
    repeats = same[:, 1:-1, 1:-1] & same[:, :-2, :-2] & wrong[:, 2:, 2:]
    return pad(repeats.tril(-1), (1, 0, 1, 0))


def _train_base(
    texts: Sequence[str],
    held_out: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    recipe: _Recipe,
    work: Path,
    out: Path,
) -> None:
    from transformers import FalconForCausalLM

    model = FalconForCausalLM(_falcon_config(tokenizer, recipe))
    log: list[_LogRow] = []
    for phase in recipe["pretrain"]["phases"]:
        rows = _packed(texts, tokenizer, phase["context_tokens"])
        measured = _packed(held_out, tokenizer, phase["context_tokens"])
        settings = _phase_settings(phase, recipe["pretrain"]["weight_decay"])
        arguments = _arguments(settings, recipe, work / phase["name"])
        tokens_per_step = phase["batch_size"] * phase["context_tokens"]
        for row in _fit(model, tokenizer, rows, arguments, settings, measured=measured):
            log.append({"phase": phase["name"], "tokens": int(row["step"]) * tokens_per_step, **row})
    _save(model, log, out)


def _phase_settings(phase: _Phase, weight_decay: float) -> _TrainingSettings:
    # the recipe names the weight decay once, for all phases
    return cast("_TrainingSettings", {**phase, "weight_decay": weight_decay})


def _arguments(settings: _TrainingSettings, recipe: _Recipe, work: Path) -> TrainingArguments:
    """bf16 autocast, a checkpoint and a measurement every ``save_steps`` steps; on the GPU if there is one."""
    import torch
    from transformers import TrainingArguments

    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(work),
        max_steps=settings.get("max_steps", -1),
        num_train_epochs=settings.get("epochs", 1),
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=settings["batch_size"],
        warmup_steps=settings["warmup_steps"],
        lr_scheduler_type=settings["schedule"],
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not gpu,
        logging_steps=10,
        save_steps=recipe["save_steps"],
        save_total_limit=None,  # the callback deletes older ones when the new one is whole
        eval_strategy="steps",
        eval_steps=recipe["save_steps"],
        report_to=[],
        seed=recipe["seed"],
        dataloader_pin_memory=gpu,
        remove_unused_columns=False,
        train_sampling_strategy=settings.get("sampling", "random"),
    )


def _fit(
    model: FalconForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    arguments: TrainingArguments,
    settings: _TrainingSettings,
    *,
    measured: Sequence[Row],
) -> list[dict[str, float]]:
    """Train or resume in place; return steps and losses. The loss on ``measured`` is taken at every checkpoint."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerState
    from transformers.trainer_utils import IntervalStrategy

    work = Path(str(arguments.output_dir))
    of = _check_same_training(model, rows, work)
    if not measured:
        arguments.eval_strategy = IntervalStrategy.NO
    trainer = Trainer(
        model,
        arguments,
        train_dataset=list(rows),
        eval_dataset=list(measured) or None,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        optimizers=(_muon(model, settings), None),
        compute_loss_func=_unlikelihood_loss(settings.get("unlikelihood", 0), tokenizer.eos_token_id),
        callbacks=[_careful(of)],
    )
    last = _last_whole(work, of)
    if last and _is_finished(last):
        # Trainer would take one more step when it resumes after the last one
        model.load_state_dict(type(model).from_pretrained(last).state_dict())
        trainer.state = TrainerState.load_from_json(str(last / _STATE))
    else:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return _losses(trainer.state.log_history)


def _losses(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """Step and losses of the rows of Trainer's log that hold a loss."""
    losses = []
    for row in history:
        kept = {"step": row["step"]}
        for name, key in (("loss", "loss"), ("held_out_loss", "eval_loss")):
            if key in row:
                kept[name] = round(row[key], 4)
        if len(kept) > 1:
            losses.append(kept)
    return losses


def _check_same_training(model: FalconForCausalLM, rows: Sequence[Row], work: Path) -> str:
    """What the checkpoints of a training are of.

    Raises WorkbookError if ``work`` holds checkpoints of other texts, another tokenizer or other first weights.
    """
    digest = hashlib.sha256(json.dumps([row["input_ids"] for row in rows]).encode())
    digest.update(_embedding(model).detach().cpu().numpy().tobytes())
    mark = work / "trained_on.sha256"
    if any(work.glob("checkpoint-*")) and not (mark.is_file() and mark.read_text() == digest.hexdigest()):
        raise WorkbookError(
            f"The checkpoints in {work} are of another training: the texts, the tokenizer or the base model have "
            "changed. Delete that folder, or choose another with --work."
        )
    work.mkdir(parents=True, exist_ok=True)
    write_text(mark, digest.hexdigest())
    return f"training {digest.hexdigest()}"


def _save(model: FalconForCausalLM, log: Sequence[_LogRow], out: Path) -> None:
    """Save the weights in bf16, and the log beside them."""
    model.config.use_cache = True  # training turned it off
    model.bfloat16().save_pretrained(out)
    lines = [json.dumps(row) + "\n" for row in log]
    (out / LOG).write_text("".join(lines), encoding="utf-8")
