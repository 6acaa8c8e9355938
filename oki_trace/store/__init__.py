"""The trace store: one SQLite file, or a PostgreSQL database.

``writer.TraceWriter`` and ``recorder.Recorder`` put records in,
``reader.TraceReader`` gives them back; ``migrate`` makes and upgrades the
schema. Records are all that crosses the border: no row, no connection.
"""
