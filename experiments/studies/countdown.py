"""Router shift on Countdown: does it help GRPO, GSPO and GMPO, and when does training without it collapse?

Every method runs in four settings: three levels of off-policyness (numbers of updates per rollout) at the learning rate
that `countdown_tuning` found for all of them, and a harsh setting whose rate is too high. The rigid alternatives to
router shift and the ablations of RSPO run in two of them, where methods differ most: the most off-policy one, and the
harsh one.
"""

from experiments.ablation.grid import Grid, choose, vary
from experiments.ablation.study import Study, Style
from experiments.config import CountdownRun
from experiments.reporting.curves import BLUE, GREEN, RED
from experiments.reporting.study_figures import CollapseRates, FinalScores, Improvement, LearningCurves, Sensitivity
from experiments.tasks.countdown import CharacterTokenizer, CountdownConfig
from models import TransformerConfig
from rspo_jax.rollouts import SamplerConfig
from rspo_jax.training import CheckpointConfig, EvaluationConfig, OptimizerConfig, TrainerConfig, WarmStartConfig

STEPS = 100
SEEDS = (0, 1, 2, 3, 4)
TUNED_RATE, HARSH_RATE = 1e-4, 1e-3
"""The best of five rates for each of the methods, as `countdown_tuning` found; and ten times that rate."""

# Rollouts and evaluations both draw 512 responses at a time, so a run traces only two programs of the sampler, which
# differ in their temperature.
BASE = CountdownRun(
    task=CountdownConfig(train=12_000, validation=512, test=1_536),
    model=TransformerConfig(vocab_size=CharacterTokenizer.vocabulary_size, expert_size=96),
    trainer=TrainerConfig(
        steps=STEPS,
        prompts=128,
        group_size=8,
        learned_groups=48,
        rollout_chunks=2,
        sampler=SamplerConfig(max_new_tokens=12),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        warm_start=WarmStartConfig(steps=400, optimizer=OptimizerConfig(learning_rate=6e-3, warmup_updates=20)),
        evaluation=EvaluationConfig(every=20, problems=512),
        checkpoint=CheckpointConfig(every=50, keep=1),
    ),
)

METHODS: dict[str, dict[str, object]] = {
    "grpo": {"objective.objective": "grpo"},
    "grpo_rs": {"objective.objective": "grpo", "objective.gamma_min": 0.8},
    "gspo": {"objective.objective": "gspo"},
    "gspo_rs": {"objective.objective": "gspo", "objective.gamma_min": 0.8},
    "gmpo": {"objective.objective": "gmpo"},
    "rspo": {"objective.objective": "rspo"},
}
"""RSPO is GMPO with router shift."""

RIGID = {
    f"gmpo_{routing}": {"objective.objective": "gmpo", "objective.routing": routing}
    for routing in ("frozen", "copy", "replay_trainer", "replay_sampler")
}
"""Alternatives that the paper compares router shift with."""


def setting(name: str, updates: int, learning_rate: float = TUNED_RATE) -> Grid:
    """Return a setting: how far off-policy the last updates of a rollout are, by the number and the size of updates."""
    return choose(
        "setting", {name: {"trainer.mini_batches": updates, "trainer.optimizer.learning_rate": learning_rate}}
    )


HARDEST, HARSH = setting("updates_32", 32), setting("harsh", 16, HARSH_RATE)
SETTINGS = setting("updates_4", 4) + setting("updates_16", 16) + HARDEST + HARSH

BALANCE = vary("balance", "objective.regularizers.load_balance_coefficient", 0.01)
"""A load-balance loss, which moves routers as well."""

WIDER = {
    "wide_good": {"objective.clip_high": 0.016},
    "wide": {"objective.clip_low": 0.016, "objective.clip_high": 0.016},
}
"""GSPO without router shift but with wider bounds: for good responses alone, and for all. Their width is about the
distance by which router shift moves the bound of good responses: a mean γ of 0.988, which GSPO has at 16 updates,
amounts to 0.012, and RSPO's mean γ of 0.984 to 0.016."""

DEFAULTS = {
    "clip": "narrow",
    "gamma": "weight",
    "gamma_min": 0.8,
    "position": "pre_clip",
    "layers": "mean",
    "scale": "fixed",
    "balance": 0.0,
}

LABELS = {
    "grpo": "GRPO",
    "grpo_rs": "GRPO + RS",
    "gspo": "GSPO",
    "gspo_rs": "GSPO + RS",
    "gmpo": "GMPO",
    "rspo": "RSPO (GMPO + RS)",
    "gmpo_frozen": "GMPO, frozen router",
    "gmpo_copy": "GMPO, copied weights",
    "gmpo_replay_trainer": "GMPO, replay (R2)",
    "gmpo_replay_sampler": "GMPO, replay (R3)",
    "narrow": "GSPO's bounds",
    "wide_good": "0.016 for good responses",
    "wide": "0.016 for all",
    "setting": "setting",
    "updates_4": "4 updates a rollout",
    "updates_16": "16 updates a rollout",
    "updates_32": "32 updates a rollout",
    "harsh": "16 updates, rate 1e-3 for all",
    "updates": "updates a rollout",
    "gamma_min": "floor of γ",
    "learning_rate": "learning rate",
    "weight": "weight, no gradient",
    "mask": "mask",
    "gradient": "weight, with gradient",
    "pre_clip": "before the clip",
    "post_clip": "after the clip",
    "post_clip_literal": "after, as printed",
    "mean": "mean over layers",
    "sum": "sum over layers",
    "fixed": "fixed scale",
    "quantile": "scale by the drift's quantile",
    "sample_size": "scale by the sample size",
    "balance": "load-balance coefficient",
}

STYLES = {
    "grpo": Style(RED, dashed=True),
    "grpo_rs": Style(RED),
    "gspo": Style(GREEN, dashed=True),
    "gspo_rs": Style(GREEN),
    "gmpo": Style(BLUE, dashed=True),
    "rspo": Style(BLUE),
}

RSPO = choose("method", {"rspo": METHODS["rspo"]})
BALANCED = {name: METHODS[name] for name in ("gmpo", "rspo")}

ABLATIONS = (
    choose("gamma", {"mask": {"objective.gamma_use": "mask"}, "gradient": {"objective.gamma_gradient": True}})
    + vary("gamma_min", "objective.gamma_min", 0.2, 0.5, 0.9, 0.95)
    + vary("position", "objective.position", "post_clip", "post_clip_literal")
    + vary("layers", "objective.layer_aggregation", "sum")
    + vary("scale", "objective.adaptive_shift.rule", "quantile", "sample_size")
)
"""Cells that each change one thing about RSPO."""

TUNED_SETTINGS = ("updates_4", "updates_16", "updates_32")
MAIN = {"method": tuple(METHODS)}
SHIFTED = {"method": ("grpo_rs", "gspo_rs", "rspo")}
PAIRS = (("grpo_rs", "grpo"), ("gspo_rs", "gspo"), ("rspo", "gmpo"), ("rspo", "grpo"), ("rspo", "gspo"))
ABLATION_PAIRS = {
    "gamma": (("weight", "mask"), ("weight", "gradient")),
    "gamma_min": tuple((0.8, floor) for floor in (0.2, 0.5, 0.9, 0.95)),
    "position": (("pre_clip", "post_clip"), ("pre_clip", "post_clip_literal")),
    "layers": (("mean", "sum"),),
    "scale": (("quantile", "fixed"), ("sample_size", "fixed")),
}
TWO_SETTINGS = ("updates_32", "harsh")
RIVALS = {"method": ("gmpo", "rspo", *RIGID), "setting": TWO_SETTINGS}
WIDENED = {"method": "gspo", "setting": "updates_16"}
ABLATED = {"method": "rspo", "setting": TWO_SETTINGS}

STUDY = Study(
    name="countdown",
    base=BASE,
    grid=choose("method", METHODS) * SETTINGS
    + choose("method", RIGID) * (HARDEST + HARSH)
    + RSPO * (HARDEST + HARSH) * ABLATIONS
    + choose("method", BALANCED) * (HARDEST + HARSH) * BALANCE
    + choose("method", {"gspo": METHODS["gspo"]}) * setting("updates_16", 16) * choose("clip", WIDER),
    seeds=SEEDS,
    warm_starts=len(SEEDS),
    defaults=DEFAULTS,
    figures=(
        LearningCurves("curves", panels="setting", where=MAIN),
        LearningCurves("drift", panels="setting", where=MAIN, metric="gamma_mean"),
        LearningCurves("floor", panels="setting", where=SHIFTED, metric="gamma_floor_fraction"),
        LearningCurves("entropy", panels="setting", where=MAIN, metric="entropy"),
        LearningCurves("ratios", panels="setting", where=MAIN, metric="ratio_max", log=True),
        LearningCurves("stays", panels="setting", where=MAIN, metric="route_stays"),
        LearningCurves("load", panels="setting", where=MAIN, metric="max_violation"),
        LearningCurves("clipped_good", panels="setting", where=MAIN, metric="clip_fraction_positive"),
        LearningCurves("clipped_bad", panels="setting", where=MAIN, metric="clip_fraction_negative"),
        LearningCurves("sample_size", panels="setting", where=MAIN, metric="effective_sample_size"),
        FinalScores("scores", panels="setting", where=MAIN, metric="test_sampled"),
        FinalScores("greedy", panels="setting", where=MAIN, metric="test_greedy"),
        CollapseRates("collapses", panels="setting", where=MAIN),
        Improvement("improvement", panels="setting", where=MAIN, pairs=PAIRS),
        Improvement("improvement_tuned", panels="setting", where=MAIN | {"setting": TUNED_SETTINGS}, pairs=PAIRS),
        FinalScores("rigid", panels="setting", where=RIVALS),
        LearningCurves("rigid_curves", panels="setting", where=RIVALS),
        Improvement(
            "rigid_improvement",
            panels="setting",
            where=RIVALS,
            pairs=tuple(("rspo", name) for name in RIGID),
        ),
        FinalScores("gamma", panels="setting", groups="gamma", where=ABLATED),
        LearningCurves("gamma_curves", panels="setting", lines="gamma", where=ABLATED),
        FinalScores("position", panels="setting", groups="position", where=ABLATED),
        FinalScores("layers", panels="setting", groups="layers", where=ABLATED),
        FinalScores("scale", panels="setting", groups="scale", where=ABLATED),
        LearningCurves("scale_curves", panels="setting", lines="scale", where=ABLATED),
        Sensitivity("gamma_min", factor="gamma_min", lines="setting", where=ABLATED),
        *(
            Improvement(f"{factor}_improvement", panels="setting", factor=factor, where=ABLATED, pairs=pairs)
            for factor, pairs in ABLATION_PAIRS.items()
        ),
        FinalScores("clip", groups="clip", where=WIDENED, metric="test_sampled"),
        Improvement(
            "clip_improvement", factor="clip", where=WIDENED, pairs=(("wide_good", "narrow"), ("wide", "narrow"))
        ),
        *(
            FinalScores(f"balance_{name}", panels="setting", groups="balance", where=ABLATED | {"method": name})
            for name in BALANCED
        ),
        *(
            LearningCurves(
                f"balance_{name}_load",
                panels="setting",
                lines="balance",
                where=ABLATED | {"method": name},
                metric="max_violation",
            )
            for name in BALANCED
        ),
        *(
            Improvement(
                f"balance_{name}_improvement",
                panels="setting",
                factor="balance",
                where=ABLATED | {"method": name},
                pairs=((0.01, 0.0),),
            )
            for name in BALANCED
        ),
    ),
    labels=LABELS,
    styles=STYLES,
)
