"""Questions across steps, replies, conversations and models.

DuckDB queries Parquet files that are written once for every finished message (``cache``), and
Arrow tables of the messages still running. Built-in questions run in this process, the user's own
SQL in a separate one (``sandbox``). The files are a cache: the store is the source of truth, and
DuckDB never opens it.
"""
