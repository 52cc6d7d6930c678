"""Which flags do experiments share that only compute?  Where the record and the picture go, and the start of the program."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from experiments.serving_flags import one_line_errors

__all__ = ["define", "launch"]


def define(values: flags.FlagValues) -> None:
    """Defines `--out`, `--seed` and `--smoke`; the last one changes only what would take long."""
    flags.DEFINE_string("out", "out", "Folder for the record and the figure.", flag_values=values)
    flags.DEFINE_integer("seed", 0, "Of what is drawn at random, if anything is.", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("smoke", False, "A check that takes seconds.", flag_values=values)


def launch(define_flags: Callable[[flags.FlagValues], None], run: Callable[[flags.FlagValues], object]) -> None:
    """The whole program: flags from the command line, then `run`."""
    define_flags(flags.FLAGS)
    for name in ("out", "seed", "smoke"):  # so that --help shows them
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def main(argv: Sequence[str]) -> None:
        if argv[1:]:
            sys.exit(f"error: unexpected argument {argv[1]!r}; flags are written --name=value")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        with one_line_errors():
            run(flags.FLAGS)

    app.run(main)
