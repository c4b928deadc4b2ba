"""`python -m polyhead_trainer` is `trainer`."""

from polyhead_trainer.cli import main

# Ranks that the launcher starts import this module under another name.
if __name__ == "__main__":
    main()
