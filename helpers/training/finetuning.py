"""Fine-tune with LoRA or QLoRA (peft and trl): train an adapter and save it.

LoRA adds two small matrices, an adapter, to each linear layer and trains only those. With a quantized base this is
QLoRA. ``finetune`` writes the adapter to a folder (``adapters``) and, on the way, checkpoints (``checkpoints``).
"""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from helpers.base.isolation import started_alone
from helpers.models.workarounds.frozen_head import contiguous_head
from helpers.models.workarounds.nf4_repacking import may_repack
from helpers.models.workarounds.short_attention import plain_attention
from helpers.models.workarounds.trl_training import float_adapters, trained_positions_alone
from helpers.training.adapters import _Identity, _quiet_libraries, _save_adapter
from helpers.training.checkpoints import _STATE, _careful, _explained, _is_finished, _last_whole
from helpers.training.conversations import _select
from helpers.training.recipe import TARGETS, FinetuneError, Point, _Finetuned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from trl import SFTConfig, SFTTrainer

    from helpers.models.loaded import Loaded
    from helpers.training.conversations import Conversation, Example
    from helpers.training.recipe import Recipe


@started_alone()
def finetune(
    loaded: Loaded,
    dataset: Sequence[Conversation],
    recipe: Recipe,
    out_dir: Path,
    *,
    held_out: Sequence[Conversation] = (),
    on_point: Callable[[Sequence[Point]], None] = lambda _history: None,
) -> _Finetuned:
    """Train LoRA adapters on the replies of conversations; on an int8 or nf4 model this is QLoRA (arXiv 2305.14314).

    ``loaded.model`` itself gains the adapters; its own weights do not change. ``on_point`` is called with the whole
    history at each new point. After an interruption, the same call continues from the last checkpoint in
    ``out_dir/checkpoints`` and loses at most a tenth of the steps. For several processes, start the program with
    torchrun. Like transformers' trainer, it sets the global random seeds, to ``recipe.seed``. Raises FinetuneError if
    nf4 weights may be repacked during training (load with ``unpacked=True``), if the model already has adapters, or if
    ``out_dir`` holds a fine-tune with another recipe, base or data; TrainingStoppedError if a loss, gradient or weight
    is not finite, or if a file cannot be written: what was saved before is kept.
    """
    out_dir = Path(out_dir)
    _check_base(loaded.model)
    selected = _select(loaded, dataset)
    measured = _select(loaded, held_out).examples if held_out else []
    identity = _Identity.of(loaded, recipe, (selected.examples, measured), _processes())
    identity.check_folder(out_dir)
    history: list[Point] = []
    with _quiet_libraries(), _adapters(loaded, recipe) as model:
        checkpoint = _last_whole(out_dir / "checkpoints", identity.label)
        config = _config(recipe, out_dir, evaluates=bool(measured), starts=checkpoint is None)
        trainer = _trainer(model, loaded, config, selected.examples, measured)
        trainer.add_callback(_careful(identity.label))
        trainer.add_callback(_watch(history, on_point))
        # of several processes one writes
        if trainer.is_world_process_zero():
            identity.write(out_dir)
        with _quick_steps(trainer.args.device, selected.examples):
            seconds = _train(trainer, checkpoint, out_dir, history)
        _save(trainer, identity, out_dir)
    return _Finetuned(
        loaded=replace(loaded, model=cast("PreTrainedModel", model)),
        adapter_dir=out_dir,
        history=tuple(history),
        trainable_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        examples=len(selected.examples),
        left_out=selected.too_long,
        blank_replies=selected.blank,
        seconds=seconds,
        processes=trainer.args.world_size,
    )


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
    contiguous_head(loaded.model)
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


@contextmanager
def _quick_steps(device: torch.device, training: Sequence[Example]) -> Iterator[None]:
    """Inside the block, a step on a CPU takes less time than with the libraries' defaults."""
    longest = max(len(example.input_ids) for example in training)
    with trained_positions_alone(device), plain_attention(device, longest):
        yield


def _train(trainer: SFTTrainer, checkpoint: Path | None, out_dir: Path, history: list[Point]) -> float:
    """Train and leave the model ready for inference; return the seconds of the training."""
    started = time.perf_counter()
    try:
        if checkpoint is not None and _is_finished(checkpoint):
            # the trainer would take one more step when it resumes after the last one
            history.extend(_restore(trainer, checkpoint))
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except FinetuneError:
        raise
    # The libraries raise all kinds of errors for a full disk, among them the plainest.
    except Exception as error:
        if explained := _explained(error, out_dir / "checkpoints"):
            raise explained from error
        raise
    seconds = time.perf_counter() - started
    # training in bf16 wraps the model's forward pass in autocast, which would change later inference
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    return seconds


def _save(trainer: SFTTrainer, identity: _Identity, out_dir: Path) -> None:
    """Save the adapter: of several processes one writes it, and the others wait."""
    if trainer.is_world_process_zero():
        _save_adapter(trainer.accelerator.unwrap_model(trainer.model), identity, out_dir)
    trainer.accelerator.wait_for_everyone()


def _restore(trainer: SFTTrainer, checkpoint: Path) -> list[Point]:
    """Give the adapter the weights of a finished training's checkpoint; return its losses."""
    from peft import load_peft_weights, set_peft_model_state_dict
    from transformers import TrainerState

    set_peft_model_state_dict(trainer.model, load_peft_weights(str(checkpoint), device=str(trainer.args.device)))
    state = TrainerState.load_from_json(str(checkpoint / _STATE))
    return [_point(row) for row in state.log_history if _is_point(row)]


def _processes() -> int:
    """The number of processes that train together; torchrun tells it to each."""
    return int(os.environ.get("WORLD_SIZE") or 1)


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
        # a checkpoint after every tenth of the steps; the callback deletes older ones when the new one is whole
        output_dir=str(out_dir / "checkpoints"), save_steps=max(1, recipe.steps // 10), save_total_limit=None,
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


def _check_base(model: PreTrainedModel) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if may_repack(model):
        raise FinetuneError(
            "This CPU repacks nf4 weights at the first inference. After that, training would lose its gradients "
            "without an error. Load the model with models.load(..., unpacked=True)."
        )
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise FinetuneError("This model has adapters already. Load it again with models.load(..., unpacked=True).")
