"""A local language model, and what it does when it picks a token."""

import os

# Read when the hub's library is imported. Downloads then say nothing of this machine but what
# they ask for; a value that the user has set stands.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
