"""The tested package under the notebooks of the Falcon-180B workbook.

Its groups stand in the order of the work, each with one question that it answers; import the group you need, for
example ``from helpers import models``. Nothing heavy (torch, transformers, pandas, matplotlib, papermill) is imported
before a function needs it.
"""

__version__ = "0.2.0"
