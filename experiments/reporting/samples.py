"""The sample responses of a run on its page: each token in a colour that says how far the routers moved on it."""

import itertools
import math
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.reporting.page import escape, grid
from rspo_jax.records.samples import Sample

_MOST_STEPS = 12
_MOST_TOKENS = 60_000
_LEVELS = (0, 8, 16, 25, 34, 43, 62, 75, 88, 100)
"""Strength of the colour by level, in percent. Text is the page's own up to 43, and dark from 62 on; between these it
would be hard to read on a dark page. One hue from weak to strong is the same scale for every kind of colour vision."""
_FIRST_DARK = 6
_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"}
"""Unicode's categories of characters that show nothing, or that turn the direction of what follows."""
_VISIBLE = {"\n": "↵\n", "\t": "⇥\t", "\r": "␍"}

STYLE = """
.scale { display: flex; flex-wrap: wrap; align-items: center; gap: .15rem; font-size: .82rem; margin: .5rem 0; }
.scale i { padding: .1rem .45rem; } .scale span { margin: 0 .5rem; color: var(--grey); }
.samples summary { margin: 1rem 0 .4rem; } .samples summary span { font-weight: 400; color: var(--grey); }
.sample { border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem; min-width: 0; }
.sample p { font-size: .87rem; margin: .7rem 0 .2rem; } .sample p b { margin-right: .8rem; }
.text { margin: .2rem 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 24rem;
  overflow-y: auto; font: 14px/1.75 ui-monospace, "DejaVu Sans Mono", monospace; }
.prompt { color: var(--grey); max-height: 8rem; }
.text i, .scale i { font-style: normal; border-radius: 3px; } .text i { padding: .12rem 0; }
.text .empty::before { content: "▫"; opacity: .6; }
.text .environment { border-bottom: 2px dotted var(--grey); color: var(--grey); }
""" + "".join(
    f".g{level} {{ background: color-mix(in srgb, var(--orange) {strength}%, transparent);"
    f"{' color: #1b1e24;' if level >= _FIRST_DARK else ''} }}\n"
    for level, strength in enumerate(_LEVELS)
)


def samples_section(samples: Mapping[int, Sequence[Sample]]) -> list[str]:
    """Return the samples of a run as pieces of HTML: the scale of colours, then each step, the last one first.

    All steps are folded but the last, and the one in which the routers moved most.

    Args:
      samples: step -> responses, of one step or more. Of many steps a part is shown, evenly spread, and of long
        responses the beginning; the page says so.
    """
    steps = sorted(samples)
    if len(steps) > _MOST_STEPS:
        steps = [steps[at] for at in np.linspace(0, len(steps) - 1, _MOST_STEPS).round().astype(int)]
    most_tokens = max(_MOST_TOKENS // sum(len(samples[step]) for step in steps), 100)
    gammas = {step: [gamma for one in samples[step] for gamma in _known(one.gamma)] for step in steps}
    drifts = [-math.log(max(gamma, 1e-30)) for known in gammas.values() for gamma in known]
    top = max(float(np.quantile(drifts, 0.99)), 1e-4) if drifts else 0.0
    body = ['<h2>Samples</h2><div class="samples">']
    if len(steps) < len(samples):
        body += [f'<p class="quiet">{len(steps)} of {len(samples)} steps with samples; samples.jsonl has all.</p>']
    body += [_scale(top) if drifts else '<p class="quiet">This model has no routers, so its tokens have no γ.</p>']
    if any(one.environment for step in steps for one in samples[step]):
        body += ['<p class="quiet">Dots underline what the environment said.</p>']
    unfolded = {steps[-1], min(steps, key=lambda step: np.mean(gammas[step] or [math.inf]))}
    for step in reversed(steps):
        known = gammas[step]
        words = f"mean γ {np.mean(known):.4f}, lowest {min(known):.4f}" if known else ""
        body += [f"<details{' open' if step in unfolded else ''}><summary>Step {step} <span>{words}</span></summary>"]
        cards = []
        for prompt, responses in itertools.groupby(samples[step], key=lambda one: one.prompt):
            asked = f'<pre class="text prompt" dir="auto">{escape(visible(prompt))}</pre>'
            answers = "".join(_response(one, top, most_tokens) for one in responses)
            cards += [f'<div class="sample">{asked}{answers}</div>']
        body += [grid(cards), "</details>"]
    return [*body, "</div>"]


def visible(text: str) -> str:
    """Return text in which every character can be seen, except spaces: line ends, controls and marks of direction too.

    A character that shows nothing becomes its number, as in ⟨U+202E⟩.
    """
    return "".join(
        _VISIBLE.get(character)
        or (f"⟨U+{ord(character):04X}⟩" if unicodedata.category(character) in _HIDDEN else character)
        for character in text
    )


def _scale(top: float) -> str:
    """Return the key of the colours: the γ that each level begins at."""
    marks = "".join(
        f'<i class="g{level}">{math.exp(-top * level / (len(_LEVELS) - 1)):.4f}</i>' for level in range(len(_LEVELS))
    )
    return (
        f'<div class="scale"><span>γ: the routers stood still</span>{marks}<span>moved most</span></div>'
        '<p class="quiet">γ compares the routers after the step with those that the response was drawn with, on each '
        "token; the pointer shows it with the token's id and its probability before and after the step. ▫ is a token "
        "without a text of its own, such as the one that ends a response.</p>"
    )


def _response(sample: Sample, top: float, most_tokens: int) -> str:
    rewards = ", ".join(f"{visible(name)} {_number(value)}" for name, value in sample.rewards.items())
    known = _known(sample.gamma)
    marks = [
        f"reward {_number(sample.reward)}" + (f" ({rewards})" if rewards else ""),
        *([] if sample.correct is None else ["correct" if sample.correct else "not correct"]),
        *(["cut off"] if sample.truncated else []),
        *(["no reward applies"] if sample.left_out else []),
        f"advantage {sample.advantage:+.3g}",
        f"{len(sample.token_ids)} tokens",
        *([f"γ {np.mean(known):.4f}, lowest {min(known):.4f}"] if known else []),
    ]
    first = f"<p><b>{escape(marks[0])}</b>{escape(' · '.join(marks[1:]))}</p>"
    tokens = "".join(_token(sample, at, top) for at in range(min(len(sample.tokens), most_tokens)))
    more = len(sample.tokens) - most_tokens
    rest = f'<p class="quiet">{more:,} more tokens are in samples.jsonl.</p>' if more > 0 else ""
    return f'{first}<pre class="text" dir="auto">{tokens}</pre>{rest}'


def _token(sample: Sample, at: int, top: float) -> str:
    gamma = None if sample.gamma is None else sample.gamma[at]
    kinds = ["empty"] if not sample.tokens[at] else []
    words = [f"id {sample.token_ids[at]}"]
    if sample.environment is not None and sample.environment[at]:
        kinds.append("environment")
    else:
        before, after = (_probability(of[at]) for of in (sample.old_log_probs, sample.log_probs))
        words.append(f"probability {before} → {after}")
        if gamma is not None:
            words.insert(0, f"γ {gamma:.4f}")
            drift = -math.log(max(gamma, 1e-30))
            kinds.append(f"g{min(round(drift / top * (len(_LEVELS) - 1)), len(_LEVELS) - 1)}")
    return f'<i class="{" ".join(kinds)}" title="{", ".join(words)}">{escape(visible(sample.tokens[at]))}</i>'


def _known(gamma: Sequence[float | None] | None) -> list[float]:
    return [value for value in gamma or () if value is not None]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _probability(log_prob: float | None) -> str:
    return "–" if log_prob is None else f"{math.exp(min(log_prob, 0.0)):.3g}"
