"""Patches of libraries, one file each: what is wrong, the versions that need it, and the way round it.

``tests/unit/models/workarounds`` has a test for each file that fails once the library no longer needs it: then the file
goes.
"""
