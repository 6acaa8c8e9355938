"""Questions across steps, replies, conversations and models.

DuckDB over Parquet files written once for every finished message (``cache``)
and over what the reader hands over for those still running: in this process for
questions of ours, in one of its own for SQL from outside (``sandbox``).
The files are a cache: the store is the truth, and DuckDB never opens it.
"""
