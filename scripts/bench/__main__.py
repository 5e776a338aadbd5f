"""What attention, training and decoding cost:  python -m scripts.bench attention --help"""

from collections.abc import Callable

import tyro

from cli.program import exit_with_one_line
from scripts.bench.attention import attention
from scripts.bench.decode import decode
from scripts.bench.loss import loss
from scripts.bench.train import train


def main() -> None:
    commands: dict[str, Callable[..., None]] = {"attention": attention, "decode": decode, "loss": loss, "train": train}
    tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m scripts.bench", description=__doc__, config=(tyro.conf.OmitArgPrefixes,)
    )


if __name__ == "__main__":
    exit_with_one_line(main)
