"""The command line: ``compactdist demo``, ``evaluate``, ``bench codecs``, ``plan`` and ``doctor``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from compactdist import __version__
from compactdist.cli import bench_codecs, subjects
from compactdist.cli import doctor as health
from compactdist.cli import evaluate as evaluation
from compactdist.cli import plan as planning
from compactdist.cli.baselines import play_baselines
from compactdist.cli.common import (
    Imports,
    JsonFile,
    Targets,
    check_writable,
    console,
    failing_well,
    import_codecs,
    parse_codecs,
    parse_order,
    warn_if_busy,
    write_json,
)
from compactdist.cli.demo import run_demo
from compactdist.errors import ConfigError
from compactdist.observe.trace import Trace
from compactdist.presets import PRESETS
from compactdist.state import DEFAULT_KEYFRAME, STEERED, StateForm, StreamConfig, keyframe_codec
from compactdist.state.quantized_history import STATE_FORMS

__all__ = ["main"]

app = typer.Typer(
    help="Residual-compressed communication behind torch.distributed.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

bench = typer.Typer(help="Measure on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")

_State = Annotated[str, typer.Option(help=f"What both ends keep of the last tensor: {', '.join(STATE_FORMS)}.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"compactdist {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Residual-compressed communication behind torch.distributed."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the runs' results.")] = Path("demo"),
    json_file: JsonFile = None,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 28,
    route: Annotated[
        list[str] | None, typer.Option(help="ring or ulysses; both if not given. May be repeated.")
    ] = None,
) -> None:
    """Draw ten digits with xDiT's FLUX pipeline on two CPU ranks, once per codec, and compare.

    A small trained FLUX transformer runs in the unmodified xfuser pipeline over gloo, with ring and with Ulysses
    attention. Needs the xdit extra; about a minute.
    """
    with failing_well():
        run_demo(out, json_file, steps, route or ["ring", "ulysses"])


_Layout = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN",
        help="How to read each step: a layout whose axes g, n and c are the trace's groups, rows and channels, and "
        'sizes of others: "(g n h d) -> 1 n (h g d), d=64".',
    ),
]


@app.command()
def evaluate(
    context: typer.Context,
    trace: Annotated[Path, typer.Argument(metavar="TRACE.safetensors", help="Written by compactdist.record.")],
    codec: Annotated[
        list[str] | None,
        typer.Option(
            help="A codec: id, or id:option=value,... May be repeated; all registered ones if neither it nor --preset "
            "is given."
        ),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(PRESETS)}, or all, with options of its own. May be repeated."),
    ] = None,
    order: Annotated[
        str, typer.Option(help="Prediction: 0 none, 1 last value, 2 velocity; auto: a velocity chosen for each frame.")
    ] = "1",
    damping: Annotated[
        float | None, typer.Option(min=0, max=1, help="Factor of the velocity, for --order 2 only; 0.5 if not given.")
    ] = None,
    warmup: Annotated[int, typer.Option(min=0, help="Steps of keyframes; the first step is one in any case.")] = 1,
    state: _State = "exact",
    keyframe: Annotated[
        str, typer.Option(metavar="CODEC", help="Codes keyframes; raw: they are the tensor's own bytes.")
    ] = DEFAULT_KEYFRAME,
    steps: Annotated[
        int | None,
        typer.Option(min=2, help="Play this many of the recorded steps, evenly spaced, first and last among them."),
    ] = None,
    layout: _Layout = None,
    target: Targets = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Add formats that send every step by itself: int4, fp4 and fp8.")
    ] = False,
    modules: Imports = None,
    json_file: JsonFile = None,
) -> None:
    """Play recorded activations through the residual loop and say what each codec sends and how wrong it is.

    A trace holds a tensor (steps, N, C) per call site. Frames are really made and decoded, and both ends compared.
    """
    with failing_well():
        check_writable(json_file)
        import_codecs(modules)
        config = _stream_config(order, damping, warmup, state, keyframe)
        codecs = parse_codecs(codec or ([STEERED] if target else None)) if codec or not preset or target else {}
        settings = evaluation.settings_of_codecs(codecs, config, target or ())
        settings |= evaluation.settings_of_presets(_presets(context, preset, codec or target))
        opened, read_as = Trace(trace), evaluation.parse_layout(layout)
        scores = evaluation.play_settings(opened, settings, steps, layout=read_as)
        if baselines:
            scores |= play_baselines(opened, max(1, warmup), steps)
        evaluation.show(opened, config if codecs else None, scores, console(json_file), steps, read_as)
        write_json(json_file, evaluation.to_json(scores))


def _stream_config(order: str, damping: float | None, warmup: int, state: str, keyframe: str) -> StreamConfig:
    """What the options of the command line say of streams, whose matrix views are given."""
    return StreamConfig(
        order=parse_order(order),
        damping=damping,
        warmup_steps=warmup,
        find_layout=False,
        state=cast("StateForm", state),  # checked there
        keyframe=keyframe_codec(keyframe),
    )


def _presets(context: typer.Context, presets: list[str] | None, others: list[str] | None) -> list[str]:
    """The presets to play.

    Raises:
        ConfigError: an option of codecs is given that would change no row, as there are presets only.
    """
    given = _given(context, ("order", "damping", "warmup", "state", "keyframe"))
    if presets and given and not others:
        raise ConfigError(
            f"{given} would change nothing: --preset {presets[0]} has options of its own. Leave it out, or name with "
            "--codec what it is for"
        )
    return presets or []


def _given(context: typer.Context, names: Sequence[str]) -> str:
    """Those of the options that stand on the command line, as they are written there; empty if none does."""
    given = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    return ", ".join(f"--{name}" for name in given)


@bench.command("codecs")
def _bench_codecs(
    shape: Annotated[str, typer.Option(metavar="NxC", help="Rows x channels of the tensor.")] = "1088x3072",
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, float16 or bfloat16; may be repeated. float32 and bfloat16.")
    ] = None,
    codec: Annotated[
        list[str] | None,
        typer.Option(help="A codec: id, or id:option=value,... May be repeated; all registered ones by default."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="How often everything is timed.")] = 15,
    modules: Imports = None,
    json_file: JsonFile = None,
) -> None:
    """Time the codecs against a plain copy of the same tensor, and say how good they are.

    Beside them in the same run: the same codecs in eager torch, torch's 8-bit quantization, numpy's packed signs and
    zstandard. Everything takes turns and is timed next to a copy; medians. Less than a minute.
    """
    with failing_well():
        check_writable(json_file)
        import_codecs(modules)
        load = os.getloadavg()[0]
        size = bench_codecs.parse_shape(shape)
        names = list(dict.fromkeys(dtype or ["float32", "bfloat16"]))
        wrong = [name for name in names if name not in bench_codecs.DTYPES]
        if wrong:
            raise ConfigError(f"--dtype {wrong[0]!r} is none of {', '.join(bench_codecs.DTYPES)}")
        chosen = parse_codecs(codec)
        rows: list[dict[str, Any]] = []
        for name in names:
            everything = [*subjects.of_codecs(chosen), *subjects.peers(chosen)]
            budget = 40 / len(names)
            rows += bench_codecs.measure(everything, size, bench_codecs.DTYPES[name], rounds, budget)
        bench_codecs.show(size, rows, console(json_file))
        warn_if_busy(load)
        write_json(json_file, bench_codecs.as_json(size, rows, load))


_Trace = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A trace of what one rank sends, in place of --shape, --dtype and --sites."),
]
_Steps = Annotated[
    int | None, typer.Option(min=2, help="Steps of a request; 28, or with --trace all that are recorded.")
]
_Op = Annotated[
    str,
    typer.Option(
        help="all_gather, all_to_all, send, broadcast, ...: to how many ranks a message goes. A message is the input "
        "of an all-gather, one chunk of an all-to-all."
    ),
]
_Link = Annotated[str | None, typer.Option(help=f"100mbit, 1gbit, 10gbit, ..., or {', '.join(planning.LINKS)}.")]
_Codecs = Annotated[
    list[str] | None,
    typer.Option(help="A codec beside the presets: id, or id:option=value,... May be repeated."),
]


@app.command()
def plan(
    context: typer.Context,
    trace: _Trace = None,
    shape: Annotated[str, typer.Option(metavar="NxC", help="Rows x channels of one message.")] = "4096x3072",
    dtype: Annotated[str, typer.Option(help=f"{', '.join(bench_codecs.DTYPES)}.")] = "bfloat16",
    sites: Annotated[int, typer.Option(min=1, help="Messages of a step: layers x calls of each.")] = 1,
    ranks: Annotated[int, typer.Option(min=2, help="Ranks of the group.")] = 2,
    steps: _Steps = None,
    op: _Op = "all_gather",
    link: _Link = None,
    gbps: Annotated[float | None, typer.Option(help="Speed of the link in Gbit/s, instead of --link.")] = None,
    compute_ms: Annotated[float, typer.Option(min=0, help="What a step takes without communication.")] = 0.0,
    codec: _Codecs = None,
    device: Annotated[str, typer.Option(help="Where encoding and decoding are measured: cpu or cuda.")] = "cpu",
    nmse_db: Annotated[
        float | None, typer.Option(help="Recommend nothing with a larger error, as -30; needs --trace.")
    ] = None,
    modules: Imports = None,
    json_file: JsonFile = None,
) -> None:
    """Say what to choose for a model's messages on a link: bytes, time and memory of each preset, and which pays.

    Times of codecs are measured here, bytes and the link are arithmetic; with a trace errors are measured on it.
    """
    with failing_well():
        check_writable(json_file)
        import_codecs(modules)
        named, speed = planning.link_of(link, gbps)
        place = planning.device_of(device)
        if nmse_db is not None and trace is None:
            raise ConfigError(f"--nmse-db {nmse_db:g} needs --trace FILE, on which errors are measured")
        opened = None if trace is None else Trace(trace)
        if opened is None:
            messages, total = planning.of_numbers(shape, dtype, sites, place), steps or 28
        else:
            _refuse_beside(context, ("shape", "dtype", "sites"), "--trace, which has its own")
            messages, total = planning.of_trace(opened, steps, place)
        case = planning.Case(messages, op, ranks, total, named, speed, 1e-3 * compute_ms, opened, steps)
        load = os.getloadavg()[0]
        rows = planning.plan(case, planning.candidates(list(PRESETS), codec or ()))
        advice = planning.recommend(rows, nmse_db)
        planning.show(case, rows, advice, console(json_file))
        warn_if_busy(load)
        write_json(json_file, planning.as_json(case, rows, advice, load))


def _refuse_beside(context: typer.Context, names: Sequence[str], other: str) -> None:
    """Refuse options that would change nothing beside another.

    Raises:
        ConfigError: one is given.
    """
    given = _given(context, names)
    if given:
        raise ConfigError(f"{given} would change nothing beside {other}: leave out one of them")


@app.command()
def doctor(
    codecs: Annotated[
        str,
        typer.Option(metavar="presets|all", help="Streams to try: the presets', or all codecs' too."),
    ] = "presets",
    ranks: Annotated[
        int, typer.Option(min=0, help="Start so many processes and compress an all-gather between them; 0: none.")
    ] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a call between ranks may take.")] = 30.0,
    json_file: JsonFile = None,
) -> None:
    """Look at everything that compression depends on, and try it: versions, machine, variables, kernels, streams.

    Run it first where something does not work or is slow, and attach its JSON to a bug report. Under torchrun its ranks
    check one another. The exit status is 1 if something is wrong; a warning is no error.
    """
    with failing_well():
        check_writable(json_file)
        seen = health.examine(codecs, ranks, timeout)
        if seen.speaks:
            health.show(seen, console(json_file))
            write_json(json_file, seen.to_dict())
        else:
            health.tell_unheard(seen)
    if seen.fails:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the ``compactdist`` command."""
    app()
