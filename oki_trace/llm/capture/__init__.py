"""Reading hidden states, attention and the Logit Lens, and checking them."""
