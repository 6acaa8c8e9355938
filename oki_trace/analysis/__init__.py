"""Questions across steps, replies, conversations and models.

DuckDB in this process, over Parquet files written once for every finished
message (``cache``) and over what the reader hands over for those still running.
The files are a cache: the store is the truth, and DuckDB never opens it.
"""
