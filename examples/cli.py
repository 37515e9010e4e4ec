"""The same from YAML, with LightningCLI: `python examples/cli.py fit --config examples/cli_config.yaml`.

Needs `pip install "jsonargparse[signatures]"`.
"""

from __future__ import annotations

from pytorch_lightning.cli import ArgsType, LightningCLI
from quickstart import Digits, DigitsClassifier


def main(arguments: ArgsType = None) -> LightningCLI:
    """Runs the subcommand that the arguments name; None takes them from the command line."""
    return LightningCLI(DigitsClassifier, Digits, args=arguments, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
