"""The options of `enable` as command-line flags, and as one environment variable that holds such flags."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import compactdist
from compactdist import codecs
from compactdist.group.environment import check_names
from compactdist.policy import rules_from_json
from compactdist.presets import PRESETS, expand
from compactdist.state import Target
from compactdist_common.codec import AUTO
from compactdist_xdit import routes

VARIABLE = "COMPACTDIST_XDIT"


def _order(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _checked(text: str, check: Callable[[str], object]) -> str:
    """The text, which is of use only once a model has been loaded: what is wrong with it is said before."""
    try:
        check(text)
    except (ValueError, compactdist.CompactDistError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _codec(text: str) -> str:
    return text if text == AUTO else _checked(text, codecs.get)


def _keyframe(text: str) -> str:
    return _checked(text, codecs.get)


def _target(text: str) -> str:
    return _checked(text, Target.parse)


def _routes(text: str) -> str:
    return _checked(text, routes.chosen)


def _preset(text: str) -> str:
    return _checked(text, lambda name: expand({"preset": name}))


def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--compact_*` flags and `--parallel_method`; stands beside `xFuserArgs.add_cli_args`."""
    group = parser.add_argument_group("compactdist", "residual compression of the messages between ranks")
    add = group.add_argument
    add("--compact_codec", type=_codec, help="codec: an id (int2, binary, ...), or with options: int4:scales=block")
    add(
        "--compact_preset",
        type=_preset,
        metavar="NAME",
        help=f"options by intent, instead of a codec or beside it: {', '.join(PRESETS)}",
    )
    add(
        "--compact_target",
        type=_target,
        metavar="TARGET",
        help="what to reach: nmse_db=-32, bits=1.5 or bytes_per_step=2e6",
    )
    add(
        "--compact_keyframe",
        type=_keyframe,
        metavar="CODEC",
        help="codec of the first step; raw: the tensors' own bytes",
    )
    orders = "prediction: 0 none, 1 last value, 2 velocity, auto: a velocity chosen for each frame"
    add("--compact_order", type=_order, choices=(0, 1, 2, "auto"), help=orders)
    add("--compact_warmup_steps", type=int, help="steps at the beginning of a request that are sent as keyframes")
    add(
        "--compact_routes",
        type=_routes,
        help=f"comma-separated, of {','.join(routes.ROUTES)} (usually {','.join(routes.USUAL)})",
    )
    add("--compact_policy", type=Path, metavar="FILE", help="JSON list of compactdist.Rule objects")
    add("--compact_explain", action="store_true", help="print a table of call sites at the end")
    add("--parallel_method", choices=("patch", "distrifusion"), help="in place of ring attention")
    add("--method_warmup_steps", type=int, help="synchronous steps before DistriFusion gets stale")
    return parser


def options_from(args: argparse.Namespace) -> dict[str, Any] | None:
    """Arguments for `enable`; `None` where the flags name no codec, preset or target, and no parallel method.

    Raises:
        ValueError: flags that have an effect only with a codec stand without one, or the policy file cannot be read.
    """
    _refuse_steps(args)
    options: dict[str, Any] = {
        "keyframe": args.compact_keyframe,
        "order": args.compact_order,
        "warmup_steps": args.compact_warmup_steps,
        "routes": args.compact_routes,
        "policy": None if args.compact_policy is None else read_policy(args.compact_policy),
    }
    options = {name: value for name, value in options.items() if value is not None}
    intent = {"preset": args.compact_preset, "target": args.compact_target}
    intent = {name: value for name, value in intent.items() if value is not None}
    if args.compact_codec is None and not intent:
        if options:
            flags = ", ".join(f"--compact_{name}" for name in options)
            raise ValueError(
                f"{flags}: no effect without --compact_codec, --compact_preset or --compact_target; add one, or leave "
                f"{flags} out"
            )
        if args.parallel_method is None:
            return None
    options |= intent
    options["codec"] = AUTO if args.compact_codec is None and intent else args.compact_codec
    if args.parallel_method is not None:
        options["parallel_method"] = args.parallel_method
        if args.method_warmup_steps is not None:
            options["method_warmup_steps"] = args.method_warmup_steps
    return options


def _refuse_steps(args: argparse.Namespace) -> None:
    """Refuse `--method_warmup_steps` where no method has such steps."""
    if args.method_warmup_steps is not None and args.parallel_method != "distrifusion":
        raise ValueError(
            f"--method_warmup_steps {args.method_warmup_steps}: no effect without --parallel_method distrifusion; add "
            f"it, or leave --method_warmup_steps out (--parallel_method is {args.parallel_method})"
        )


def read_policy(path: Path) -> list[compactdist.Rule]:
    """Rules from a file, as :func:`compactdist.policy.rules_from_json` reads them.

    Raises:
        ValueError: the file cannot be read, or is no list of rules; names the file and the fault.
    """
    try:
        return rules_from_json(path.read_text())
    except (OSError, compactdist.CompactDistError) as error:
        raise ValueError(f"--compact_policy {path}: {error}") from error


def arguments_from(environment: Mapping[str, str] = os.environ) -> argparse.Namespace | None:
    """The flags in `COMPACTDIST_XDIT="--compact_codec int2 ..."`; `None` where the variable is not set.

    Raises:
        ValueError: an unknown flag or value in the variable, or a variable of compactdist that does not exist.
    """
    check_names(environment)
    if VARIABLE not in environment:
        return None
    parser = add_cli_args(argparse.ArgumentParser(VARIABLE, allow_abbrev=False, add_help=False, exit_on_error=False))
    try:
        known, unknown = parser.parse_known_args(shlex.split(environment[VARIABLE]))
    except argparse.ArgumentError as error:
        raise ValueError(f"{VARIABLE}: {error}") from error
    if unknown:
        raise ValueError(f"{VARIABLE}: unknown: {' '.join(unknown)}")
    return known
