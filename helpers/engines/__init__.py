"""``workbook bench``: the same weights decoded by several engines, side by side.

Each engine runs in a process of its own (``worker``), loads the same checkpoint and answers runs of exact lengths; the
parent (``measure``) goes round the engines run by run, with only one of them awake at a time. ``catalogue`` lists the
engines, ``cases`` what is measured, ``output`` what is written. A peer's worker may run under another Python than the
workbook's, so ``catalogue``, ``worker``, ``peak`` and the peers' own modules need the standard library alone.
"""
