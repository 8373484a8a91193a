"""Gradients of all objectives, on the same responses at the same parameters, against the on-policy gradient.

RSPO runs three times in each of the two settings of the study `countdown` that are the most off-policy; after every
tenth step `rspo_jax.training.probe` takes the gradients of all objectives. Otherwise the runs are those of `countdown`.
"""

import dataclasses

from experiments.ablation.study import METRICS, Study
from experiments.reporting.study_figures import MeansOfSteps
from experiments.studies.countdown import BASE, HARDEST, HARSH, LABELS, RSPO
from rspo_jax.objectives import AGGREGATIONS
from rspo_jax.training.probe import PROBED

KINDS = {
    "cosine": "cosine to the on-policy gradient",
    "snr": "signal-to-noise ratio of the gradient",
    "norm": "length over that of the on-policy gradient",
}
REFERENCES = {f"reference_{kind}_{way}": f"on-policy, {way}" for kind in ("cosine", "snr") for way in AGGREGATIONS}


def metrics_of(kind: str) -> tuple[str, ...]:
    """Return the probe's metrics of one kind: the references, which are the ceiling, then those of all objectives."""
    references = [f"probe_{name}" for name in REFERENCES if name.startswith(f"reference_{kind}_")]
    return (*references, *(f"probe_{kind}_{name}" for name in PROBED))


STUDY = Study(
    name="countdown_gradients",
    base=dataclasses.replace(BASE, trainer=dataclasses.replace(BASE.trainer, probe_every=10)),
    grid=RSPO * (HARDEST + HARSH),
    seeds=(0, 1, 2),
    warm_starts=3,
    metrics=(*METRICS, *(metric for kind in KINDS for metric in metrics_of(kind))),
    figures=tuple(
        MeansOfSteps(
            f"gradient_{kind}",
            panels="setting",
            metrics=metrics_of(kind),
            what=what,
            where={"method": "rspo"},
        )
        for kind, what in KINDS.items()
    ),
    labels=LABELS
    | {f"probe_{name}": label for name, label in REFERENCES.items()}
    | {f"probe_{kind}_{name}": LABELS.get(name, name) for kind in KINDS for name in PROBED},
)
