"""Run an unmodified xDiT script, or the xDiT runner, with compression on.

torchrun --nproc-per-node 2 -m compactdist_xdit flux_example.py --model ... --ring_degree 2 --compact_codec int2
torchrun --nproc-per-node 2 -m compactdist_xdit -m xfuser.runner --model ... --compact_codec int2
"""

from __future__ import annotations

import argparse
import sys

from compactdist_common.launch import run_as_main
from compactdist_xdit.auto import Automatic
from compactdist_xdit.flags import VARIABLE, add_cli_args, arguments_from, options_from

_USAGE = "python -m compactdist_xdit (SCRIPT | -m MODULE) [its own arguments] [--compact_codec CODEC ...]"


def main(arguments: list[str] | None = None) -> None:
    """Take the `--compact_*` flags from the command line, install compression, and run the script as `__main__`."""
    parser = add_cli_args(argparse.ArgumentParser("compactdist_xdit", usage=_USAGE, allow_abbrev=False, add_help=False))
    args, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    strangers = [word for word in rest if word.startswith("--compact")]
    if strangers:
        known = [flag for action in parser._actions for flag in action.option_strings]
        parser.error(f"unknown flag {strangers[0]}; there are {', '.join(known)}")
    if not rest or rest == ["-m"]:
        add_cli_args(argparse.ArgumentParser("compactdist_xdit", usage=_USAGE)).print_help()
        raise SystemExit(2)
    try:
        options = options_from(args)
        from_environment = arguments_from()
        if options is None and from_environment is not None:
            args, options = from_environment, options_from(from_environment)
    except ValueError as error:
        parser.error(str(error))
    if options is None:
        parser.error(
            "nothing to do: give --compact_codec, --compact_preset, --compact_target or --parallel_method, or set "
            f"{VARIABLE}"
        )
    automatic = Automatic(options, explain=args.compact_explain)
    automatic.install()
    try:
        run_as_main(rest)
    finally:
        nothing = not automatic.handles and not automatic.finished
        automatic.finish()
    if nothing:
        raise SystemExit("compactdist_xdit: the script built no xDiT pipeline, so nothing was compressed")


if __name__ == "__main__":
    main()
