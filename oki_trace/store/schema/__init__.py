"""The tables, the database engine, and revisions of the schema."""
