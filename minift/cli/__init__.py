"""The command line: one file a command, and here the list of them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from minift.cli.chat import Chat
from minift.cli.claims import Claims
from minift.cli.classify import Classify
from minift.cli.common import forget_the_reader
from minift.cli.compare import Compare
from minift.cli.conformance import Conformance
from minift.cli.convert import Convert
from minift.cli.dpo import Dpo
from minift.cli.finetune import Finetune
from minift.cli.generate import Generate
from minift.cli.info import Info
from minift.cli.memory import Memory
from minift.cli.merge import Merge
from minift.cli.plain import speak_plainly
from minift.cli.ppo import Ppo
from minift.cli.pretrain import Pretrain
from minift.cli.quantize import Quantize
from minift.cli.rate import Rate
from minift.cli.reward import Reward
from minift.cli.rlhf import Rlhf
from minift.cli.step import Step
from minift.cli.study import Study
from minift.data.example import DataError
from minift.data.templates import TemplateError
from minift.io import FormatError

COMMANDS: dict[str, Callable[..., Any]] = {
    "finetune": Finetune,
    "pretrain": Pretrain,
    "classify": Classify,
    "generate": Generate,
    "chat": Chat,
    "rate": Rate,
    "reward": Reward,
    "ppo": Ppo,
    "dpo": Dpo,
    "rlhf": Rlhf,
    "merge": Merge,
    "quantize": Quantize,
    "convert": Convert,
    "step": Step,
    "study": Study,
    "compare": Compare,
    "claims": Claims,
    "info": Info,
    "memory": Memory,
    "conformance": Conformance,
}

DESCRIPTION = """Fine-tuning of language models from first principles, in NumPy.

`minift finetune` teaches the built-in model to answer questions, in about a minute; `minift step lora` goes through the
mathematics a line at a time; `minift COMMAND --help` explains
each command and its settings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. The exit status is 0, 1 if a property fails, 2 for bad input, 130 after Ctrl-C."""
    speak_plainly()
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="minift",
        description=DESCRIPTION,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    said = set()

    def say(message: Warning | str, *where: Any) -> None:
        """A warning as the user of a command wants it: what, once, and not in which line of our source."""
        if str(message) not in said:
            said.add(str(message))
            print(f"minift: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module="minift")
        warnings.showwarning = say  # type: ignore[assignment]
        return _run(command)


def _run(command: Any) -> int:
    try:
        return command.run()
    except (FormatError, DataError, TemplateError, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read our output has gone: `minift generate … | head`
            forget_the_reader()
            return 0
        print(f"minift: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminift: interrupted", file=sys.stderr)
        return 130
