"""Optional fast paths: the same numbers in less time.

Nothing outside this package imports it but ``capture/speedups.py``, which does
without it when it is switched off or missing.
"""
