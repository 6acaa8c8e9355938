"""What the pages show, as pure functions of records."""
