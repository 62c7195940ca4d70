"""Run a notebook's source on the laptop profile and count its loads and forward passes, model by model.

    python -m tests.notebooks.counted 04_falcon_vs_llama

prints them beside what the notebook's header declares (``workbook: work:``); ``test_work.py`` compares them for two.
Exercises are left out; trl's training passes do not go through the counted method.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from helpers.base.files import ROOT


def count(name: str) -> dict[str, dict[str, int]]:
    """Loads, decoding steps, other passes and their tokens by model ("falcon-mini bfloat16"), in a new process."""
    environment = os.environ | {"WORKBOOK_UNATTENDED": "1", "MPLBACKEND": "agg", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "tests.notebooks.counted", name, "--count"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def declared(name: str) -> dict[str, dict[str, int]]:
    """The same counts as the header declares them for the laptop, at most: a reply may end early."""
    import tempfile

    import nbformat

    from helpers.models import load_profile
    from helpers.runs import rendering
    from helpers.runs.work import declared_work

    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(
            rendering._source_notebook(ROOT / "notebooks/source" / f"{name}.py"), Path(folder, f"{name}.ipynb")
        )
        works = declared_work(load_profile("laptop"), Path(folder))[name]
    counts: dict[str, Counter] = {}
    kinds = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8", "nf4": "nf4"}
    for work in works:
        here = counts.setdefault(f"{work.ref.name} {kinds[work.precision]}", Counter())
        batches = math.ceil(work.count / min(work.together, max(1, work.count)))
        if work.kind == "load":
            here["loads"] += work.count
        if work.kind == "reply":
            here["steps"] += batches * (work.tokens - 1)
            here["passes"] += batches
            here["tokens"] += work.count * work.prompt
        if work.kind == "read":
            here["passes"] += batches
            here["tokens"] += work.count * work.tokens
    return counts


def run_counted(name: str) -> dict[str, Counter]:
    """Run the cells in this process, whose model classes are changed for good."""
    import jupytext
    from IPython.core.interactiveshell import InteractiveShell

    counts: dict[str, Counter] = {}
    _count_loads(counts)
    _count_passes(counts)
    os.chdir(ROOT / "notebooks")
    shell = InteractiveShell.instance()
    for cell in jupytext.read(f"source/{name}.py").cells:
        if cell.cell_type == "code" and "exercise" not in cell.metadata.get("tags", []):
            result = shell.run_cell(cell.source)
            result.raise_error()
    return counts


def _key(model) -> str:
    quantization = getattr(model.config, "quantization_config", None)
    kind = str(model.dtype).removeprefix("torch.")
    if quantization is not None:
        kind = "int8" if quantization.load_in_8bit else "nf4"
    # A packaged model is unpacked into a folder that ends with a hash.
    return f"{Path(model.config._name_or_path).name.removesuffix('-b179c9523d0e')} {kind}"


def _count_loads(counts) -> None:
    from transformers import PreTrainedModel

    original = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *arguments, **options):
        answer = original(cls, *arguments, **options)
        model = answer[0] if isinstance(answer, tuple) else answer
        counts.setdefault(_key(model), Counter())["loads"] += 1
        return answer

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def _count_passes(counts) -> None:
    from transformers import FalconForCausalLM, LlamaForCausalLM

    def counted(original):
        def forward(self, input_ids=None, *arguments, **options):
            if input_ids is not None and input_ids.device.type != "meta":
                here, (rows, tokens) = counts.setdefault(_key(self), Counter()), input_ids.shape
                past = options.get("past_key_values")
                if tokens == 1 and past is not None and past.get_seq_length():
                    here["steps"] += 1
                else:
                    here["passes"] += 1
                    here["tokens"] += rows * tokens
            return original(self, input_ids, *arguments, **options)

        return forward

    for family in (FalconForCausalLM, LlamaForCausalLM):
        family.forward = counted(family.forward)


if __name__ == "__main__":
    if "--count" in sys.argv:
        print("\n" + json.dumps(run_counted(sys.argv[1])))
    else:
        told = {"counted": count(sys.argv[1]), "declared": declared(sys.argv[1])}
        print(json.dumps(told, indent=1, sort_keys=True))
