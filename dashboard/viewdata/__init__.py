"""The content of the pages, as pure functions of records."""
