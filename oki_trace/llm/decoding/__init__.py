"""The decoding loop: forward passes, sampling, settings, threads."""
