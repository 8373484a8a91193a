"""Draws docs/gamma.png, the picture of docs/concepts.md: `python docs/draw_gamma.py`.

A router of four experts moves a little and a lot between the sampling of a token and an update; γ compares the
probabilities of the experts that the token was sent to.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import rspo_jax
from experiments.reporting.curves import BLUE, GREY, INK, RED

LOGITS = (1.6, 1.2, 0.2, -0.6)
"""Router logits of one token in one layer, when the response was sampled."""
MOVE = (-0.5, -0.2, 0.8, 0.3)
"""Direction in which the router moves."""
CASES = (("not moved", 0.0), ("moved a little", 0.5), ("another expert is chosen", 1.4))
ACTIVE = 2
FLOOR = 0.8


def main() -> None:
    """Draw the picture."""
    figure = Figure(figsize=(9.5, 3.1), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    *bars, curve = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.5])
    old, move = jnp.array(LOGITS), jnp.array(MOVE)
    trace = rspo_jax.trace_router(old[None, None, None], k=ACTIVE)

    def gamma_of(distance: float) -> float:
        return rspo_jax.router_shift((old + distance * move)[None, None, None], trace).item()

    for axes, (title, distance) in zip(bars, CASES, strict=True):
        new = np.asarray(jax.nn.softmax(old + distance * move))
        for expert, (before, after) in enumerate(zip(np.asarray(jax.nn.softmax(old)), new, strict=True)):
            was_active = expert < ACTIVE
            axes.bar(expert, before, width=0.8, color="none", edgecolor=RED if was_active else GREY, linewidth=1.6)
            axes.bar(expert, after, width=0.55, color=BLUE if expert in np.argsort(-new)[:ACTIVE] else "#cfd8e3")
        axes.set(title=f"{title}\nγ = {gamma_of(distance):.2f}", xlabel="expert", ylim=(0, 0.62), xticks=range(4))
    bars[0].text(
        1.55, 0.52, "outline: old policy\nred: its choice\nfilled: now\nblue: the choice now", va="top", fontsize=8
    )
    bars[0].set_ylabel("router probability")
    distances = np.linspace(0, 1.5, 61)
    gammas = [gamma_of(distance) for distance in distances.tolist()]
    curve.plot(distances, gammas, color=GREY, linewidth=1.2, linestyle=(0, (4, 2)))
    curve.plot(distances, np.maximum(gammas, FLOOR), color=BLUE, linewidth=2)
    curve.text(1.5, 0.81, "floor 0.8", color=BLUE, ha="right", va="bottom")
    curve.text(1.1, 0.7, "γ without a floor", color=INK, ha="right")
    curve.set(title="the weight of the token's ratio", xlabel="how far the router has moved", ylim=(0.5, 1.02))
    for axes in (*bars, curve):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(9.5)
    figure.savefig(Path(__file__).with_name("gamma.png"), metadata={"Software": None})


if __name__ == "__main__":
    main()
