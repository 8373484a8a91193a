"""A learning rate for every method of the study `countdown`: all get the same rates, seeds and steps, and are judged on
the validation split. Seeds are others than the study's."""

from experiments.ablation.figures import Sensitivity
from experiments.ablation.grid import vary
from experiments.ablation.study import Study
from experiments.studies.countdown import BASE, LABELS, METHODS, RIGID, STYLES, methods

UPDATES = (16,)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)

STUDY = Study(
    name="countdown_tuning",
    base=BASE,
    grid=methods(METHODS | RIGID, {})
    * vary("updates", "trainer.mini_batches", *UPDATES)
    * vary("learning_rate", "trainer.optimizer.learning_rate", *RATES),
    seeds=(100,),
    score="eval_sampled",
    figures=(
        Sensitivity(
            "learning_rates",
            panels="updates",
            factor="learning_rate",
            lines="method",
            where={"method": tuple(METHODS)},
            log=True,
        ),
        Sensitivity(
            "learning_rates_rigid",
            panels="updates",
            factor="learning_rate",
            lines="method",
            where={"method": tuple(RIGID)},
            log=True,
        ),
    ),
    labels=LABELS,
    styles=STYLES,
)
