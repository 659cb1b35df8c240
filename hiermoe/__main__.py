"""``python -m hiermoe``."""

from hiermoe.commands.cli import main

main()
