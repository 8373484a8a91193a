"""`python -m experiments.bench_loss`: what a policy loss costs, in time, memory and share of what the device allows.

All programs of a case run in one process, in turn, and are compared by the median of the ratios of runs in the same
turn. Losses and gradients of other libraries are checked against ours before anything is timed. With `--platform tpu`
nothing runs: the programs are compiled for a TPU pod that need not exist, and the compiler's figures are shown. This
file must never be needed by a run.
"""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import rich.console
import rich.table
import tyro

import models
from experiments.bench import loss_programs as programs
from experiments.bench import loss_tables as report
from experiments.bench import measure
from experiments.bench import step_programs as step
from experiments.bench.loss_programs import DIRECTIONS, LOSS, METRICS, Program, Shape
from experiments.bench.step_programs import StepSettings
from experiments.compilers import tpu
from experiments.errors import UserError, complain
from rspo_jax import OBJECTIVES
from rspo_jax.records import write_json

AGREEMENT = 1e-5
"""How far a rival's loss may be from ours, in units of max(1, |loss|), its gradient in units of the largest entry."""
AGREEMENT_BFLOAT16 = 1e-2
"""Gradients that are rounded to bfloat16 agree to two digits."""
AGREEMENT_ROUTER = 1e-3
"""At the level "router" only the losses are compared: our trace keeps log-probabilities on a grid, which moves γ by up
to this much, and a ratio beside a clip bound then falls on either side."""


@dataclass(frozen=True)
class Benchmark:
    """Time the losses of this library, alone or against others."""

    shapes: tuple[str, ...] = ("64x1024x48x8x128",)
    """Cases as BxTxLxKxE: responses, tokens, MoE layers, experts a token, experts. "arrays" uses B and T only, "step"
    has sizes of its own."""
    level: tuple[Literal["arrays", "router", "step"], ...] = ("arrays",)
    """"arrays": the loss, γ given. "router": γ from router logits and the old policy's trace, then the loss. "step":
    scoring and update with a whole model, with and without the route."""
    objectives: tuple[str, ...] = ("rspo", "gmpo", "grpo")
    """Names in rspo_jax.OBJECTIVES; the first is what the others are compared with."""
    router_shift: tuple[Literal["with", "without"], ...] = ("with", "without")
    """With γ, and without; an objective that does not use γ reports it."""
    returns: tuple[Literal["loss", "loss + metrics"], ...] = ("loss", "loss + metrics")
    """The loss alone, or also the metrics."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Of log-probs, γ and router logits; every loss is computed in float32."""
    against: tuple[Literal["tunix", "torch"], ...] = ()
    """Other libraries, on the same arrays and cores."""
    floor: bool = False
    """Also the least that a jitted loss can be, Σ log π · advantage, as a bound for the others."""
    repeats: int | None = None
    """Turns; each program is timed once in each. 30, at the level "step" 20."""
    seed: int = 0
    platform: Literal["default", "tpu"] = "default"
    """"default": time on JAX's default device. "tpu": compile for --topology, run nothing."""
    topology: str = "v5p:2x2x1"
    """A TPU pod as the compiler names it; the rows are sharded over all of its devices."""
    output: Path | None = None
    """A folder for bench_loss.json and bench_loss.png."""
    json: Path | None = None
    """Where to write all figures as JSON; in --output when absent."""
    picture: Path | None = None
    """Where to draw the times as PNG; in --output when absent."""
    step_settings: Annotated[StepSettings, tyro.conf.arg(name="")] = StepSettings()

    def turns(self, level: str) -> int:
        return self.repeats or (20 if level == "step" else 30)


class Disagreement(Exception):
    """Two programs that should compute the same do not, so that their times say nothing."""


Case = tuple[str, Shape, str]  # level, shape, dtype


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for something that the user can mend."""
    benchmark = tyro.cli(Benchmark, args=arguments, prog="python -m experiments.bench_loss")
    console = rich.console.Console(width=None if sys.stdout.isatty() else 170)
    try:
        shapes = check(benchmark)
        levels = [level for level in benchmark.level if level != "step"]
        cases = list(itertools.product(levels, shapes, benchmark.dtypes))
        run = compile_only if benchmark.platform == "tpu" else run_case
        reports = [run(benchmark, case, console) for case in cases]
        if "step" in benchmark.level:
            reports += run_steps(benchmark, console)
        figures = describe(benchmark) | {"cases": reports}
    except (UserError, Disagreement) as error:
        return complain(error)
    write(benchmark, figures, console)
    return 0


def check(benchmark: Benchmark) -> list[Shape]:
    """Refuses what cannot run, before anything is compiled.

    Raises:
      UserError: naming the flag.
    """
    if unknown := [name for name in benchmark.objectives if name not in OBJECTIVES]:
        raise UserError(f"unknown objective {unknown[0]!r}; choose from {', '.join(OBJECTIVES)}")
    for field in fields(benchmark):
        if getattr(benchmark, field.name) == () and field.name != "against":
            raise UserError(f"--{field.name.replace('_', '-')} needs at least one value")
    layers = benchmark.step_settings.layers
    if list(layers) != sorted(set(layers)):
        raise UserError(f"--layers must rise, got {' '.join(map(str, layers))}")
    if benchmark.repeats is not None and benchmark.repeats < 2:
        raise UserError(f"--repeats must be at least 2 to show a spread, got {benchmark.repeats}")
    if benchmark.platform == "tpu" and benchmark.against:
        raise UserError("--platform tpu runs nothing and only compiles our programs: leave --against out")
    if benchmark.platform == "tpu" and benchmark.picture:
        raise UserError("--platform tpu runs nothing, so there are no times to draw: leave --picture out")
    if "step" in benchmark.level and benchmark.against:
        raise UserError("other libraries are compared loss by loss: leave --against out at the level step")
    for rival in benchmark.against:
        module, package = programs.PACKAGES[rival]
        if importlib.util.find_spec(module) is None:
            raise UserError(f"--against {rival} needs the optional package {package}: pip install {package}")
    for path in (benchmark.json, benchmark.picture):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent} to write {path.name} to")
    try:
        benchmark.step_settings.configs()
    except ValueError as error:
        raise UserError(f"the model of the level step: {error}") from error
    try:
        return [Shape.parse(text) for text in benchmark.shapes]
    except ValueError as error:
        raise UserError(f"--shapes: {error}") from error


def our_variants(benchmark: Benchmark) -> list[tuple[str, bool, str]]:
    """(objective, with γ, returns) of our programs. Where γ would change nothing that is returned, it is not given."""
    chosen = itertools.product(benchmark.objectives, benchmark.router_shift, benchmark.returns)
    return list(
        dict.fromkeys(
            (name, shift == "with" and (returns == METRICS or OBJECTIVES[name].uses_router_shift()), returns)
            for name, shift, returns in chosen
        )
    )


def run_case(benchmark: Benchmark, case: Case, console: rich.console.Console) -> dict[str, Any]:
    """Compiles, checks and times one case, and shows it."""
    level, shape, dtype = case
    arrays = jax.block_until_ready(programs.make_arrays(shape, level, dtype, benchmark.seed))
    old_router = None
    if level == "router" and "torch" in benchmark.against:
        old_router = programs.make_old_router(shape, dtype, benchmark.seed)
    rows = []
    for direction in DIRECTIONS:
        compiled = [
            programs.jax_program("rspo_jax", *variant, programs.our_loss(*variant), direction, arrays)
            for variant in our_variants(benchmark)
        ]
        if benchmark.floor:
            compiled.append(
                programs.jax_program("floor", "least loss", False, LOSS, programs.least_loss, direction, arrays)
            )
        for rival in benchmark.against:
            compiled += programs.RIVALS[rival](benchmark.objectives, direction, arrays, old_router)
        agreements = [check_agreement(program, counterpart(program, compiled), level, dtype) for program in compiled]
        seconds = measure.interleaved_seconds(
            {program.name: program.call for program in compiled}, benchmark.turns(level)
        )
        rows += [
            timed_row(program, direction, seconds, compiled) | {"agreement": agreement}
            for program, agreement in zip(compiled, agreements, strict=True)
        ]
    case_report = {"level": level, "shape": shape._asdict(), "dtype": dtype, "programs": rows}
    report.show_times(console, case_report)
    report.show_analyses(console, case_report)
    return case_report


def counterpart(program: Program, others: list[Program]) -> Program | None:
    """Our program that computes the same as a rival's, the loss alone where it is there."""
    if program.library == "rspo_jax":
        return None
    same = [p for p in others if (p.library, p.objective) == ("rspo_jax", program.objective)]
    return min(same, key=lambda p: (p.shift != program.shift, p.returns != LOSS), default=None)


def check_agreement(program: Program, ours: Program | None, level: str, dtype: str) -> dict[str, float] | None:
    """How far a rival's loss and gradient are from ours; None where there is nothing to compare.

    Raises:
      Disagreement: if they do not agree.
    """
    if ours is None:
        return None
    (loss, gradient), (our_loss, our_gradient) = program.result(), ours.result()
    differences = {"loss": float(abs(loss - our_loss) / max(1.0, abs(our_loss)))}
    if level == "arrays" and gradient is not None and our_gradient is not None:
        differences["gradient"] = float(np.max(np.abs(gradient - our_gradient)) / np.max(np.abs(our_gradient)))
    allowed = {
        "loss": AGREEMENT if level == "arrays" else AGREEMENT_ROUTER,
        "gradient": AGREEMENT if dtype == "float32" else AGREEMENT_BFLOAT16,
    }
    for name, difference in differences.items():
        if not difference <= allowed[name]:
            raise Disagreement(
                f"{program.name} is not what {ours.name} computes: the {name} differs by {difference:.2g}"
            )
    return differences


def timed_row(
    program: Program, direction: str, seconds: dict[str, list[float]], others: list[Program]
) -> dict[str, Any]:
    """One program's figures."""
    times, ours = seconds[program.name], counterpart(program, others)
    device = None if direction in (step.UPDATE, step.SCORE) else jax.devices()[0]  # loops hide FLOPs from a bound
    row = program_row(program, direction, device)
    row["seconds"], row["fastest_seconds"] = measure.spread(times)._asdict(), min(times)
    row["ratio_to_first"] = measure.paired_ratios(times, seconds[others[0].name])._asdict()
    row["fastest_ratio_to_ours"] = ours and min(times) / min(seconds[ours.name])
    row["ratio_to_ours"] = ours and measure.paired_ratios(times, seconds[ours.name])._asdict()
    row["share_of_bound"] = row["bound"] and row["bound"]["seconds"] / row["seconds"]["median"]
    return row


def program_row(program: Program, direction: str, device: Any) -> dict[str, Any]:
    """What is known of a program before it runs, on a `jax.Device`; without one there is no bound."""
    analysis, bound = program.analysis, None
    if analysis is not None and device is not None:
        peak = measure.peak_of(device.device_kind, device.platform, analysis.compulsory_bytes)
        if peak is not None:
            bound = measure.roofline(analysis.flops, analysis.compulsory_bytes, peak)._asdict() | {"peak": asdict(peak)}
    return {
        "library": program.library,
        "objective": program.objective,
        "router_shift": program.shift,
        "returns": program.returns,
        "direction": direction,
        "compile_seconds": program.compile_seconds,
        "analysis": analysis and measure.as_json(analysis),
        "bound": bound,
    }


def compile_only(benchmark: Benchmark, case: Case, console: rich.console.Console) -> dict[str, Any]:
    """Compiles one case for a TPU pod and shows what the compiler says."""
    level, shape, dtype = case
    mesh = pod_mesh(benchmark)
    check_divides("--shapes", shape.batch, mesh, benchmark.topology)
    arrays = programs.abstract_arrays(shape, level, dtype, mesh)
    rows = []
    for direction, variant in itertools.product(DIRECTIONS, our_variants(benchmark)):
        started = time.perf_counter()
        with compiling(variant[0], benchmark.topology):
            compiled = tpu.compile_for(programs.jax_function(programs.our_loss(*variant), direction), arrays)
        seconds, analysis = time.perf_counter() - started, measure.analyse(compiled)
        program = Program("rspo_jax", *variant, programs.no_call, seconds, analysis, programs.no_call)
        rows.append(program_row(program, direction, mesh.devices.flat[0]))
    case_report = {"level": level, "shape": shape._asdict(), "dtype": dtype, "programs": rows}
    report.show_analyses(console, case_report, f"{benchmark.topology}, {mesh.size} devices, figures of one")
    return case_report


def run_steps(benchmark: Benchmark, console: rich.console.Console) -> list[dict[str, Any]]:
    """The level "step": a case for each depth of the model."""
    on_tpu = benchmark.platform == "tpu"
    run, topology = (compile_step, benchmark.topology) if on_tpu else (run_step, "")
    cases = []
    for config in benchmark.step_settings.configs():
        case: dict[str, Any] = {"level": "step", "dtype": config.dtype} | run(benchmark, config)
        compare_with_first(case["programs"])
        report.show_step(console, case, topology)
        cases.append(case)
    if len(cases) > 1:
        report.show_depths(console, cases, topology)
    return cases


def compare_with_first(rows: list[dict[str, Any]]) -> None:
    """Adds to each program what the first of its direction takes more than it, by the compiler's analysis."""
    first: dict[str, Any] = {}
    for row in rows:
        row["is_control"] = row["returns"] == step.CONTROL
        analysis = row["analysis"]
        base = first.setdefault(row["direction"], analysis)
        row["first_minus_this"] = {key: None if value is None else base[key] - value for key, value in analysis.items()}


def run_step(benchmark: Benchmark, config: models.TransformerConfig) -> dict[str, Any]:
    """Compiles and times the programs of one training step."""
    inputs = jax.block_until_ready(step.make_inputs(config, benchmark.step_settings, benchmark.seed))
    shape, rows = step.shape_of(inputs), []
    for direction in (step.UPDATE, step.SCORE):
        compiled = step.timed_programs(direction, benchmark.objectives, inputs)
        for program in compiled:
            if not np.isfinite(program.result()[0]):
                raise Disagreement(f"{program.name}: the {direction} is not finite")
        calls = {program.name: program.call for program in compiled}
        seconds = measure.interleaved_seconds(calls, benchmark.turns("step"))
        rows += [timed_row(program, direction, seconds, compiled) for program in compiled]
    return {"shape": shape._asdict(), "programs": rows, "route": step.route_report(inputs, shape, 1)}


def compile_step(benchmark: Benchmark, config: models.TransformerConfig) -> dict[str, Any]:
    """Compiles the programs of one training step for a TPU pod."""
    mesh = pod_mesh(benchmark)
    inputs = step.abstract_inputs(config, benchmark.step_settings, mesh)
    shape, rows = step.shape_of(inputs), []
    check_divides("--rows", shape.batch, mesh, benchmark.topology)
    for direction in (step.UPDATE, step.SCORE):
        for name in step.objectives_for(direction, benchmark.objectives):
            with compiling(f"{direction} of {name}", benchmark.topology):
                program = step.compile_program(direction, name, inputs, mesh)
            rows.append(program_row(program, direction, None))
    return {"shape": shape._asdict(), "programs": rows, "route": step.route_report(inputs, shape, mesh.size)}


def pod_mesh(benchmark: Benchmark) -> jax.sharding.Mesh:
    """All devices of the topology, along the rows."""
    try:
        return tpu.topology_mesh(benchmark.topology, {"data": -1})
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error


def check_divides(flag: str, rows: int, mesh: jax.sharding.Mesh, topology: str) -> None:
    if rows % mesh.size:
        raise UserError(f"{flag}: {rows} rows cannot be split over the {mesh.size} devices of {topology}")


@contextlib.contextmanager
def compiling(name: str, topology: str) -> Iterator[None]:
    """Turns what the compiler refuses into one sentence."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{name} does not compile for {topology}: {str(error).splitlines()[0]}") from error


def describe(benchmark: Benchmark) -> dict[str, Any]:
    """The settings and the machine, as plain JSON."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(benchmark).items()}
    versions = {rival: importlib.metadata.version(programs.PACKAGES[rival][1]) for rival in benchmark.against}
    device: dict[str, Any] = {"platform": "tpu", "topology": benchmark.topology}
    if benchmark.platform == "default":
        device = measure.describe_device(jax.devices()[0]) | {"cpu_threads": programs.cpu_threads()}
    return {"settings": settings, "device": device, "versions": {"jax": jax.__version__} | versions}


def write(benchmark: Benchmark, figures: dict[str, Any], console: rich.console.Console) -> None:
    """Writes the JSON file and the picture where they are asked for."""
    folder = benchmark.output
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    json_path = benchmark.json or (folder and folder / "bench_loss.json")
    picture = benchmark.picture or (folder and folder / "bench_loss.png")
    if json_path:
        write_json(json_path, figures)
        console.print(f"figures: {json_path}", soft_wrap=True)
    if picture and benchmark.platform == "default":
        report.draw(figures, picture)
        console.print(f"picture: {picture}", soft_wrap=True)
