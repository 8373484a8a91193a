"""The variables of chat templates, and which of them are flags."""

import jinja2
import pytest

from experiments.chat_template import TemplateVariables


@pytest.mark.parametrize(
    ("template", "flags", "others"),
    [
        ("{% if think is defined and think is false %}x{% endif %}", {"think"}, set()),
        ("{% if think %}x{% endif %}{{ effort }}", {"think"}, {"effort"}),
        ("{% if a %}{% elif not think %}{% endif %}{{ 'x' if b else 'y' }}", {"a", "b", "think"}, set()),
        ("{% if a and (b or not c) %}x{% endif %}{{ d or 'x' }}", {"a", "b", "c"}, {"d"}),
        ("{% if tools is not none and tools %}{{ tools | tojson }}{% endif %}", set(), {"tools"}),
        ("{% if effort == 'low' %}x{% endif %}{% if think == true %}x{% endif %}", {"think"}, {"effort"}),
        ("{% if not think is defined %}{% set think = false %}{% endif %}{{ think }}", {"think"}, set()),
        ("{% set on = think | default(true) %}{{ on }}", {"think"}, {"on"}),
        ("{% set on = think if think is defined else true %}{{ on }}", {"think"}, {"on"}),
        ("{% set on = think or false %}{{ on }}{# unused #}", {"think"}, {"on"}),
        (
            "{% generation %}{{ effort }}{%- endgeneration -%}{% for a in b %}{% break %}{% endfor %}",
            set(),
            {"effort", "b"},
        ),
    ],
)
def test_names_and_flags(template, flags, others):
    found = TemplateVariables(template)
    assert (found.flags, found.names - found.flags) == (flags, others)


def test_a_template_that_jinja_does_not_understand():
    with pytest.raises(jinja2.TemplateSyntaxError):
        TemplateVariables("{% if %}")
