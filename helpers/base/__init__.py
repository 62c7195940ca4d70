"""What every group needs, without knowing models or machines: errors, units, files, processes, statistics."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "errors": ["WorkbookError", "choose", "first_names"],
        "settings": [
            "cache_folder",
            "expected_file",
            "kept_commits",
            "notebook_name",
            "rehearsal_folder",
            "run_folder",
            "unattended",
            "work_folder",
        ],
        "stats": [
            "Interval",
            "Measured",
            "discordant_pairs",
            "known",
            "mcnemar",
            "mean",
            "paired_difference",
            "proportion",
            "ratio",
            "ratio_error",
        ],
        "units": ["DTYPES", "GIB", "PRECISIONS"],
    },
)
