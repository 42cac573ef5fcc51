"""Conversations in a chat template: nothing of them is left away in silence."""

import pytest
from test_examples import right_padded, turns

from finetune.chat import check_known, checked_rendering, rendering
from finetune.fields import LeftOut

PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
STARTED = PLAIN + "{% if add_generation_prompt %}[assistant]{% endif %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)
FORGETS_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)
TRIMMED = PLAIN.replace("m.content", "m.content | trim")
SHOUTED = PLAIN.replace("m.content", "m.content | upper")
IN_TURNS = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m.content }}\n{% endfor %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}] "
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
    "{{ m.content + '\n' }}{% endfor %}"
)
FORGETS_TOOL = WITH_TOOLS.replace("in messages", "in messages if m.role != 'tool'")
THINKS = "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.content + '\n' }}{% endfor %}"
NEEDS_CONTENT = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"

SYSTEM = {"role": "system", "content": "Be kind."}
HI = turns("Hi", "Ho")
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "clock", "arguments": {}}}
THOUGHT = [HI[0], {**HI[1], "reasoning_content": "hm"}]
CALLING = [
    {"role": "user", "content": "Time?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "It is midday."},
]


@pytest.fixture
def chatting(demo_model):
    """Return a tokenizer with a chat template."""

    def make(template):
        tokenizer = right_padded(demo_model)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.mark.parametrize(
    ("template", "said", "tools", "text"),
    [
        (PLAIN, [SYSTEM, *HI], None, "[system] Be kind.\n[user] Hi\n[assistant] Ho\n"),
        (TRIMMED, turns(" Hi\n", "Ho "), None, "[user] Hi\n[assistant] Ho\n"),
        (SHOUTED, HI, None, "[user] HI\n[assistant] HO\n"),
        (NO_SYSTEM, HI, None, "[user] Hi\n[assistant] Ho\n"),
        (FORGETS_SYSTEM, HI, None, "[user] Hi\n[assistant] Ho\n"),
        (PLAIN, turns("Hi", ""), None, "[user] Hi\n[assistant] \n"),
        (NEEDS_CONTENT, HI, None, "userHiassistantHo"),
        (IN_TURNS, turns("a", "b", "c"), None, "a\nb\nc\n"),
        (PLAIN, HI, [], "[user] Hi\n[assistant] Ho\n"),
        (THINKS, THOUGHT, None, "Hi\nhmHo\n"),
        (PLAIN, [*THOUGHT, *HI], None, 2 * "[user] Hi\n[assistant] Ho\n"),
        (
            WITH_TOOLS,
            CALLING,
            TOOLS,
            '[{"type": "function", "function": {"name": "clock", "parameters": {}}}]'
            "[user] Time?\n[assistant] clock\n[tool] noon\n[assistant] It is midday.\n",
        ),
    ],
)
def test_a_conversation_is_rendered_whole(chatting, template, said, tools, text):
    assert checked_rendering(chatting(template), said, tools) == text


def test_the_beginning_of_an_answer_is_rendered_where_it_is_asked_for(chatting):
    tokenizer = chatting(STARTED)
    assert checked_rendering(tokenizer, HI[:1], None, True) == "[user] Hi\n[assistant]"
    assert checked_rendering(tokenizer, HI[:1], None) == "[user] Hi\n"


@pytest.mark.parametrize(
    ("template", "said", "tools", "reason"),
    [
        ("", HI, None, "of which the chat template renders nothing"),
        ("{% if false %}{{ messages }}{% endif %}\n", HI, None, "renders nothing"),
        (NO_SYSTEM, [SYSTEM, *HI], None, "the chat template refuses (System role not supported)"),
        (IN_TURNS, HI[1:], None, "that the chat template refuses (Roles must alternate)"),
        (FORGETS_SYSTEM, [SYSTEM, *HI], None, "with a turn of system, which the chat template lea"),
        (FORGETS_TOOL, CALLING, None, "with a turn of tool, which the chat template leaves away"),
        (PLAIN, CALLING, None, "with tool_calls, which the chat template does not know"),
        (PLAIN, HI, TOOLS, "with tools, which the chat template does not know"),
        (PLAIN, CALLING, TOOLS, "with tools, which the chat template does not know"),
        ("{% for m in messages %}", HI, None, "that the chat template refuses ("),
        ("{{ messages[9].content }}", HI, None, "that the chat template refuses ("),
        ("One text for all.", HI, None, "with a turn of user, which the chat template leaves"),
        (
            "{{ messages[-1].content }}",
            turns("Hello", "Ho"),
            None,
            "with a turn of user, which the chat template leaves away",
        ),
    ],
)
def test_what_a_template_does_not_take_is_told(chatting, template, said, tools, reason):
    with pytest.raises(LeftOut) as told:
        checked_rendering(chatting(template), said, tools)
    assert reason in str(told.value)


def test_a_turn_that_is_left_away_is_told_though_another_says_the_same(chatting):
    said = [{"role": "system", "content": "Hi"}, *turns("Hi there", "Ho")]
    with pytest.raises(LeftOut, match="with a turn of system"):
        checked_rendering(chatting(FORGETS_SYSTEM), said, None)


def test_the_reasoning_before_an_answer_is_known_or_the_row_is_left_out(chatting):
    with pytest.raises(LeftOut, match="with reasoning_content, which the chat template does not"):
        check_known(chatting(PLAIN), THOUGHT, None, "reasoning_content")
    check_known(chatting(THINKS), THOUGHT, None, "reasoning_content")
    check_known(chatting(PLAIN), HI, None, "reasoning_content")


def test_a_system_text_that_the_template_has_by_itself_is_there(chatting):
    """Without it the text would be the same, but with another it is not."""
    template = "{{ messages[0].content if messages[0].role == 'system' else 'Be kind.' }}" + PLAIN
    assert checked_rendering(chatting(template), [SYSTEM, *HI], None)


def test_what_is_rendered_alone_is_not_checked(chatting):
    said = [SYSTEM, *HI]
    assert rendering(chatting(FORGETS_SYSTEM), said, None) == "[user] Hi\n[assistant] Ho\n"
    with pytest.raises(LeftOut, match=r"refuses \(System role not supported\)"):
        rendering(chatting(NO_SYSTEM), said, None)
