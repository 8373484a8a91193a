"""Sample responses on a run's page: what is shown, in which colours, and that no response can break the page."""

import html.parser
import math

import pytest

from experiments import report
from experiments.reporting.page import make_page
from experiments.reporting.samples import STYLE, samples_section, visible
from rspo_jax.records import as_path
from rspo_jax.records.rows import RowFile
from rspo_jax.records.samples import SAMPLES_FILE, Sample

HOSTILE = (
    "<script>alert(1)</script>",
    "</style></pre></div><h1>gone</h1>",
    "\" onmouseover='x' &amp; <!-- ]]> {{ }}",
    "\u202eright to left\u2066\u200b",
    "\x00\x07\x1b[31m\x7f\x85",
    "\ud800 half a pair",
    "a\tb \n\n c\r\n",
    "עברית, 日本語, 👩‍💻",
)


class Parsed(html.parser.HTMLParser):
    """The tags of a page, the texts of its <pre> elements, and the class and title of every token."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.tokens, self._open = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "pre":
            self._open = True
            self.texts.append("")
        if tag == "i" and self._open:
            self.tokens.append((dict(attrs).get("class"), dict(attrs)["title"]))

    def handle_endtag(self, tag):
        self._open = self._open and tag != "pre"

    def handle_data(self, data):
        if self._open:
            self.texts[-1] += data


def sample(tokens, gamma=None, prompt="1+1=", **changes):
    count = len(tokens)
    fields = {
        "prompt": prompt,
        "response": "".join(tokens),
        "reward": 1.0,
        "correct": True,
        "truncated": False,
        "advantage": 0.5,
        "token_ids": list(range(count)),
        "tokens": tokens,
        "old_log_probs": [math.log(0.5)] * count,
        "log_probs": [math.log(0.25)] * count,
        "gamma": gamma,
    }
    return Sample(**(fields | changes))


def parsed(samples):
    return Parsed("".join(samples_section(samples)))


def test_tokens_have_the_colour_of_their_gamma_on_one_scale():
    moved = math.exp(-0.9)
    found = parsed({5: [sample(["a", "b", ""], [1.0, math.exp(-0.4), moved])], 10: [sample(["c"], [math.exp(-0.2)])]})
    # The last step comes first. Levels go by −log γ up to the largest, 0.9 here, in nine steps.
    assert found.tokens == [
        ("g2", "γ 0.8187, id 0, probability 0.5 → 0.25"),
        ("g0", "γ 1.0000, id 0, probability 0.5 → 0.25"),
        ("g4", "γ 0.6703, id 1, probability 0.5 → 0.25"),
        ("empty g9", "γ 0.4066, id 2, probability 0.5 → 0.25"),
    ]
    assert found.tags.count("details") == 2
    body = "".join(
        samples_section({step: [sample(["a"], [gamma])] for step, gamma in ((1, 0.9), (2, moved), (3, 1.0))})
    )
    order = ["<details open><summary>Step 3", "<details open><summary>Step 2", "<details><summary>Step 1"]
    assert sorted(order, key=body.index) == order
    body = "".join(samples_section({1: [sample(["a"], [moved])]}))
    assert '<i class="g0">1.0000</i>' in body and '<i class="g9">0.4066</i>' in body


def test_routers_that_never_move_are_pale_and_a_dense_model_has_no_colour():
    assert {kind for kind, _ in parsed({1: [sample(["a", "b"], [1.0, 1.0])]}).tokens} == {"g0"}
    dense = "".join(samples_section({1: [sample(["a", "b"])]}))
    assert "no routers" in dense and "γ 1" not in dense
    assert [title for _, title in Parsed(dense).tokens] == [f"id {at}, probability 0.5 → 0.25" for at in range(2)]


def test_rewards_verdicts_and_the_words_of_the_environment_are_told():
    one = sample(
        ["say", "no", "ok"],
        [0.9, None, 0.8],
        rewards={"correct": 1.0, "brief <b>": None},
        correct=None,
        truncated=True,
        environment=[False, True, False],
        old_log_probs=[-1.0, None, -1.0],
    )
    body = "".join(samples_section({1: [one]}))
    assert "reward 1 (correct 1, brief &lt;b&gt; –)" in body and "cut off" in body and "correct ·" not in body
    assert "Dots underline" in body and "lowest 0.8000" in body
    assert Parsed(body).tokens[1] == ("environment", "id 1")
    assert "Dots" not in "".join(samples_section({1: [sample(["a"], [1.0])]}))


def test_no_response_can_break_the_page():
    samples = {1: [sample([text[:3], text[3:]], [0.9, 0.8], prompt=text, rewards={text: 1.0}) for text in HOSTILE]}
    text = make_page("run", samples_section(samples), STYLE)
    text.encode()  # half a pair of surrogates could not be written
    found = Parsed(text)
    plain = Parsed(make_page("run", samples_section({1: [sample(["a", "b"], [0.9, 0.8])] * 8}), STYLE))
    assert found.tags.count("script") == 1 and set(found.tags) == set(plain.tags)
    assert found.texts == [shown for text in HOSTILE for shown in [visible(text)] * 2]
    assert not any(character in text for character in "\u202e\u2066\u200b\x00\x1b\x85\ud800")


def test_what_shows_nothing_becomes_visible():
    assert visible("a\n\tb\r") == "a↵\n⇥\tb␍"
    assert visible("\u202e\x00\ud800\ufeff") == "⟨U+202E⟩⟨U+0000⟩⟨U+D800⟩⟨U+FEFF⟩"
    assert visible("two  words, ünï ∑") == "two  words, ünï ∑"


def test_a_long_run_is_shown_in_part_and_says_so():
    many = {step: [sample(["a"] * 8, [1.0] * 8)] for step in range(1, 101)}
    found = "".join(samples_section(many))
    assert "12 of 100 steps" in found and "Step 1 " in found and "Step 100 " in found
    long = "".join(samples_section({step: [sample(["a"] * 900, [1.0] * 900)] * 100 for step in (1, 2)}))
    assert Parsed(long).tags.count("i") == 2 * 100 * 300 + 10 and "600 more tokens" in long


@pytest.mark.parametrize("alone", [True, False])
def test_a_report_needs_no_more_than_samples_and_does_without(tmp_path, alone, capsys):
    if alone:
        file = RowFile(as_path(tmp_path / SAMPLES_FILE), dict)
        file.open_in(tmp_path, make=True)
        file.append({"phase": "rl", "step": 3} | sample(["a"], [0.9]).row())
        file.close()
    else:
        (tmp_path / "metrics.jsonl").write_text('{"phase": "rl", "step": 1, "unknown": 0.5}\n')
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert ("<h2>Samples</h2>" in text) == alone
    assert ("<td>Samples</td><td>there is no samples.jsonl</td>" in text) == (not alone)
