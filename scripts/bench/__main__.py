"""Benchmark attention, training, decoding and the loss:  python -m scripts.bench attention --help"""

from cli.options import Command, run_subcommand
from cli.program import exit_with_one_line
from scripts.bench import attention, decode, loss, train


def main() -> None:
    commands: dict[str, Command] = {
        "attention": (attention.attention, attention.Options),
        "decode": (decode.decode, decode.Options),
        "loss": (loss.loss, loss.Options),
        "train": (train.train, train.Options),
    }
    run_subcommand(commands, prog="python -m scripts.bench", description=__doc__)


if __name__ == "__main__":
    exit_with_one_line(main)
