"""The ``hiermoe`` script, and ``python -m hiermoe``: takes signals before it imports what takes long."""

from hiermoe.records.interrupts import until_interrupted


def main() -> None:
    """Entry point. Exits with 0, or with 1 or 2 after one line that says what is wrong, or 128 + n after signal n."""
    until_interrupted(_command)


def _command() -> None:
    from hiermoe.commands.cli import main as command

    command()


if __name__ == "__main__":
    main()
