"""`python -m openbook` is the command `openbook`."""

from openbook.cli import main

main()
