"""The built-in questions: one module each, named in ``catalog``."""
