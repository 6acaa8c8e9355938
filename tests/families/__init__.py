"""Every model type of transformers' causal-LM mapping, built tiny and compared with itself.

``configs.py`` builds them, ``truth.py`` asks the model itself, ``examine.py``
holds a trace against that, ``page.py`` writes docs/architectures.md.
"""
