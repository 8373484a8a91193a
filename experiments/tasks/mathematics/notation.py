"""Notations that mean the same: the tables of `experiments.tasks.mathematics.tokens`."""

from collections.abc import Callable
from re import Match

_GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi
omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"""
_OTHER_LETTERS = "varepsilon vartheta varphi varrho varsigma ell hbar imath jmath aleph mho nabla odot"
_FUNCTIONS = "sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan ln log lg exp gcd lcm max min"
_PROSE = """where with for if when while such that all any every each some is are was the integer not and or otherwise
even odd but mod of has have no then so be an"""

LETTERS = {*_GREEK.split(), *_OTHER_LETTERS.split()}
"""Commands that are letters."""
FUNCTIONS = set(_FUNCTIONS.split())
"""Names of functions, with or without a backslash."""
SPELLED = FUNCTIONS | {"pi", "sqrt", "infty"} | {name for name in _GREEK.split() if len(name) > 2}
"""Names that need no backslash."""
PROSE = set(_PROSE.split())
"""Words that never are products of letters, if white space stands around them."""
UNIT_LETTERS = set("msghLNJKWVACFTbB")
"""Upright letters that are units behind a value."""

_SIGNS = {
    "−–—": "-",
    "·⋅×": "*",
    "÷∕": "/",
    "′’": "'",
    "≤⩽": r"\le ",
    "≥⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≡": r"\equiv ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∈": r"\in ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "°": r"\degree ",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "∅": r"\emptyset ",
    "…": r"\ldots ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "∠": r"\angle ",
    "ℏ": r"\hbar ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "€": r"\text{euro}",
    "£": r"\text{pound}",
    "\u00a0": "~",
    "\u2009\u202f": "\\,",
}
_FRACTIONS = "½12 ⅓13 ⅔23 ¼14 ¾34 ⅕15 ⅖25 ⅗35 ⅘45 ⅙16 ⅚56 ⅛18 ⅜38 ⅝58 ⅞78"
UNICODE = str.maketrans(
    {sign: latex for signs, latex in _SIGNS.items() for sign in signs}
    | {sign: f"\\{name} " for sign, name in zip("αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ", _GREEK.split(), strict=True)}
    | {each[0]: rf"\frac{{{each[1]}}}{{{each[2]}}}" for each in _FRACTIONS.split()}
    | {sign: f"^{power}" for power, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
)
"""Signs of Unicode -> LaTeX."""

REWRITES: list[tuple[str, str | Callable[[Match[str]], str]]] = [
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
    (r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|ensuremath|boxed|rm|bf|it)(?![A-Za-z])", " "),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"\\\$", r"\\dollar "),
    (r"(?<!\\)(?:\$|\\[()\[\]])", " "),
    (r"\{,\}", ","),
    (r",\s*\\!\s*", ","),
    (r"(?<!\\)\\!", ""),
    (r"(?<=\d)(?:\\[,;: ]|~|\\thinspace\s*)(?=\d{3}(?!\d))", ""),
    (r"(?<!\\)\\(?:[,;:> ]|(?:quad|qquad|thinspace|enspace|hspace\s*\{[^{}]*\})(?![A-Za-z]))|~", " "),
    (r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})", r"\\degree "),
    (r"\^\s*\{\s*((?:\\prime\s*)+)\}|\^\s*(\\prime)(?![A-Za-z])", lambda m: "'" * m.group().count("prime")),
    (r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf|mathtt|mathnormal|pmb|bold)(?![A-Za-z])", " "),
    (r"\b([aApP])\.\s?([mM])\.", r"\1\2"),
    (r"(?<=\d)\s*\^\s*\{?\s*\\(?:text|mathrm|textrm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?", ""),
    (r"(?<=\d) +\(([A-Za-z]{3,}(?:[ -][A-Za-z]+)*)\)(?=[\s.]*$)", r" \\text{\1}"),  # 9 (apples)
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
    # Repeating decimals become 0.1(6).
    (r"(?<=\d)(\.\d*)\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\1(\2\3\4)"),
    (r"(\.\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))", lambda m: f"{m[1]}({m[2] or m[3]})"),
]
"""Patterns and what takes their place, in this order."""

SAME = {
    **{name: r"\le" for name in (r"\leq", r"\leqslant", "<=")},
    **{name: r"\ge" for name in (r"\geq", r"\geqslant", ">=")},
    **{name: "*" for name in (r"\cdot", r"\times", r"\ast")},
    **{name: r"\ldots" for name in (r"\dots", r"\cdots", r"\dotsc", "...")},
    **{name: "|" for name in (r"\lvert", r"\rvert", r"\vert")},
    **{name: "or" for name in (r"\lor", r"\vee")},
    **{r"\neq": r"\ne", r"\lt": "<", r"\gt": ">", r"\div": "/", r"\infin": r"\infty", r"\varnothing": r"\emptyset"},
    **{r"\lbrace": r"\{", r"\rbrace": r"\}", r"\langle": "(", r"\rangle": ")", r"\colon": ":", r"\newline": r"\\"},
    **{r"\lbrack": "[", r"\rbrack": "]", "**": "^", r"\bmod": r"\mod", r"\arccos": r"\arccos", r"\simeq": r"\approx"},
    r"\percent": r"\%",
    "%": r"\%",
    r"\backslash": r"\setminus",
}
"""Commands and signs -> the one that stands for all with the same meaning."""
