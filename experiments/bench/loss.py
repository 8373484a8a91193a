"""Time, memory and share of the device's bound of a policy loss (`python -m experiments.bench_loss`).

All candidates of a case run in one process and are compared by the median of the ratios of runs in the same turn.
Losses and gradients of other libraries are checked against ours before anything is timed. With `--platform tpu` nothing
runs: the programs are compiled for a TPU pod that need not exist, and the compiler's figures are shown.
"""

import contextlib
import importlib.metadata
import importlib.util
import itertools
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import numpy as np
import rich.console
import rich.table
import tyro

import models
from experiments.bench import loss_programs, loss_tables, step_programs, timing
from experiments.bench.cores import cpu_threads
from experiments.bench.loss_programs import (
    LOSS,
    METRICS,
    ArraysLevel,
    Candidate,
    Returns,
    RivalName,
    Shape,
)
from experiments.bench.roofline import peak_of, roofline
from experiments.bench.step_programs import StepDirection, StepSettings
from experiments.compilers import tpu
from experiments.compilers.costs import read_costs
from experiments.errors import UserError, complain
from experiments.pod.programs import different_objectives
from models.config import Dtype
from rspo_jax import OBJECTIVES
from rspo_jax.records import write_json

AGREEMENT = 1e-5
"""Largest difference of a rival's loss from ours, in units of max(1, |loss|), and of its gradient, in units of the
largest entry."""
AGREEMENT_BFLOAT16 = 1e-2
"""Largest difference of gradients that are rounded to bfloat16: they agree to two digits."""
AGREEMENT_ROUTER = 1e-3
"""Largest difference of losses at the level "router": our trace keeps log-probabilities on a grid, which moves γ by up
to this much. Gradients are not compared there, as a ratio near a clip bound may then fall on either side of it."""


@dataclass(frozen=True)
class LossBenchmark:
    """Time the losses of this library, alone or against others."""

    shapes: tuple[str, ...] = ("64x1024x48x8x128",)
    """Cases as BxTxLxKxE: responses, tokens, MoE layers, experts a token, experts. "arrays" uses B and T only, "step"
    has sizes of its own."""
    level: tuple[ArraysLevel | Literal["step"], ...] = ("arrays",)
    """"arrays": the loss, γ given. "router": γ from router logits and the old policy's trace, then the loss. "step":
    scoring and update with a whole model, with and without the route."""
    objectives: tuple[str, ...] = ("rspo", "gmpo", "grpo")
    """Names in rspo_jax.OBJECTIVES; the others are compared with the first."""
    router_shift: tuple[Literal["with", "without"], ...] = ("with", "without")
    """Give γ to the objectives, or not; an objective that does not use γ reports it."""
    returns: tuple[Returns, ...] = get_args(Returns)
    """The loss alone, or also the metrics."""
    dtypes: tuple[Dtype, ...] = ("float32",)
    """Dtypes of log-probs, γ and router logits; every loss is computed in float32."""
    against: tuple[RivalName, ...] = ()
    """Other libraries, on the same arrays and cores."""
    floor: bool = False
    """Also time the least that a jitted loss can be, Σ log π · advantage, as a bound for the others."""
    repeats: int | None = None
    """Number of turns, in each of which every program is timed once. 30, at the level "step" 20."""
    seed: int = 0
    platform: Literal["default", "tpu"] = "default"
    """"default": time on JAX's default device. "tpu": compile for --topology, run nothing."""
    topology: str = "v5p:2x2x1"
    """A TPU pod as the compiler names it; the rows are sharded over all of its devices."""
    output: Path | None = None
    """A folder for bench_loss.json and bench_loss.png."""
    json: Path | None = None
    """File for all figures as JSON; in --output when absent."""
    picture: Path | None = None
    """File for a drawing of the times as PNG; in --output when absent."""
    step_settings: Annotated[StepSettings, tyro.conf.arg(name="")] = StepSettings()

    def turns(self, level: str) -> int:
        return self.repeats or (20 if level == "step" else 30)


class Disagreement(Exception):
    """Two programs that should compute the same do not, so that their times are not comparable."""


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, and return the exit code: 0, or 2 for a mistake in the flags or a rival that disagrees."""
    benchmark = tyro.cli(LossBenchmark, args=arguments, prog="python -m experiments.bench_loss")
    console = rich.console.Console(width=None if sys.stdout.isatty() else 170)
    try:
        shapes = check_flags(benchmark)
        levels: list[ArraysLevel] = [level for level in benchmark.level if level != "step"]
        cases = itertools.product(levels, shapes, benchmark.dtypes)
        run = compile_case if benchmark.platform == "tpu" else run_case
        reports = [run(benchmark, *case, console) for case in cases]
        if "step" in benchmark.level:
            reports += run_steps(benchmark, console)
        figures = describe_run(benchmark) | {"cases": reports}
    except (UserError, Disagreement) as error:
        return complain(error)
    write_files(benchmark, figures, console)
    return 0


def check_flags(benchmark: LossBenchmark) -> list[Shape]:
    """Refuse flags that cannot work, before anything is compiled, and return the shapes.

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
        module, package = loss_programs.PACKAGES[rival]
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


def our_variants(benchmark: LossBenchmark) -> list[tuple[str, bool, Returns]]:
    """Return (objective, with γ, returns) of our candidates. γ is given only if it changes what they return."""
    chosen = itertools.product(benchmark.objectives, benchmark.router_shift, benchmark.returns)
    return list(
        dict.fromkeys(
            (name, shift == "with" and (returns == METRICS or OBJECTIVES[name].uses_router_shift()), returns)
            for name, shift, returns in chosen
        )
    )


def run_case(
    benchmark: LossBenchmark, level: ArraysLevel, shape: Shape, dtype: Dtype, console: rich.console.Console
) -> dict[str, Any]:
    """Compile, check and time one case, and show it."""
    arrays = jax.block_until_ready(loss_programs.make_arrays(shape, level, dtype, benchmark.seed))
    old_router = None
    if level == "router" and "torch" in benchmark.against:
        old_router = loss_programs.make_old_router(shape, dtype, benchmark.seed)
    rows = []
    for direction in timing.DIRECTIONS:
        losses = [("rspo_jax", *variant, loss_programs.our_loss(*variant)) for variant in our_variants(benchmark)]
        if benchmark.floor:
            losses.append(("floor", "least loss", False, LOSS, loss_programs.least_loss))
        candidates = [loss_programs.jax_candidate(*loss, direction, arrays) for loss in losses]
        for rival in benchmark.against:
            candidates += loss_programs.RIVAL_LOSSES[rival](benchmark.objectives, direction, arrays, old_router)
        agreements = [check_agreement(one, counterpart(one, candidates), level, dtype) for one in candidates]
        seconds = timing.interleaved_seconds({one.name: one.call for one in candidates}, benchmark.turns(level))
        rows += [
            timed_row(candidate, direction, seconds, candidates) | {"agreement": agreement}
            for candidate, agreement in zip(candidates, agreements, strict=True)
        ]
    case = {"level": level, "shape": shape._asdict(), "dtype": dtype, "programs": rows}
    loss_tables.show_times(console, case)
    loss_tables.show_costs(console, case)
    return case


def counterpart(candidate: Candidate, others: list[Candidate]) -> Candidate | None:
    """Return our candidate that computes the same as a rival's, preferably the loss alone; None if there is none."""
    if candidate.library == "rspo_jax":
        return None
    same = [other for other in others if (other.library, other.objective) == ("rspo_jax", candidate.objective)]
    return min(same, key=lambda other: (other.shift != candidate.shift, other.returns != LOSS), default=None)


def check_agreement(
    candidate: Candidate, ours: Candidate | None, level: ArraysLevel, dtype: Dtype
) -> dict[str, float] | None:
    """Return the differences of a rival's loss and gradient from ours; None if there is nothing to compare.

    Raises:
      Disagreement: if they are too large.
    """
    if ours is None:
        return None
    (loss, gradient), (our_loss, our_gradient) = candidate.result(), ours.result()
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
                f"{candidate.name} does not compute what {ours.name} computes: the {name} differs by {difference:.2g}"
            )
    return differences


def timed_row(
    candidate: Candidate, direction: str, seconds: dict[str, list[float]], others: list[Candidate]
) -> dict[str, Any]:
    """Return the figures of a candidate that was timed, as plain JSON."""
    times, ours = seconds[candidate.name], counterpart(candidate, others)

    def ratio_to(base: Candidate) -> dict[str, float]:
        return timing.quartiles(timing.paired_ratios(times, seconds[base.name]))._asdict()

    # Loops hide FLOPs from XLA's count, so that a whole step has no bound.
    device = None if direction in get_args(StepDirection) else jax.devices()[0]
    row = compiled_row(candidate, direction, device)
    row["seconds"], row["fastest_seconds"] = timing.quartiles(times)._asdict(), min(times)
    row["ratio_to_first"] = ratio_to(others[0])
    row["fastest_ratio_to_ours"] = ours and min(times) / min(seconds[ours.name])
    row["ratio_to_ours"] = ours and ratio_to(ours)
    row["share_of_bound"] = row["bound"] and row["bound"]["seconds"] / row["seconds"]["median"]
    return row


def compiled_row(candidate: Candidate, direction: str, device: Any) -> dict[str, Any]:
    """Return the figures of a candidate before it runs, as plain JSON.

    Args:
      candidate: compiled.
      direction: as shown.
      device: the `jax.Device` that sets the bound; None for no bound.
    """
    costs, bound = candidate.costs, None
    if costs is not None and device is not None:
        peak = peak_of(device, costs.compulsory_bytes)
        if peak is not None:
            bound = roofline(costs.flops, costs.compulsory_bytes, peak)._asdict() | {"peak": asdict(peak)}
    return {
        "library": candidate.library,
        "objective": candidate.objective,
        "router_shift": candidate.shift,
        "returns": candidate.returns,
        "direction": direction,
        "compile_seconds": candidate.compile_seconds,
        "analysis": costs and asdict(costs) | {"compulsory_bytes": costs.compulsory_bytes},
        "bound": bound,
    }


def compile_case(
    benchmark: LossBenchmark, level: ArraysLevel, shape: Shape, dtype: Dtype, console: rich.console.Console
) -> dict[str, Any]:
    """Compile one case for a TPU pod and show XLA's costs."""
    mesh = pod_mesh(benchmark)
    check_divides("--shapes", shape.batch, mesh, benchmark.topology)
    arrays = loss_programs.abstract_arrays(shape, level, dtype, mesh)
    rows = []
    for direction, variant in itertools.product(timing.DIRECTIONS, our_variants(benchmark)):
        started = time.perf_counter()
        with compiling(variant[0], benchmark.topology):
            compiled = tpu.compile_for(loss_programs.jax_function(loss_programs.our_loss(*variant), direction), arrays)
        seconds, costs, no_call = time.perf_counter() - started, read_costs(compiled), loss_programs.no_call
        candidate = Candidate("rspo_jax", *variant, no_call, seconds, costs, no_call)
        rows.append(compiled_row(candidate, direction, mesh.devices.flat[0]))
    case = {"level": level, "shape": shape._asdict(), "dtype": dtype, "programs": rows}
    loss_tables.show_costs(console, case, f"{benchmark.topology}, {mesh.size} devices, figures of one")
    return case


def run_steps(benchmark: LossBenchmark, console: rich.console.Console) -> list[dict[str, Any]]:
    """Run the level "step": a case for each depth of the model."""
    on_tpu = benchmark.platform == "tpu"
    run, topology = (compile_step, benchmark.topology) if on_tpu else (run_step, "")
    cases = []
    for config in benchmark.step_settings.configs():
        case: dict[str, Any] = {"level": "step", "dtype": config.dtype} | run(benchmark, config)
        compare_with_first(case["programs"])
        loss_tables.show_step(console, case, topology)
        cases.append(case)
    if len(cases) > 1:
        loss_tables.show_depths(console, cases, topology)
    return cases


def compare_with_first(rows: list[dict[str, Any]]) -> None:
    """Add to each row the excess of the first row of its direction over it, by XLA's costs."""
    first: dict[str, Any] = {}
    for row in rows:
        row["is_control"] = row["returns"] == step_programs.CONTROL
        costs = row["analysis"]
        base = first.setdefault(row["direction"], costs)
        row["first_minus_this"] = {key: None if value is None else base[key] - value for key, value in costs.items()}


def run_step(benchmark: LossBenchmark, config: models.TransformerConfig) -> dict[str, Any]:
    """Compile and time the candidates of one training step."""
    inputs = jax.block_until_ready(step_programs.make_inputs(config, benchmark.step_settings, benchmark.seed))
    shape, rows = step_programs.shape_of(inputs), []
    for direction in get_args(StepDirection):
        candidates = step_programs.timed_candidates(direction, benchmark.objectives, inputs)
        for candidate in candidates:
            if not np.isfinite(candidate.result()[0]):
                raise Disagreement(f"{candidate.name}: the {direction} is not finite")
        seconds = timing.interleaved_seconds({one.name: one.call for one in candidates}, benchmark.turns("step"))
        rows += [timed_row(candidate, direction, seconds, candidates) for candidate in candidates]
    return {"shape": shape._asdict(), "programs": rows, "route": step_programs.route_report(inputs, shape, 1)}


def compile_step(benchmark: LossBenchmark, config: models.TransformerConfig) -> dict[str, Any]:
    """Compile the candidates of one training step for a TPU pod."""
    mesh = pod_mesh(benchmark)
    inputs = step_programs.abstract_inputs(config, benchmark.step_settings, mesh)
    shape, rows = step_programs.shape_of(inputs), []
    check_divides("--rows", shape.batch, mesh, benchmark.topology)
    for direction in get_args(StepDirection):
        for name in different_objectives(direction, benchmark.objectives):
            with compiling(f"{direction} of {name}", benchmark.topology):
                candidate = step_programs.compile_candidate(direction, name, inputs, mesh)
            rows.append(compiled_row(candidate, direction, None))
    return {"shape": shape._asdict(), "programs": rows, "route": step_programs.route_report(inputs, shape, mesh.size)}


def pod_mesh(benchmark: LossBenchmark) -> jax.sharding.Mesh:
    """Return a mesh of all devices of the topology, along the rows."""
    try:
        return tpu.topology_mesh(benchmark.topology, {"data": -1})
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error


def check_divides(flag: str, rows: int, mesh: jax.sharding.Mesh, topology: str) -> None:
    """Refuse rows that the mesh does not divide."""
    if rows % mesh.size:
        raise UserError(f"{flag}: {rows} rows cannot be split over the {mesh.size} devices of {topology}")


@contextlib.contextmanager
def compiling(name: str, topology: str) -> Iterator[None]:
    """Turn a refusal of the compiler into one sentence."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"{name} does not compile for {topology}: {str(error).splitlines()[0]}") from error


def describe_run(benchmark: LossBenchmark) -> dict[str, Any]:
    """Return the settings and the machine as plain JSON."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(benchmark).items()}
    versions = {rival: importlib.metadata.version(loss_programs.PACKAGES[rival][1]) for rival in benchmark.against}
    device: dict[str, Any] = {"platform": "tpu", "topology": benchmark.topology}
    if benchmark.platform == "default":
        device = {
            "platform": jax.devices()[0].platform,
            "kind": jax.devices()[0].device_kind,
            "machine": platform.machine(),
            "jax": jax.__version__,
            "python": platform.python_version(),
            "cpu_threads": cpu_threads(),
        }
    return {"settings": settings, "device": device, "versions": {"jax": jax.__version__} | versions}


def write_files(benchmark: LossBenchmark, figures: dict[str, Any], console: rich.console.Console) -> None:
    """Write the JSON file and the picture if they are asked for."""
    folder = benchmark.output
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    json_path = benchmark.json or (folder and folder / "bench_loss.json")
    picture = benchmark.picture or (folder and folder / "bench_loss.png")
    if json_path:
        write_json(json_path, figures)
        console.print(f"figures: {json_path}", soft_wrap=True)
    if picture and benchmark.platform == "default":
        loss_tables.draw_times(figures, picture)
        console.print(f"picture: {picture}", soft_wrap=True)
