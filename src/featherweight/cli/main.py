"""The command line: registers the verbs and turns every outcome into an exit code.

Exit codes: 0 done, 1 internal failure, 2 usage, 3 bad input data, 4 budget not met, 5 optional part missing,
130 interrupted. An error is one line on stderr; `--debug` adds the traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from featherweight.cli.compile_onnx import compile_onnx
from featherweight.cli.doctor import doctor
from featherweight.cli.evaluate import evaluate
from featherweight.cli.evaluate_sr import evaluate_sr
from featherweight.cli.fit import fit
from featherweight.cli.list_models import list_models
from featherweight.cli.new import new
from featherweight.cli.predict import predict
from featherweight.cli.reproduce import reproduce
from featherweight.cli.show import show
from featherweight.cli.systems import systems
from featherweight.cli.train_sr import train_sr
from featherweight.cli.upscale import upscale
from featherweight.errors import FeatherweightError

INTERRUPTED = 130

# typer carries its own copy of click from 0.25 on; BadParameter leads to the base class of either.
_ClickError: type[Exception] = typer.BadParameter.__mro__[2]  # type: ignore[assignment]

app = typer.Typer(
    name="featherweight",
    help="Lightweight vision networks, from paper to device.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _verb in {
    "fit": fit,
    "evaluate": evaluate,
    "predict": predict,
    "upscale": upscale,
    "evaluate-sr": evaluate_sr,
    "train-sr": train_sr,
    "compile": compile_onnx,
    "list": list_models,
    "show": show,
    "systems": systems,
    "doctor": doctor,
    "new": new,
    "reproduce": reproduce,
}.items():
    app.command(_name)(_verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        from featherweight import __version__

        typer.echo(f"featherweight {__version__}")
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done, 1 internal, 2 usage, 3 data, 4 budget, 5 part missing, 130 interrupted."
)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    """Lightweight vision networks, from paper to device."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the words after the program's name; None takes those of the process.

    >>> main(["--version"])  # doctest: +ELLIPSIS
    featherweight ...
    0
    """
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]  # accepted anywhere, also after the verb
    _set_up_logging(debug)
    try:
        _invoke(words)
        sys.stdout.flush()
        return 0
    except typer.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED, debug)
    except BrokenPipeError:
        # The reader (`| head`) has left: send the rest nowhere, or closing stdout complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _ClickError as error:
        return _fail(_usage(error), getattr(error, "exit_code", 2), debug)
    except FeatherweightError as error:
        return _fail(str(error), error.exit_code, debug)
    except Exception as error:
        hint = "" if debug else " Run again with --debug for the traceback."
        return _fail(f"internal failure: {type(error).__name__}: {error}.{hint}", 1, debug)


def _invoke(words: list[str]) -> None:
    """Parse and run without click's own error handling, which prints several lines."""
    command = typer.main.get_command(app)
    with command.make_context("featherweight", words) as context:
        command.invoke(context)


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "featherweight"
    message = error.format_message().strip().rstrip(".")  # type: ignore[attr-defined]
    return f"{message}. See: {path} --help"


def _fail(message: str, code: int, debug: bool) -> int:
    if debug and code != INTERRUPTED:
        traceback.print_exc()
    print(f"featherweight: {' '.join(message.split())}", file=sys.stderr)
    return code


def _set_up_logging(debug: bool) -> None:
    logger = logging.getLogger("featherweight")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
