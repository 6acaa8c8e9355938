"""Optional fast paths: the same numbers in less time.

Only ``capture/speedups.py`` imports this package. It works without the package if the
fast paths are switched off or the package is missing.
"""
