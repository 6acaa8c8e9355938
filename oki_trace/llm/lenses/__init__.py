"""Published lenses: their files, the installed ones, and reading hidden states with them."""
