"""Reading the store: plain records out, nothing in."""
