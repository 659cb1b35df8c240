"""Command lines that are none of Hydra's: what is wrong in one line, as everywhere else."""

import argparse
import re
from typing import Any, NoReturn

from hiermoe.records.choices import or_else


class Parser(argparse.ArgumentParser):
    """A parser that raises where another prints its usage and exits; options may stand between its other arguments."""

    _mixing = False

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] - overloads differ by Python
        self, args: Any = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As another's, which takes all but options for missing once an option has come."""
        if self._mixing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._mixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False

    def error(self, message: str) -> NoReturn:
        """Say what may have been meant.

        Raises:
            ValueError: always.
        """
        if choice := re.fullmatch(r"(?:argument )?(.*?): invalid choice: (.*) \(choose from (.*)\)", message):
            argument, given, known = choice.group(1), choice.group(2).strip("'"), choice.group(3)
            names = [name.strip("' ") for name in known.split(",")]
            message = f"{argument.lower()}={given} is unknown; {or_else(given, names)}"
        elif extra := re.fullmatch("unrecognized arguments: (.*)", message):
            options = [option for option in self._option_string_actions if option.startswith("--")]
            first = extra.group(1).split()[0]
            message = f"{extra.group(1)}: no such option; {or_else(first.partition('=')[0], options)}"
        raise ValueError(f"{self.prog}: {message}")
