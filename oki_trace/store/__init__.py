"""The trace store: one SQLite file, or a PostgreSQL database.

``writer.TraceWriter`` and ``recorder.Recorder`` write records,
``reader.TraceReader`` reads them; ``migrate`` creates and upgrades the
schema. Callers exchange only records with this package, never rows or connections.
"""
