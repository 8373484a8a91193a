"""A learning rate for every method of the study `countdown`: all get the same rates, seed and steps.

Rates are judged by the responses of the last 10 training steps: 10,240 responses to prompts that were seen once, as the
512 of an evaluation do not tell neighbouring rates apart. The seed is not one of the study's.
"""

from experiments.ablation.grid import choose, vary
from experiments.ablation.study import Study
from experiments.reporting.study_figures import Sensitivity
from experiments.studies.countdown import BASE, LABELS, METHODS, RIGID, STYLES

UPDATES = (16,)
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)

STUDY = Study(
    name="countdown_tuning",
    base=BASE,
    grid=choose("method", METHODS | RIGID)
    * vary("updates", "trainer.mini_batches", *UPDATES)
    * vary("learning_rate", "trainer.optimizer.learning_rate", *RATES),
    seeds=(100,),
    score="late_solve_rate",
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
