"""Options of a command's own, beside the settings of the schema."""

import argparse
from typing import NoReturn

from ccmim_fast.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """One line for a mistake, as everywhere in `ccmim`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}")
