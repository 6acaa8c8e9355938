"""``python -m oki_trace``: the command line."""

from oki_trace.cli import main

if __name__ == "__main__":
    main()
