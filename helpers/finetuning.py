"""Conversations -> LoRA or QLoRA with peft and trl -> adapter -> merged model."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import loading
from helpers.generation import context_tokens
from helpers.prompts import encode
from helpers.types import Loaded, Message, ModelRef, WorkbookError
from helpers.workarounds.nf4_repacking import may_repack
from helpers.workarounds.trl_training import float_adapters, trained_positions_alone

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerCallback
    from trl import SFTConfig, SFTTrainer

TARGETS = {
    "falcon": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
TRAINED_ROLES = ("reply", "end")
IDENTITY_FILE = "fine_tune.json"
Conversation = Sequence[Message]


class FinetuneError(WorkbookError):
    """A fine-tune that cannot be done, or an adapter that cannot be read."""


@dataclass(frozen=True)
class Recipe:
    """How to train. LoRA adds B·A·alpha/rank to each linear layer of the decoder (Hu et al., arXiv 2106.09685).

    ``steps`` optimizer steps of ``batch_size`` examples in each process: linear warm-up over ``warmup_steps``, then
    cosine decay. There is no packing: Falcon in transformers lets packed examples see each other, because it builds its
    mask without looking at position ids (``loading.load`` repairs that, but the model may come from elsewhere).
    """

    steps: int = 150
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    gradient_checkpointing: bool = False
    log_every: int = 5
    evaluate_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rank", "alpha", "log_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise FinetuneError(f"{name} must be at least 1, but is {getattr(self, name)}.")


@dataclass(frozen=True)
class Example:
    """One reply to train, after all that the model reads before it. ``roles`` names what each token is:

    system, user, assistant (an earlier reply), format (tags and line ends), reply and end (the end token).
    Only "reply" and "end" carry the loss.
    """

    input_ids: tuple[int, ...]
    roles: tuple[str, ...]

    @property
    def trained(self) -> tuple[bool, ...]:
        """True for each token that carries the loss."""
        return tuple(role in TRAINED_ROLES for role in self.roles)


@dataclass(frozen=True)
class Point:
    """The loss, in nats a token, at one step: of the batches since the last point, or of the held-out examples."""

    step: int
    loss: float | None = None
    held_out_loss: float | None = None


@dataclass(frozen=True)
class Finetuned:
    """A trained adapter: on the model in memory, and in a folder.

    ``examples`` were trained on; ``left_out`` replies were longer than the context. ``seconds`` are those of this call,
    without what an interrupted one took before. ``processes`` is how many really trained.
    """

    loaded: Loaded
    adapter_dir: Path
    history: tuple[Point, ...]
    trainable_parameters: int
    examples: int
    left_out: int
    seconds: float
    processes: int


def read_conversations(path: Path) -> list[list[Message]]:
    """The conversations of a JSON-lines file with a list ``messages`` a line. Raises FinetuneError, naming the line."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(json.loads(line)["messages"])
            _check_conversations(found[-1:])
        except (ValueError, KeyError, TypeError, FinetuneError) as error:
            raise FinetuneError(f"{path.name}, line {number} is no conversation with messages: {error}") from error
    return found


def examples(loaded: Loaded, conversations: Sequence[Conversation]) -> list[Example]:
    """One example for each reply, in the model's chat format, with the end token after that reply only.

    Prompt and reply are tokenized apart, as they are when the model is asked. An example longer than the context is
    left out. Raises FinetuneError where none is left or what is given are no conversations, MessageError for malformed
    messages.
    """
    _check_conversations(conversations)
    found = [
        _example(loaded, conversation[: place + 1])
        for conversation in conversations
        for place, message in enumerate(conversation)
        if message["role"] == "assistant"
    ]
    kept = [example for example in found if len(example.input_ids) <= context_tokens(loaded)]
    if not kept:
        raise FinetuneError(f"None of the {len(found)} replies fits the context of {context_tokens(loaded)} tokens.")
    return kept


def _check_conversations(conversations: Sequence[Conversation]) -> None:
    """Raises FinetuneError where something is no list of conversations that each hold a reply."""
    for talk in conversations if isinstance(conversations, Sequence) else [conversations]:
        if isinstance(talk, str | Mapping) or not all(isinstance(m, Mapping) and "role" in m for m in talk):
            raise FinetuneError(
                'Give a list of conversations, each a list of messages: [[{"role": "user", "content": "Hi"}, '
                '{"role": "assistant", "content": "Hello."}], ...].'
            )
    if not any(message["role"] == "assistant" for talk in conversations for message in talk):
        raise FinetuneError('There is no reply to train on: no message has the role "assistant".')


def token_counts(found: Sequence[Example]) -> DataFrame:
    """How many tokens there are, and how many carry the loss, by role."""
    import pandas as pd

    tokens = Counter(role for example in found for role in example.roles)
    trained = {role: tokens[role] if role in TRAINED_ROLES else 0 for role in tokens}
    return pd.DataFrame({"tokens": tokens, "trained": trained}).rename_axis("role").sort_values("trained")


def finetune(
    loaded: Loaded,
    dataset: Sequence[Conversation],
    recipe: Recipe,
    out_dir: Path,
    *,
    held_out: Sequence[Conversation] = (),
    on_point: Callable[[Sequence[Point]], None] = lambda history: None,
) -> Finetuned:
    """Train LoRA adapters on the replies of conversations; on an int8 or nf4 model this is QLoRA (arXiv 2305.14314).

    ``loaded.model`` itself gains the adapters; its own weights stay as they are. ``on_point`` is called with the whole
    history at each new point. Interrupted, the same call goes on from the last tenth of the way, kept in
    ``out_dir/checkpoints``. For several processes start the program with torchrun. As transformers' trainer does, it
    sets the global random seeds to ``recipe.seed``. Raises FinetuneError where the nf4 weights may be repacked under
    way (load with ``unpacked=True``), where the model has adapters already, or where ``out_dir`` holds a fine-tune with
    another recipe, base or data.
    """
    out_dir = Path(out_dir)
    _check_base(loaded.model)
    found = examples(loaded, dataset)
    kept = examples(loaded, held_out) if held_out else []
    identity = _identity(loaded, recipe, (found, kept))
    _check_folder(out_dir, identity)
    history: list[Point] = []
    with _quiet(), _adapters(loaded, recipe) as model:
        checkpoint = _last_checkpoint(out_dir)
        config = _config(recipe, out_dir, evaluates=bool(kept), starts=checkpoint is None)
        trainer = _trainer(model, loaded, config, (found, kept))
        trainer.add_callback(_watch(history, on_point))
        if trainer.is_world_process_zero():
            _write_json(out_dir / IDENTITY_FILE, identity)
        with trained_positions_alone(trainer.args.device):
            seconds = _train(trainer, checkpoint, out_dir)
    return Finetuned(
        loaded=replace(loaded, model=model),
        adapter_dir=out_dir,
        history=tuple(history),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        examples=len(found),
        left_out=sum(message["role"] == "assistant" for talk in dataset for message in talk) - len(found),
        seconds=seconds,
        processes=trainer.args.world_size,
    )


def reload(adapter_dir: Path) -> Loaded:
    """The base model in the precision it was trained in, with the adapter of a folder. Raises FinetuneError."""
    from peft import PeftModel

    loaded = _load_base(adapter_dir)
    with _quiet():
        return replace(loaded, model=PeftModel.from_pretrained(loaded.model, adapter_dir).eval())


def merge(adapter_dir: Path, out_dir: Path) -> ModelRef:
    """Add an adapter to its base model's weights and save the sum in bf16; returns the entry to load it with.

    A quantized base is dequantized first, so that the adapter meets the very weights it was trained on; merging inside
    4-bit weights would round the sum anew. Raises FinetuneError where the folder holds no adapter.
    """
    import torch
    from peft import PeftModel

    loaded = _load_base(adapter_dir)
    with _quiet():
        model = loaded.model.dequantize() if loaded.report.quantized_layers else loaded.model
        merged = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload().to(torch.bfloat16)
        merged.save_pretrained(out_dir)
    loaded.tokenizer.save_pretrained(out_dir)
    del model, merged
    loading.unload(loaded)
    return replace(loaded.ref, id=str(Path(out_dir).resolve()), source="embedded", revision=None, file=None)


def relative_error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, both of any equal shape."""
    return ((logits.float() - reference.float()).norm() / reference.float().norm()).item()


def _example(loaded: Loaded, messages: Conversation) -> Example:
    prompt = loaded.format.render(messages[:-1])
    whole = loaded.format.render(messages, add_generation_prompt=False)
    end = loaded.tokenizer.eos_token
    reply = whole[len(prompt) :].rstrip().removesuffix(end)
    before = _prompt_roles(loaded, prompt, messages[:-1])
    reply_ids = loaded.tokenizer(reply, add_special_tokens=False)["input_ids"]
    ids = (*encode(loaded.tokenizer, prompt), *reply_ids, loaded.tokenizer.eos_token_id)
    return Example(ids, (*before, *["reply"] * len(reply_ids), "end"))


def _prompt_roles(loaded: Loaded, prompt: str, messages: Conversation) -> list[str]:
    """The role of each token of the prompt: that of the message whose content it begins in, or "format"."""
    spans, position = [], 0
    for message in messages:
        start = prompt.find(message["content"], position)
        if start >= 0:
            position = start + len(message["content"])
            spans.append((start, position, message["role"]))
    offsets = loaded.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    extra = len(encode(loaded.tokenizer, prompt)) - len(offsets)
    roles = [next((r for low, high, r in spans if low < end and start < high), "format") for start, end in offsets]
    return ["format"] * extra + roles


@contextmanager
def _adapters(loaded: Loaded, recipe: Recipe) -> Iterator[PeftModel]:
    """The model with new adapters; they are taken off again where the block fails, so that it can be run again."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(TARGETS[loaded.ref.family]),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = get_peft_model(loaded.model, config)
    try:
        yield model
    except BaseException:
        model.unload()
        raise


def _trainer(model: PeftModel, loaded: Loaded, config: SFTConfig, data: Sequence[Sequence[Example]]) -> SFTTrainer:
    """trl's trainer over the examples to train on and, perhaps, those held out."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTTrainer

    train, held_out = (Dataset.from_list(_rows(found)) if found else None for found in data)
    trainer = SFTTrainer(model, config, train_dataset=train, eval_dataset=held_out, processing_class=loaded.tokenizer)
    trainer.remove_callback(PrinterCallback)
    float_adapters(model)
    return trainer


def _train(trainer: SFTTrainer, checkpoint: str | None, out_dir: Path) -> float:
    """Train, leave the model ready for inference and its adapter saved; the seconds that training took."""
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # bf16 leaves autocast behind
    model.eval()
    if trainer.is_world_process_zero():
        model.save_pretrained(out_dir)
    trainer.accelerator.wait_for_everyone()
    return seconds


def _config(recipe: Recipe, out_dir: Path, *, evaluates: bool, starts: bool) -> SFTConfig:
    import torch
    from trl import SFTConfig

    gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(out_dir / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type="cosine",
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.evaluate_every,
        eval_on_start=evaluates and starts,
        save_steps=max(1, recipe.steps // 10),
        save_total_limit=1,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        completion_only_loss=True,
        packing=False,
        max_length=None,
        bf16=gpu,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        disable_tqdm=True,
        report_to=[],
        seed=recipe.seed,
    )


def _rows(found: Sequence[Example]) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(e.input_ids), "completion_mask": [int(t) for t in e.trained]} for e in found]


def _watch(history: list[Point], on_point: Callable[[Sequence[Point]], None]) -> TrainerCallback:
    """A callback that keeps the losses, shows how far the training is, and passes the history on."""
    from transformers import TrainerCallback
    from transformers.utils.logging import tqdm

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            history.extend(_point(row) for row in state.log_history if _is_point(row))
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="fine-tune", unit="step", delay=2, leave=False
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.update(1)

        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any], **_: Any) -> None:
            if _is_point(state.log_history[-1]):
                history.append(_point(state.log_history[-1]))
                on_point(tuple(history))

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.bar.close()

    return Watch()


def _is_point(row: Mapping[str, Any]) -> bool:
    return "loss" in row or "eval_loss" in row


def _point(row: Mapping[str, Any]) -> Point:
    losses = [None if row.get(key) is None else float(row[key]) for key in ("loss", "eval_loss")]
    return Point(int(row["step"]), *losses)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' bars, log lines and deprecations; warnings of what may be wrong are shown."""
    import warnings

    import datasets
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _check_base(model: PreTrainedModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if may_repack(model):
        raise FinetuneError(
            "This CPU repacks nf4 weights at the first inference, after which training loses its gradients without an "
            "error. Load the model with loading.load(..., unpacked=True)."
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise FinetuneError("This model has adapters already: load it anew with loading.load(..., unpacked=True).")


def _identity(loaded: Loaded, recipe: Recipe, data: Sequence[Sequence[Example]]) -> dict[str, Any]:
    """What a fine-tune is made of: recipe, base model and data, ready for JSON."""
    quantization = getattr(loaded.model.config, "quantization_config", None)
    ids = [[example.input_ids for example in found] for found in data]
    return {
        "recipe": asdict(recipe),
        "base": asdict(loaded.ref),
        "precision": loaded.report.precision,
        "double_quant": bool(getattr(quantization, "bnb_4bit_use_double_quant", False)),
        "data_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
    }


def _check_folder(out_dir: Path, identity: Mapping[str, Any]) -> None:
    """Raises FinetuneError where a folder holds a fine-tune that is another in some part."""
    path = out_dir / IDENTITY_FILE
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else identity
    other = [part for part in identity if there.get(part) != identity[part]]
    if other:
        raise FinetuneError(
            f"{out_dir} holds a fine-tune with another {' and '.join(other)}: choose or empty another folder."
        )


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all: another process may be reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=2), encoding="utf-8")
    part.replace(path)


def _last_checkpoint(out_dir: Path) -> str | None:
    """The newest whole checkpoint: transformers writes its state file last."""
    states = (out_dir / "checkpoints").glob("checkpoint-*/trainer_state.json")
    folders = sorted((state.parent for state in states), key=lambda folder: int(folder.name.rpartition("-")[2]))
    return str(folders[-1]) if folders else None


def _load_base(adapter_dir: Path) -> Loaded:
    """The base model of an adapter, loaded as it was for training."""
    path = Path(adapter_dir) / IDENTITY_FILE
    if not path.is_file():
        raise FinetuneError(f"{adapter_dir} holds no adapter of this workbook: {IDENTITY_FILE} is missing.")
    data = json.loads(path.read_text(encoding="utf-8"))
    return loading.load(ModelRef(**data["base"]), data["precision"], unpacked=True, double_quant=data["double_quant"])
