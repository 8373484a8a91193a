"""The notebooks as a reader sees them: outputs are present, clean and those of the code. A slow test runs them."""

import base64
import copy
import importlib.util
import io
import os
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image
from support.commands import QUICK

from experiments import ablate
from experiments.ablation.study import plan_study
from experiments.errors import MISTAKE
from experiments.notebooks import __main__ as command

ROOT = Path(__file__).resolve().parents[3]
PICTURES = {"rspo_loss": 7, "your_own_ablation": 4, "your_own_reward": 1}
"""Name of each notebook -> number of pictures that it shows."""
WRITE_FILE = "%%writefile my_study.py\n"


def read(name, folder=command.FOLDER):
    return nbformat.read(folder / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


@pytest.fixture(params=PICTURES)
def notebook(request):
    return read(request.param)


def test_no_notebook_goes_unchecked():
    assert {path.stem for path in command.FOLDER.glob("*.ipynb")} == set(PICTURES)


def test_notebooks_are_valid_and_ran_top_to_bottom(notebook):
    nbformat.validate(notebook)
    assert command.faults(notebook) == []
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_there(name):
    found = pictures(read(name))
    assert len(found) == PICTURES[name]
    for picture in found:
        assert len(set(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L").tobytes())) > 10


def test_notebooks_stay_small():
    assert sum(path.stat().st_size for path in command.FOLDER.glob("*.ipynb")) < 2**20


def test_the_notebooks_are_set_up_as_pyproject_says():
    for name in PICTURES:
        first = code_cells(read(name))[0]
        assert first.source == command.setup_cell(), "run python -m experiments.notebooks"
        assert not first.outputs


def test_the_address_stands_once(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PYPROJECT", tmp_path / "pyproject.toml")
    command.PYPROJECT.write_text('[project]\nname = "x"\n[project.urls]\nRepository = "https://host.example/a/b"\n')
    assert 'REPOSITORY = "https://host.example/a/b"\n' in command.setup_cell()
    command.PYPROJECT.write_text('[project]\nname = "x"\n')
    assert 'REPOSITORY = ""\n' in command.setup_cell()


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """A function that runs the first cell as if the package were missing, on Colab or not, in a checkout or elsewhere,
    and returns the packages that it installs and the folders that it adds to the path."""

    def run(colab=True, installed=False, repository="", checkout=False):
        calls, place = [], tmp_path / ("checkout" if checkout else "elsewhere") / "experiments" / "notebooks"
        place.mkdir(parents=True, exist_ok=True)
        if checkout:
            (place.parents[1] / "rspo_jax").mkdir(exist_ok=True)
            (place.parents[1] / "rspo_jax" / "__init__.py").touch()
        with monkeypatch.context() as patch:
            patch.chdir(place)
            patch.setenv("JAX_PLATFORMS", "cpu")
            patch.setenv("PYTHONPATH", "")
            patch.setattr(sys, "path", list(sys.path))
            before = set(sys.path)
            patch.setattr(subprocess, "run", lambda arguments, check: calls.append(arguments))
            if not installed:
                patch.setattr(importlib.util, "find_spec", lambda name: None)
            if colab:
                patch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
            exec(command.SETUP.format(repository=repository), {})
            assert all(call[:5] == [sys.executable, "-m", "pip", "install", "--quiet"] for call in calls)
            return [call[5] for call in calls], sorted(set(sys.path) - before)

    return run


def test_the_first_cell_installs_only_on_colab_and_only_what_is_missing(setup, tmp_path):
    address, checkout = "https://host.example/a/b", tmp_path / "checkout"
    assert setup(installed=True, repository=address) == ([], [])
    assert setup(repository=address) == ([f"rspo-jax[train] @ git+{address}"], [])
    assert setup(checkout=True) == ([f"rspo-jax[train] @ {checkout.as_uri()}"], [])
    assert setup(colab=False, checkout=True) == ([], [str(checkout)])
    for options in ({}, {"colab": False}, {"colab": False, "repository": address}):
        with pytest.raises(ModuleNotFoundError, match=r"in a checkout .* or, on Colab, set REPOSITORY in this cell"):
            setup(**options)


def test_the_study_can_be_run_and_its_figures_are_shown(tmp_path):
    cells = [cell.source for cell in code_cells(read("your_own_ablation"))]
    (study_cell,) = [source for source in cells if source.startswith(WRITE_FILE)]
    path = tmp_path / "my_study.py"
    path.write_text(study_cell.removeprefix(WRITE_FILE))
    study = ablate.load_study(str(path))
    plan = plan_study(study)
    assert len(plan.runs) == len(study.grid) * len(study.seeds)
    assert len(plan.warm_starts) == 1
    for figure in study.figures:
        assert sum(f'"{figure.name}.png"' in source for source in cells) == 1
    assert any(f"problems = {study.base.task.test}\n" in source for source in cells)


def with_output(notebook, **output):
    notebook = copy.deepcopy(notebook)
    code_cells(notebook)[1].outputs = [nbformat.from_dict(output)]
    return notebook


HOME = "/".join(("", "home", "me"))  # put together, as no file of the repository may contain such a path


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        ({"output_type": "error", "ename": "E", "evalue": "it broke", "traceback": []}, "error or a warning: it broke"),
        ({"output_type": "stream", "name": "stderr", "text": "careful"}, "error or a warning: careful"),
        ({"output_type": "stream", "name": "stdout", "text": f"in {HOME}/runs"}, f"machine: {HOME}"),
        ({"output_type": "execute_result", "data": {"text/plain": "Path('/tmp/x')"}}, "machine: /tmp/x"),
    ],
)
def test_what_no_output_may_hold_is_found(output, complaint):
    found = command.faults(with_output(read("rspo_loss"), **output))
    assert len(found) == 1
    assert complaint in found[0]


def test_outputs_of_other_code_are_found():
    notebook = read("rspo_loss")
    notebook.cells[0].source += " More words change nothing."
    assert command.faults(notebook) == []
    code_cells(notebook)[-1].source += "\n# changed"
    assert "not those of the code" in command.faults(notebook)[0]


def test_harmless_outputs_are_left_alone():
    output = {"output_type": "stream", "name": "stdout", "text": "in my_ablation/work, see a.b/tmp/c; 1/2"}
    assert command.faults(with_output(read("rspo_loss"), **output)) == []


def test_a_compact_picture_looks_the_same():
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:20, :, 0] = np.linspace(0, 255, 60)
    large = io.BytesIO()
    Image.fromarray(pixels).save(large, "PNG", compress_level=0)
    small = command.compact(large.getvalue())
    assert len(small) < len(large.getvalue())
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(small)).convert("RGB")), pixels)


def test_an_unknown_notebook_is_refused(capsys):
    assert command.main(["no_such"]) == MISTAKE
    assert (
        "there is no notebook 'no_such'; there are rspo_loss, your_own_ablation, your_own_reward"
        in capsys.readouterr().err
    )


SMALLER = {
    "your_own_ablation": {
        "steps=20,": "steps=4,",
        "prompts=32,": "prompts=8,",
        "steps=200, batch_size=128,": "steps=20, batch_size=16,",
    }
}
"""Name of a notebook -> replacements in its code, which make it run in half of the time."""
RUN_COPY = """
import pathlib, sys
from experiments.notebooks import __main__ as command
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
command.FOLDER = folder
sys.exit(command.main([name, "--out", str(folder / "fresh")]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_notebooks_run_top_to_bottom(name, tmp_path):
    text = (command.FOLDER / f"{name}.ipynb").read_text()
    for whole, smaller in SMALLER.get(name, {}).items():
        assert text.count(whole) == 1
        text = text.replace(whole, smaller)
    (tmp_path / f"{name}.ipynb").write_text(text)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK}
    arguments = [sys.executable, "-c", RUN_COPY, str(tmp_path), name]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    fresh, copied = read(name, tmp_path / "fresh"), read(name, tmp_path)
    assert command.faults(fresh) == []
    assert len(pictures(fresh)) == PICTURES[name]
    assert [cell.source for cell in fresh.cells] == [cell.source for cell in copied.cells]
