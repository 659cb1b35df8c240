"""``python -m hiermoe``."""

from hiermoe.cli import main

main()
