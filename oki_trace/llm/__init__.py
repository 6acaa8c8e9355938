"""Loads local language models, runs them, and captures how each token is chosen."""

import os

# Read when the hub's library is imported. Downloads then say nothing of this machine but what
# they ask for; a value that the user has set stands.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
