"""How the workbook is executed, recorded, judged and shown."""

from helpers.base.lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "difference": ["DifferenceError", "compare_runs"],
        "difference_values": ["BEYOND", "NOISE", "ONLY_A", "ONLY_B", "SAME", "SLOW", "WITHIN"],
        "difference_views": ["tables", "write_page"],
        "execution": ["run"],
        "expected": ["expected_from_runs", "judge"],
        "document": ["UsageError"],
        "recording": ["Measured", "record", "record_all", "record_figure", "recorded"],
        "rendering": ["render"],
        "report": ["write_report"],
        "request": ["Request"],
        "secrecy": ["REDACTED"],
        "store": ["ResultError", "RunFolderError", "read_expected", "read_manifest", "write_expected"],
    },
)
