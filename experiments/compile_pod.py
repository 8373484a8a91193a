"""Memory and work of a training step on a whole pod, from the TPU compiler (`python -m experiments.compile_pod`).

Score, update, prefill and decode are compiled for every device of the pod. Memory, arithmetic and the bytes that move
between devices are read from the compiled programs, shown, and written as JSON. Nothing runs, and no TPU is needed.
"""

import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import rich.console
import tyro

from experiments.compilers import tpu
from experiments.compilers.chips import Chip
from experiments.errors import UserError, complain
from experiments.pod import programs, sweep, tables
from experiments.pod.advice import advise
from experiments.pod.analysis import analyse
from experiments.pod.meshes import MeshFlags
from experiments.pod.presets import MODELS, ModelName
from experiments.pod.programs import PROGRAMS, ProgramName, Setting
from experiments.pod.sweep import SweepMode
from experiments.pod.topologies import chip_of, count_chips, pods_of
from models.config import Dtype, Remat
from rspo_jax import OBJECTIVES
from rspo_jax.records import write_json
from rspo_jax.sharding import make_mesh

ALL = "all"


@dataclass(frozen=True)
class Pod:
    """Compile a training step for a pod of TPUs that need not exist."""

    model: ModelName = "qwen3-30b-a3b"
    topology: str = "v5p:4x4x4"
    """Generation and chips, as v5p:4x4x4, v6e:16x16 or tpu7x:4x4x4."""
    batch: int = 128
    """Number of responses in a mini-batch; each fills a row."""
    seq_len: int = 8192
    """Tokens of a row, prompt and response."""
    prompt_len: int | None = None
    """Tokens of a prompt; an eighth of the row when absent."""
    micro_batches: int = 1
    """Number of parts of a mini-batch, one after the other."""
    objective: tuple[str, ...] = ("rspo",)
    """Names in rspo_jax.OBJECTIVES, or "all" for a comparison."""
    programs: tuple[ProgramName, ...] = PROGRAMS
    layers: tuple[int, ...] = ()
    """Depths of the model, all of which are compiled; the model's own when absent."""
    param_dtype: Dtype = "float32"
    """Dtype of parameters and optimizer; activations are in bfloat16."""
    remat: Remat = "full"
    """Activations that the backward pass computes again."""
    mesh: MeshFlags = field(default_factory=MeshFlags)
    sweep: tuple[SweepMode, ...] = ()
    """Compile the first of --programs for pods of 16 to 512 chips instead, and draw the work of a chip. --batch is that
    of --topology."""
    fewest_chips: int = 16
    most_chips: int = 512
    output: Path = Path("runs/compile_pod")
    """Folder for the figures as JSON and the picture of a sweep."""


def main(arguments: list[str] | None = None) -> int:
    """Compile and report; return 0 if all fits, 1 if something does not fit or compile, 2 for a mistake."""
    pod = tyro.cli(Pod, args=arguments, prog="python -m experiments.compile_pod")
    console = rich.console.Console(width=None if sys.stdout.isatty() else 180)
    try:
        check_flags(pod)
        return run_sweep(pod, console) if pod.sweep else run_pod(pod, console)
    except UserError as error:
        return complain(error)


def check_flags(pod: Pod) -> None:
    """Refuse flags that cannot be compiled, as far as the flags alone tell.

    Raises:
      UserError: naming the flag.
    """
    for name in ("batch", "micro_batches", "fewest_chips", "most_chips"):
        if getattr(pod, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(pod, name)}")
    if pod.seq_len < 16:
        raise UserError(f"--seq-len must be at least 16, got {pod.seq_len}")
    if pod.prompt_len is not None and not 1 <= pod.prompt_len < pod.seq_len:
        raise UserError(f"--prompt-len must lie between 1 and --seq-len, {pod.seq_len}; got {pod.prompt_len}")
    if pod.batch % pod.micro_batches:
        raise UserError(f"--batch {pod.batch} does not divide into {pod.micro_batches} --micro-batches")
    if not pod.programs or not pod.objective:
        raise UserError("--programs and --objective need at least one value each")
    if unknown := [name for name in pod.objective if name not in (*OBJECTIVES, ALL)]:
        raise UserError(f"unknown objective {unknown[0]!r}; choose from {', '.join((*OBJECTIVES, ALL))}")
    if list(pod.layers) != sorted(set(pod.layers)) or any(depth < 1 for depth in pod.layers):
        raise UserError(f"--layers must be positive and rise, got {' '.join(map(str, pod.layers))}")
    if pod.sweep and (len(pod.layers) > 1 or len(objectives_of(pod)) > 1):
        raise UserError("a sweep compiles one program for each pod: give one of --layers and one --objective")
    try:
        chip_of(pod.topology)
    except ValueError as error:
        raise UserError(f"--topology: {error}") from error


def objectives_of(pod: Pod) -> tuple[str, ...]:
    """Return the objectives to compile, none twice."""
    return tuple(OBJECTIVES) if ALL in pod.objective else tuple(dict.fromkeys(pod.objective))


def jobs(pod: Pod) -> list[tuple[ProgramName, str]]:
    """Return (program, objective) of all programs that differ."""
    objectives = objectives_of(pod)
    return [
        (program, objective)
        for program in dict.fromkeys(pod.programs)
        for objective in programs.different_objectives(program, objectives)
    ]


@dataclass(frozen=True)
class PodPlan:
    """A pod, its mesh, and the setting that is compiled for it."""

    topology: str
    chip: Chip
    devices: int
    mesh: jax.sharding.Mesh
    setting: Setting

    @property
    def axes(self) -> dict[str, int]:
        return dict(self.mesh.shape)


def plan_for(pod: Pod, topology: str, batch: int, layers: int | None = None) -> PodPlan:
    """Choose the mesh and the setting for a topology.

    Raises:
      UserError: if libtpu is missing or does not know the topology, or no mesh or model is possible.
    """
    try:
        config = replace(MODELS[pod.model], dtype="bfloat16", param_dtype=pod.param_dtype, remat=pod.remat)
        config = replace(config, num_layers=layers or config.num_layers)
        devices = tpu.topology_devices(topology)
        mesh_config = pod.mesh.config(config, len(devices), batch // pod.micro_batches)
        mesh = make_mesh(mesh_config, devices)
        prompt = pod.prompt_len or max(1, pod.seq_len // 8)
        setting = Setting(config, mesh_config, batch, pod.seq_len, prompt, pod.micro_batches)
        programs.check_mesh(setting, mesh)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    return PodPlan(topology, chip_of(topology), len(devices), mesh, setting)


def compile_one(plan: PodPlan, program: ProgramName, objective: str, console: rich.console.Console) -> dict[str, Any]:
    """Return one program's figures, with advice if it does not fit.

    Raises:
      UserError: if the mesh does not divide an array.
    """
    console.print(f"compiling {program} of {objective}, {plan.setting.model.num_layers} layers …", style="dim")
    try:
        figures = analyse(program, plan.setting, objective, plan.mesh, plan.chip)
    except ValueError as error:
        raise UserError(str(error)) from error
    does_not_fit = not figures["fits"] and not figures["error"]
    return figures | {"advice": advise(figures, plan.setting, plan.axes) if does_not_fit else []}


def describe_pod(pod: Pod, plan: PodPlan) -> dict[str, Any]:
    """Return the settings that a report names besides its figures."""
    return {
        "model": pod.model,
        "topology": plan.topology,
        "devices": plan.devices,
        "mesh": plan.axes,
        "rules": list(plan.setting.mesh.rules),
        "batch": plan.setting.batch,
        "seq_len": pod.seq_len,
        "prompt_len": plan.setting.prompt_length,
        "micro_batches": pod.micro_batches,
        "param_dtype": pod.param_dtype,
        "remat": pod.remat,
        "jax": jax.__version__,
    }


def run_pod(pod: Pod, console: rich.console.Console) -> int:
    """Compile all programs for one pod, and show and write the figures."""
    started = time.perf_counter()
    plans = [plan_for(pod, pod.topology, pod.batch, depth) for depth in pod.layers or (None,)]
    figures = [compile_one(plan, *job, console) for plan in plans for job in jobs(pod)]
    found = describe_pod(pod, plans[0]) | {"programs": figures, "comparison": tables.compare(figures)}
    tables.show(console, found)
    console.print(tables.NOTES, style="dim")
    console.print(f"{len(figures)} programs compiled in {time.perf_counter() - started:.0f} s")
    path = pod.output / f"{pod.model}-{pod.topology.replace(':', '-')}.json"
    _write(path, found, console)
    return 0 if all(row["fits"] for row in figures) else 1


def run_sweep(pod: Pod, console: rich.console.Console) -> int:
    """Compile one program for pods of all sizes, and show, write and draw the work of a chip."""
    program, objective = jobs(pod)[0]
    generation = pod.topology.partition(":")[0]
    depth = pod.layers[0] if pod.layers else None
    base = plan_for(pod, pod.topology, pod.batch, depth)
    base_chips = base.devices // base.chip.devices
    points, fits = [], True
    for mode in pod.sweep:
        for topology in pods_of(generation, pod.fewest_chips, pod.most_chips):
            chips = count_chips(topology)
            plan = plan_for(pod, topology, sweep.batch_for(mode, pod.batch, chips, base_chips), depth)
            figures = compile_one(plan, program, objective, console)
            found = describe_pod(pod, plan) | {"programs": [figures], "comparison": []}
            tables.show(console, found)
            points.append(sweep.point(mode, found, chips))
            fits = fits and figures["fits"]
            # After every pod: a sweep takes long, and an interruption should not lose the points so far.
            name = f"{pod.model}-{generation}-{program}"
            _write(pod.output / f"sweep-{name}.json", {"points": points}, console)
            title = f"{program} {objective}, {pod.model}, {generation}, rows of {pod.seq_len} tokens"
            sweep.draw_sweep(points, title, pod.output / f"sweep-{name}.png")
    return 0 if fits else 1


def _write(path: Path, figures: dict[str, Any], console: rich.console.Console) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, figures)
    console.print(f"written to {path}", style="dim")


if __name__ == "__main__":
    sys.exit(main())
