"""`tgi quantize`: a model in fewer bits, in a folder that the common servers load.

What is done, and how, is `tgi_cli.quantize`'s business; this file reads the options, shows the
progress and tells the result.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tgi_cli import hub, log
from tgi_cli.cli.console import invocation
from tgi_cli.hub_faults import gigabytes

if TYPE_CHECKING:
    from tgi_cli.quantize.convert.calibration import Samples
    from tgi_cli.quantize.convert.job import Job, Outcome
    from tgi_cli.quantize.convert.report import Report
    from tgi_cli.tokenizer import Tokenizer

_HELD_OUT_SAMPLES = 32
_HELD_OUT_LENGTH = 512  # tokens


def command(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="org/name or a local folder, not quantized yet.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    method: Annotated[str, typer.Option(help="gptq, awq, fp8 or int8.")],
    bits: Annotated[
        int | None, typer.Option(help="Bits of a weight: 4 (or 8 with gptq); else the method's.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale: 128 if not given, 64, 32 or, with gptq, -1 for all."
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="gptq or compressed-tensors, how --method gptq is stored."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Calibration text, .txt or .jsonl; ours if not given."),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text to measure the result on; ours if not given."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples at most.")] = 128,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens of a sample.")] = 2048,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was interrupted.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Load the result again with every installed loader.")
    ] = True,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; the main branch if not given.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="Access token of the hub; HF_TOKEN if not given.")
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(help="Where downloads are kept; the hub's own cache if not given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a model in 4 or 8 bits: GPTQ, AWQ, FP8 or INT8.

    Works layer by layer, on a CPU too; run it again with --resume after an interruption.
    """
    printer = invocation(ctx).printer
    log.configure("INFO" if printer.verbose else "WARNING")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from tgi_cli.quantize.convert.recipe import Recipe

    recipe = Recipe.choose(method, bits, group_size, layout)
    from tgi_cli.cli.quantize_view import shown, tell
    from tgi_cli.engine.machine import usable_cores
    from tgi_cli.kernels.backend import select
    from tgi_cli.model.checkpoint import open_checkpoint
    from tgi_cli.quantize.convert.job import Job
    from tgi_cli.quantize.convert.shards import write_text
    from tgi_cli.tokenizer import load_tokenizer

    path = hub.resolve(model, revision=revision, token=token, cache_dir=cache_dir)
    checkpoint = open_checkpoint(str(path))
    tokenizer = load_tokenizer(str(path))
    seen = None
    if recipe.calibrated:
        seen = _samples("calibration", calibration, tokenizer, samples, seqlen)
    elif calibration is not None:
        printer.say("--calibration has no meaning for fp8, which looks at no text")
    length = min(_HELD_OUT_LENGTH, seqlen, checkpoint.max_position_embeddings)
    measured = _samples("held_out", held_out, tokenizer, _HELD_OUT_SAMPLES, length)
    backend = select(device, num_threads=usable_cores())
    job = Job(checkpoint, recipe, seen, measured, backend, output)
    needed = job.requirements
    printer.say(f"{model}: {recipe.label}")
    if seen is not None and len(seen.tokens) < samples:
        printer.say(
            f"the calibration text gives {len(seen.tokens)} of {samples} samples; "
            "--calibration takes a longer one"
        )
    printer.say(
        f"takes about {gigabytes(needed.memory)} of memory and {gigabytes(needed.disk)} of disk"
    )
    try:
        with shown(printer) as listener:
            outcome = job.run(listener, resume=resume)
    except KeyboardInterrupt:
        printer.say("finished layers are kept: the same command with --resume goes on")
        raise
    if verify:
        printer.say("loading the result again")
    name = Path(model).name if Path(model).exists() else model
    report = _report(name, job, outcome, verify=verify)
    write_text(output / "README.md", report.model_card())
    job.clean()
    tell(printer, report)
    if as_json:
        printer.json(report.data())
    else:
        printer.data(str(output))


def _samples(name: str, path: str | None, tokenizer: Tokenizer, count: int, length: int) -> Samples:
    from tgi_cli.quantize.convert.calibration import read_text, samples_of, shipped_text

    text = shipped_text(name) if path is None else read_text(path)
    source = path or f"the {name.replace('_', '-')} text of the package"
    return samples_of(text, source, tokenizer, count=count, length=length)


def _report(model: str, job: Job, outcome: Outcome, *, verify: bool) -> Report:
    from tgi_cli.quantize.convert import reload
    from tgi_cli.quantize.convert.report import Report

    recipe = job.recipe
    verdicts = []
    if verify:
        verdicts = reload.verify(job.output, recipe.layout_name, outcome.probe, outcome.expected)
    return Report(
        base_model=model,
        recipe=recipe,
        calibration=None if job.calibration is None else _described(job.calibration),
        held_out=_described(job.held_out),
        outcome=outcome,
        verdicts=verdicts,
    )


def _described(samples: Samples) -> str:
    count, length = samples.shape
    return f"{samples.source} ({count} x {length} tokens)"
