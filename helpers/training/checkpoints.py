"""Checkpoints that are whole or not used: sealed with their files' hashes, and without a number that is not finite.

transformers writes the files of a checkpoint one after the other. When all are there, ``hashes.json`` is written: a
folder without it, or with other files than it names, was cut off or damaged. Such folders are set aside, and the newest
whole one is used. Two are kept, so that there is one when the next is being written or turns out to be damaged.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.hashes import HASHES, changes, write_hashes
from helpers.training.recipe import TrainingStoppedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_PREFIX = "checkpoint-"
_KEPT = 2
_STATE = "trainer_state.json"
# Without one of these, transformers goes on from other numbers and says nothing.
_NEEDED = ("optimizer.pt", "scheduler.pt", _STATE)


def _damage(folder: Path, of: str = "") -> list[str]:
    """What differs from the hashes recorded in a folder; files beside them do not matter."""
    return [phrase for phrase in changes(folder, of) if not phrase.endswith("does not belong there")]


def _last_whole(folder: Path, of: str) -> Path | None:
    """The newest whole checkpoint of the training ``of`` in a folder, or None; those after it are set aside."""
    for checkpoint in reversed(_checkpoints(folder)):
        missing = [name for name in _NEEDED if not (checkpoint / name).is_file()]
        if not missing and not _damage(checkpoint, of):
            return checkpoint
        _set_aside(checkpoint)
    return None


def _is_finished(checkpoint: Path) -> bool:
    """Whether a training has taken its last step."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(checkpoint / _STATE))
    finished: bool = state.global_step >= state.max_steps
    return finished


def _careful(of: str) -> TrainerCallback:
    """A callback for transformers' trainer (with ``save_total_limit=None``) that seals its checkpoints.

    It stops the training, before anything is changed or saved, where a gradient, weight or loss is not finite.
    """
    from transformers import TrainerCallback

    # transformers names the arguments of its callbacks, also those that are not needed here (ARG002)
    class Careful(TrainerCallback):
        def on_pre_optimizer_step(
            self,
            args: TrainingArguments,  # noqa: ARG002
            state: TrainerState,
            control: TrainerControl,  # noqa: ARG002
            **given: nn.Module,
        ) -> None:
            _check_finite(given["model"], state.global_step + 1, gradients=True)

        def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:  # noqa: ARG002
            _check_losses(state)

        def on_save(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,  # noqa: ARG002
            **given: nn.Module,
        ) -> None:
            _check_finite(given["model"], state.global_step, gradients=False)
            # each process writes the state of its own random generators
            args.distributed_state.wait_for_everyone()
            if state.is_world_process_zero:
                _seal(Path(str(args.output_dir)), state.global_step, of)

    return Careful()


def _seal(folder: Path, step: int, of: str) -> None:
    """Write the hashes of the newest checkpoint, which is whole now, and remove the oldest ones."""
    write_hashes(folder / f"{_PREFIX}{step}", of)
    for old in _checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _explained(error: Exception, folder: Path) -> TrainingStoppedError | None:
    """The error of a checkpoint that could not be written, whose remains are removed; None for any other error."""
    unfinished = [checkpoint for checkpoint in _checkpoints(folder) if not (checkpoint / HASHES).exists()]
    # The data are in memory, so that an error of the disk is one of writing, wherever it comes from.
    if not unfinished and not isinstance(error, OSError):
        return None
    for checkpoint in unfinished:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return TrainingStoppedError(
        f"A checkpoint could not be written to {folder}: {error}. Earlier ones are kept. Free some disk space or "
        "repair the folder, and repeat the call: it continues from the last checkpoint."
    )


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder in the order of their steps, and whatever has the name of one."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name[len(_PREFIX) :].isdecimal()]
    # by number: in the order of text, 100 comes before 20
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[len(_PREFIX) :])


def _set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint, so that nobody takes it for one. It is kept for those who want to know what happened."""
    # transformers takes every name that holds "checkpoint-" and a number for a checkpoint
    aside = checkpoint.with_name(f"incomplete-{_step(checkpoint)}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)


def _check_finite(model: nn.Module, step: int, *, gradients: bool) -> None:
    """Raise TrainingStoppedError, naming step and parameter, if a gradient or weight that is trained is not finite."""
    import torch

    tensors = _trained(model, gradients=gradients)
    # one number for all of them, because to look at each would wait for the GPU each time
    if not tensors or bool(torch.nn.utils.get_total_norm(list(tensors.values())).isfinite()):
        return
    wrong = _not_finite(tensors)
    if wrong is None:
        return  # each is finite, only their sum of squares is not
    frozen = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    if culprit := _not_finite(frozen):
        raise TrainingStoppedError(
            f"Training stopped at step {step}: {culprit} of the base model holds a nan or an infinity. Nothing of this "
            "step was saved. Restore or download the base model again."
        )
    raise TrainingStoppedError(
        f"Training stopped at step {step}: the {'gradient' if gradients else 'value'} of {wrong} is not finite (nan or "
        "infinite). Nothing of this step was saved. Lower learning_rate, use more warmup_steps, or look for what is "
        "unusual in the data."
    )


def _trained(model: nn.Module, *, gradients: bool) -> dict[str, torch.Tensor]:
    """The weights that are trained, or their gradients, by name."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.grad if gradients else parameter.detach()
        if parameter.requires_grad and tensor is not None:
            tensors[name] = tensor
    return tensors


def _not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of the first tensor with a nan or an infinity; None if there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return name
    return None


def _check_losses(state: TrainerState) -> None:
    """Raise TrainingStoppedError if a loss that was just logged is not finite."""
    import math

    row = state.log_history[-1] if state.log_history else {}
    for name, what in (("loss", "loss"), ("eval_loss", "held-out loss")):
        value = row.get(name)
        if value is not None and not math.isfinite(float(value)):
            raise TrainingStoppedError(
                f"Training stopped at step {state.global_step}: the {what} is {value}. Nothing of this step was saved. "
                "Lower learning_rate, or look for what is unusual in the data or the base model."
            )
