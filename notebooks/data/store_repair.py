"""Store the result of a longer fine-tune for notebook 05, in repair_stage.json: what a run recorded, and what made it.

    workbook run --only 05 -p steps=150 -p learning_rate=0.002
    python notebooks/data/store_repair.py runs/RUN

The notebook shows it as a row named "stored" beside its own run, which trains fewer steps.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOTEBOOK = "05_fine_tuning"


def stage(run: Path) -> dict:
    """What a run of notebook 05 recorded, with its model, parameters, command, commit, date and machine."""
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))["values"][NOTEBOOK]
    parameters = manifest["notebooks"][NOTEBOOK]["parameters"]
    # Only the model that was repaired is named beside the score.
    label = results["all_by_reply_true"]["model"]
    (model,) = {ref["id"] for ref in manifest["models"].values() if ref["label"] == label}
    hardware = manifest["hardware"]
    changes = " with uncommitted changes" if manifest["git"]["dirty"] else ""
    return {
        "model": model,
        "steps": parameters["steps"],
        "batch_size": parameters["batch_size"],
        "learning_rate": parameters["learning_rate"],
        "command": " ".join(manifest["command"]),
        "commit": f"{manifest['git']['commit'][:12]}{changes}",
        "date": manifest["started"][:10],
        "machine": f"{hardware['cpu_count']} CPUs ({hardware['cpu_name']})",
        "values": {name: recorded["value"] for name, recorded in results.items()},
    }


def main() -> None:
    """Write the file from the run folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("Give the folder of a run: python notebooks/data/store_repair.py runs/RUN")
    stored = json.dumps(stage(Path(sys.argv[1])), indent=2)
    (HERE / "repair_stage.json").write_text(f"{stored}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
