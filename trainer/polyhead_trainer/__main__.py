"""`python -m polyhead_trainer` is `trainer`."""

from polyhead_trainer.cli import main

main()
