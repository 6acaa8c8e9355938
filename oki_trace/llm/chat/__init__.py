"""Messages to a prompt, and a reply's tokens to its parts."""
