"""Record the outputs of transformers for the tiny models of `hf_cases`.

    make parity && .venv/bin/python tests/support/hf_golden_live.py [CASE ...]

writes to tests/models/hugging_face/golden/CASE/: config.json as transformers writes it, names and shapes of the tensors
in its files, and logits and router logits of two sequences.
"""

import json
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from support import hf_cases


def write_folder(case: str, folder: pathlib.Path) -> None:
    """Let transformers write a folder, and give it the weights of `hf_cases`."""
    model_type, fields = hf_cases.CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **{**hf_cases.SHARED, **fields})
    config.dtype = "float32"
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {name: array.shape for name, array in safetensors.numpy.load_file(file).items()}
    tensors = {name: hf_cases.weight(name, shape) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def load(folder: pathlib.Path) -> Any:
    """Let transformers load the model of a folder, in float32.

    Raises:
      ValueError: if transformers finds a fault in the folder.
    """
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    faults = {kind: found for kind, found in report.items() if found}
    if faults:
        raise ValueError(f"transformers finds faults in {folder}: {faults}")
    return model.eval()


def run(model: Any, sequences: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Return transformers' logits [T, V] and router logits [L, T, E] of each sequence."""
    seen: list[torch.Tensor] = []

    def note(module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        del output
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
        seen.append(torch.nn.functional.linear(hidden, module.weight, getattr(module, "bias", None)))

    for name, module in model.named_modules():
        if name.endswith(("mlp.gate", "mlp.router")):
            module.register_forward_hook(note)
    outputs = []
    for tokens in sequences:
        seen.clear()
        with torch.no_grad():
            logits = model(torch.as_tensor(tokens)[None]).logits[0].numpy()
        outputs.append((logits, np.stack([array.numpy() for array in seen]) if seen else None))
    return outputs


def main() -> None:
    for case in sys.argv[1:] or hf_cases.CASES:
        target = hf_cases.GOLDEN / case
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            write_folder(case, folder)
            outputs = run(load(folder), hf_cases.sequences())
            shapes = {
                name: array.shape for name, array in safetensors.numpy.load_file(folder / "model.safetensors").items()
            }
            (target / "config.json").write_text((folder / "config.json").read_text())
        lines = [f"  {json.dumps(name)}: {json.dumps(shape)}" for name, shape in sorted(shapes.items())]
        (target / "tensors.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        arrays = {f"logits_{number}": logits for number, (logits, _) in enumerate(outputs)}
        arrays |= {
            f"router_logits_{number}": router for number, (_, router) in enumerate(outputs) if router is not None
        }
        np.savez_compressed(target / "outputs.npz", **arrays)
        print(case, {name: array.shape for name, array in arrays.items()})


if __name__ == "__main__":
    main()
