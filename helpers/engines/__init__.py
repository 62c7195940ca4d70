"""Several engines for the same weights, compared by ``workbook bench``.

Each engine runs in a process of its own (``worker``), loads the same checkpoint and generates replies of exact lengths.
The parent (``measure``) runs the engines in turn, and only one of them is awake at a time. ``catalogue`` lists the
engines, ``cases`` the models and sizes to measure, ``session`` follows one comparison, and ``output`` writes its files.
A worker may run under another Python than the workbook's, so ``catalogue``, ``worker``, ``peak`` and the modules of the
other engines need the standard library alone until their engine is loaded.
"""
