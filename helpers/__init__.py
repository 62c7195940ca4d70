"""The tested module under the notebooks of the Falcon-180B workbook.

Each room has one job; import the room you need, e.g. ``from helpers import loading``.
Nothing heavy (torch, transformers, pandas, matplotlib, papermill) is imported before a function needs it.
"""

__version__ = "0.1.0"
