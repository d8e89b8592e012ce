import json
import resource
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama4_jax.errors import UserError
from llama4_jax.processing.templates import ChatTemplate


def render(source, marks=("", ""), **variables):
    return ChatTemplate(source, "the template").render({"messages": [{"role": "user", "content": "hi"}], **variables}, marks)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n  {{ m.role }}\n{% endfor %}", "  user\n"),  # lines of a block alone leave nothing
        ("{{ {'a': '<é&>', 'b': None} | tojson }}", '{"a": "<é&>", "b": null}'),  # not escaped for HTML
        ("{{ ['é'] | tojson(ensure_ascii=True) }}", '["\\u00e9"]'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1, sort_keys=True) }}", '{\n "a": [\n  2\n ],\n "b": 1\n}'),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "013",
        ),
        ("{% set n = namespace(x=1) %}{% for i in range(3) %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}", "4"),
        ("{% macro f(a) %}[{{ a ~ 1 }}]{% endmacro %}{{ f('x') * 2 }}", "[x1][x1]"),
        ("{{ messages[0]['content'] | trim | upper }}{{ '%s-%03d' % ('a', 5) }}{{ '{:>3}'.format('b') }}", "HIa-005  b"),
        ("{{ messages | map(attribute='role') | join(', ') }}{{ missing }}{{ missing is defined }}", "userFalse"),
        ("{{ dict(a=1).items() | list }}{{ 'x,y'.split(',') }}{{ 7 // 2 }}{{ 2 ** 3 }}", "[('a', 1)]['x', 'y']38"),
    ],
)
def test_templates_have_what_transformers_gives_them(source, expected):
    assert render(source) == expected


def test_the_date_is_todays():
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_generation_blocks_are_marked():
    source = "{% for m in messages %}u{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert render(source, ("<", ">")) == "u<hi>"
    assert render(source) == "uhi"


def test_a_templates_own_complaint_is_passed_on():
    with pytest.raises(UserError, match="the template refuses this conversation: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


DOUBLING = "{% set n = namespace(x='ab') %}{% for i in range(90) %}BODY{% endfor %}{{ n.x }}"
BIG = "{% set b = 'a' * 100000 %}"
HOSTILE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__globals__.datetime }}",
    "{{ '{0.__class__.__mro__}'.format(1).x() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ namespace(__class__=1) }}",
    "{{ namespace({'_x': 1}) }}",
    "{{ self.__init__.__globals__.a }}",
    "{{ lipsum(10) }}",
    "{% include 'x' %}",
    "{% import 'os' as o %}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% set a = range(1000) | list %}{% for i in a %}{% for j in a %}{% for k in a %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ 'a' * 10000000000 }}",
    "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    *[
        DOUBLING.replace("BODY", body)
        for body in (
            "{% set n.x = n.x + n.x %}",
            "{% set n.x = n.x ~ n.x %}",
            "{% set n.x = [n.x, n.x] %}",
            "{% set n.x = n.x | replace('a', 'aa') %}",
            "{% set n.x = n.x.replace('a', 'aa') %}",
            "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}",
        )
    ],
    "{% set n = namespace(x=3) %}{% for i in range(90) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ 'a' | center(10000000000) }}",
    "{{ 'a'.ljust(10000000000) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10000000000, 1) }}",
    "{{ '%10000000000d' | format(1) }}",
    "{{ '{:10000000000d}'.format(1) }}",
    "{{ '{:{}}'.format(1, '10000000000') }}",
    "{{ 'a\nb' | indent(10000000000) }}",
    "{{ [1, 2] | tojson(indent=10000000000) }}",
    BIG + "{{ ([b] * 100000) | join }}",
    BIG + "{{ ([b] * 100000) | map('upper') | join }}",
    BIG + "{{ ([b] * 100000) | tojson }}",
    BIG + "{{ b.join([b] * 1000) }}",
    "{% set l = [[[['a' * 999] * 999] * 999] * 999] %}{{ l }}",
    "{{ strftime_now('%Y' * 1000000) }}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_end_soon_in_one_clear_line(source):
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="the template") as raised:
        render(source)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 600_000  # kB


@pytest.mark.parametrize(
    "source",
    ["{{ x.__class__ }}", "{{ ''.format.__globals__ }}", "{{ messages | map(attribute='__class__') | first }}", "{{ cycler }}"],
)
def test_what_is_out_of_reach_reads_as_nothing(source):
    assert render(source, x="y") == ""


@pytest.mark.parametrize("source", ["{% for", "{{ " + "(" * 5000 + ")" * 5000 + " }}", "x" * (1 << 21), "{{ 'a' | nofilter }}"])
def test_what_is_no_template_is_named(source):
    with pytest.raises(UserError, match="the chat template the template "):
        render(source)


@given(st.text(), st.lists(st.text(), max_size=3))
def test_content_comes_through_as_it_is(content, more):
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ more | tojson }}"
    template = ChatTemplate(source, "t")
    assert template.render({"messages": [{"content": content}], "more": more}) == content + json.dumps(more, ensure_ascii=False)


def test_a_long_conversation_is_within_the_bounds():
    messages = [{"role": "user", "content": "word " * 200_000}] * 20
    source = "{% for m in messages %}<{{ m.role }}>{{ (m.content | trim).replace('<|im_end|>', '') + '\n' }}{% endfor %}"
    assert len(render(source, messages=messages)) > 19_000_000
