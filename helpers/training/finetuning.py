"""Fine-tune with LoRA or QLoRA (peft and trl): train an adapter, load it again, merge it into the weights.

LoRA adds two small matrices, an adapter, to each linear layer and trains only those. With a quantized base this is
QLoRA. ``finetune`` writes the adapter to a folder, with a file that names base, recipe and data. ``reload`` and
``merge`` read that file, so that an adapter always meets the base that it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from helpers.models import loading
from helpers.models.references import ModelRef
from helpers.models.workarounds.nf4_repacking import may_repack
from helpers.models.workarounds.trl_training import float_adapters, trained_positions_alone
from helpers.training.conversations import _reply_count, examples
from helpers.training.recipe import TARGETS, Finetuned, FinetuneError, Point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from helpers.models.loaded import Loaded
    from helpers.training.conversations import Conversation, Example
    from helpers.training.recipe import Recipe

IDENTITY_FILE = "fine_tune.json"


def finetune(
    loaded: Loaded,
    dataset: Sequence[Conversation],
    recipe: Recipe,
    out_dir: Path,
    *,
    held_out: Sequence[Conversation] = (),
    on_point: Callable[[Sequence[Point]], None] = lambda _history: None,
) -> Finetuned:
    """Train LoRA adapters on the replies of conversations; on an int8 or nf4 model this is QLoRA (arXiv 2305.14314).

    ``loaded.model`` itself gains the adapters; its own weights do not change. ``on_point`` is called with the whole
    history at each new point. After an interruption, the same call continues from the last checkpoint in
    ``out_dir/checkpoints`` and loses at most a tenth of the steps. For several processes, start the program with
    torchrun. Like transformers' trainer, it sets the global random seeds, to ``recipe.seed``. Raises FinetuneError if
    nf4 weights may be repacked during training (load with ``unpacked=True``), if the model already has adapters, or if
    ``out_dir`` holds a fine-tune with another recipe, base or data.
    """
    out_dir = Path(out_dir)
    _check_base(loaded.model)
    training = examples(loaded, dataset)
    measured = examples(loaded, held_out) if held_out else []
    identity = _Identity.of(loaded, recipe, (training, measured))
    identity.check_folder(out_dir)
    history: list[Point] = []
    with _quiet_libraries(), _adapters(loaded, recipe) as model:
        checkpoint = _last_checkpoint(out_dir)
        config = _config(recipe, out_dir, evaluates=bool(measured), starts=checkpoint is None)
        trainer = _trainer(model, loaded, config, training, measured)
        trainer.add_callback(_watch(history, on_point))
        # of several processes one writes
        if trainer.is_world_process_zero():
            identity.write(out_dir)
        with trained_positions_alone(trainer.args.device):
            seconds = _train(trainer, checkpoint, out_dir)
    return Finetuned(
        loaded=replace(loaded, model=cast("PreTrainedModel", model)),
        adapter_dir=out_dir,
        history=tuple(history),
        trainable_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        examples=len(training),
        left_out=_reply_count(dataset) - len(training),
        seconds=seconds,
        processes=trainer.args.world_size,
    )


def reload(adapter_dir: Path) -> Loaded:
    """The base model in the precision it was trained in, with the adapter of a folder.

    Raises FinetuneError if the folder holds no adapter.
    """
    from peft import PeftModel

    loaded = _load_base(adapter_dir)
    with _quiet_libraries():
        model = PeftModel.from_pretrained(loaded.model, adapter_dir)
    model.eval()
    # a PeftModel is no PreTrainedModel, but passes all calls on to the one inside it
    return replace(loaded, model=cast("PreTrainedModel", model))


def merge(adapter_dir: Path, out_dir: Path) -> ModelRef:
    """Add an adapter to its base model's weights and save the sum in bf16; return the entry to load it with.

    A quantized base is dequantized first, so that the adapter is added to the very weights it was trained on; merging
    into 4-bit weights would round the sum again. Raises FinetuneError if the folder holds no adapter.
    """
    import torch
    from peft import PeftModel

    loaded = _load_base(adapter_dir)
    with _quiet_libraries():
        model = loaded.model.dequantize() if loaded.report.quantized_layers else loaded.model
        merged = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload().to(torch.bfloat16)
        merged.save_pretrained(out_dir)
    loaded.tokenizer.save_pretrained(out_dir)
    # unload frees the memory only if nothing else holds the weights
    del model, merged
    loading.unload(loaded)
    return replace(loaded.ref, id=str(Path(out_dir).resolve()), source="embedded", revision=None, file=None)


@contextmanager
def _adapters(loaded: Loaded, recipe: Recipe) -> Iterator[PeftModel]:
    """Add new adapters to the model. They are removed if the block fails, so that it can be run again."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(TARGETS[loaded.ref.family]),
        task_type="CAUSAL_LM",
    )
    # the first weights of the adapters are random
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = get_peft_model(loaded.model, config)
    try:
        yield model
    except BaseException:
        model.unload()
        raise


def _trainer(
    model: PeftModel, loaded: Loaded, config: SFTConfig, training: Sequence[Example], measured: Sequence[Example]
) -> SFTTrainer:
    """trl's trainer over the examples to train on and those held out, of which there may be none."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTTrainer

    trainer = SFTTrainer(
        model,
        config,
        train_dataset=Dataset.from_list([example.row() for example in training]),
        eval_dataset=Dataset.from_list([example.row() for example in measured]) if measured else None,
        processing_class=loaded.tokenizer,
    )
    # it would print every loss; the curve and the bar show them
    trainer.remove_callback(PrinterCallback)
    float_adapters(model)
    return trainer


def _train(trainer: SFTTrainer, checkpoint: str | None, out_dir: Path) -> float:
    """Train, save the adapter and leave the model ready for inference; return the seconds of the training."""
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    # training in bf16 wraps the model's forward pass in autocast, which would change later inference
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.eval()
    if trainer.is_world_process_zero():
        model.save_pretrained(out_dir)
    trainer.accelerator.wait_for_everyone()
    return seconds


def _config(recipe: Recipe, out_dir: Path, *, evaluates: bool, starts: bool) -> SFTConfig:
    """trl's settings. ``evaluates``: examples are held out; ``starts``: there is no checkpoint to continue from."""
    import torch
    from trl import SFTConfig

    gpu = torch.cuda.is_available()
    return SFTConfig(
        max_steps=recipe.steps, learning_rate=recipe.learning_rate, seed=recipe.seed,
        warmup_steps=recipe.warmup_steps, lr_scheduler_type="cosine",
        per_device_train_batch_size=recipe.batch_size, per_device_eval_batch_size=recipe.batch_size,
        gradient_checkpointing=recipe.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        # the examples are tokenized and cut already: each is one row, as it is
        completion_only_loss=True, packing=False, max_length=None,
        eval_strategy="steps" if evaluates else "no", eval_steps=recipe.evaluate_every,
        eval_on_start=evaluates and starts,
        # a checkpoint after every tenth of the steps; older ones are deleted
        output_dir=str(out_dir / "checkpoints"), save_steps=max(1, recipe.steps // 10), save_total_limit=1,
        bf16=gpu, use_cpu=not gpu, dataloader_pin_memory=gpu,
        # nothing is sent anywhere, and a loss that is not a number is shown, not hidden
        logging_steps=recipe.log_every, logging_nan_inf_filter=False, report_to=[], disable_tqdm=True,
    )  # fmt: skip


def _watch(history: list[Point], on_point: Callable[[Sequence[Point]], None]) -> TrainerCallback:
    """A callback that keeps the losses, shows the progress of the training, and passes the history on."""
    from transformers import TrainerCallback
    from transformers.utils.logging import tqdm

    # transformers names the arguments of its callbacks, also those that are not needed here (ARG002)
    class Watch(TrainerCallback):
        def on_train_begin(
            self,
            args: TrainingArguments,  # noqa: ARG002
            state: TrainerState,
            control: TrainerControl,  # noqa: ARG002
            **_: object,
        ) -> None:
            # what an interrupted training logged before its checkpoint
            history.extend(_point(row) for row in state.log_history if _is_point(row))
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="fine-tune", unit="step", delay=2, leave=False
            )

        def on_step_end(self, *_: object, **__: object) -> None:
            self.bar.update(1)

        def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:  # noqa: ARG002
            if _is_point(state.log_history[-1]):
                history.append(_point(state.log_history[-1]))
                on_point(tuple(history))

        def on_train_end(self, *_: object, **__: object) -> None:
            self.bar.close()

    return Watch()


def _is_point(row: Mapping[str, float]) -> bool:
    # the log also holds learning rates and the time of the whole training
    return "loss" in row or "eval_loss" in row


def _point(row: Mapping[str, float]) -> Point:
    return Point(int(row["step"]), _loss(row, "loss"), _loss(row, "eval_loss"))


def _loss(row: Mapping[str, float], name: str) -> float | None:
    loss = row.get(name)
    return None if loss is None else float(loss)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide the libraries' bars, log lines and deprecations. Warnings of possible errors are still shown."""
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
            "This CPU repacks nf4 weights at the first inference. After that, training would lose its gradients "
            "without an error. Load the model with models.load(..., unpacked=True)."
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise FinetuneError("This model has adapters already. Load it again with models.load(..., unpacked=True).")


@dataclass(frozen=True)
class _Identity:
    """What a fine-tune is made of: recipe, base model and data. It is saved beside the adapter."""

    recipe: dict[str, Any]
    base: dict[str, Any]
    precision: str
    double_quant: bool
    data_sha256: str

    @classmethod
    def of(cls, loaded: Loaded, recipe: Recipe, data: Sequence[Sequence[Example]]) -> _Identity:
        """The identity of a fine-tune; ``data``: the examples to train on, and those held out."""
        quantization = getattr(loaded.model.config, "quantization_config", None)
        ids = []
        for part in data:
            ids.append([example.input_ids for example in part])
        return cls(
            recipe=asdict(recipe),
            base=asdict(loaded.ref),
            precision=loaded.report.precision,
            double_quant=bool(getattr(quantization, "bnb_4bit_use_double_quant", False)),
            data_sha256=hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        )

    def check_folder(self, out_dir: Path) -> None:
        """Raise FinetuneError if a folder holds a fine-tune that differs in some part."""
        path = out_dir / IDENTITY_FILE
        if not path.exists():
            return
        saved = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name, value in asdict(self).items() if saved.get(name) != value]
        if different:
            raise FinetuneError(
                f"{out_dir} holds a fine-tune with another {' and '.join(different)}. Choose or empty another folder."
            )

    def write(self, out_dir: Path) -> None:
        """Save the identity in a folder, whole or not at all: another process may be reading it."""
        path = out_dir / IDENTITY_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        part.replace(path)


def _last_checkpoint(out_dir: Path) -> str | None:
    """The newest complete checkpoint, or None."""
    # transformers writes its state file last: a folder without one was cut off
    states = (out_dir / "checkpoints").glob("checkpoint-*/trainer_state.json")
    folders = [state.parent for state in states]
    if not folders:
        return None
    # by number: in the order of text, 100 comes before 20
    return str(max(folders, key=lambda folder: int(folder.name.rpartition("-")[2])))


def _load_base(adapter_dir: Path) -> Loaded:
    """The base model of an adapter, loaded as it was for training."""
    path = Path(adapter_dir) / IDENTITY_FILE
    if not path.is_file():
        raise FinetuneError(
            f"{adapter_dir} holds no adapter of this workbook: {IDENTITY_FILE} is missing. Give another folder."
        )
    data = json.loads(path.read_text(encoding="utf-8"))
    options = loading.LoadOptions(double_quant=data["double_quant"])
    return loading.load(ModelRef(**data["base"]), data["precision"], unpacked=True, options=options)
