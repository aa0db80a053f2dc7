"""The command line. Nothing heavy is imported before a command runs: `--help` answers at once."""

from __future__ import annotations

import argparse
import sys

from . import __version__


def counted(text: str) -> int:
    """A whole number from 1, as argparse reads it."""
    value = int(text)  # a ValueError is argparse's own to explain
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not accepted: it must be a whole number from 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lora-gan", description="Train a language model against any reward: two LoRA adapters on one frozen base."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="tune the base that ships to translate by reward alone (a few minutes on two cores)",
        description="Tune `tiny` to translate English to French by reward alone, and show what came of it.",
    )
    demo.add_argument(
        "--discriminator", dest="opponent", choices=("learning", "off", "constant", "only"), default="learning",
        help="learning: it learns online and corrects the half of the rewards that is asked for; off: plain RLOO on "
        "the true reward of every response; constant: a constant in its place; only: its prediction is the only reward "
        "(adversarial=True). Default: %(default)s",
    )  # fmt: skip
    demo.add_argument("--steps", type=counted, default=160, help="generator updates (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default: %(default)s)")
    demo.add_argument(
        "--heldout", type=counted, default=320, help="held-out prompts to judge on (default: %(default)s)"
    )
    demo.add_argument("--output-dir", help="checkpoint, metrics, plot (default: runs/demo-DISCRIMINATOR)")
    chosen = vars(parser.parse_args(arguments))
    chosen.pop("command")
    from . import demo as demo_module

    try:
        demo_module.run(**chosen)
    except (ValueError, RuntimeError, ArithmeticError, ImportError, OSError) as error:
        print(f"lora-gan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lora-gan: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
