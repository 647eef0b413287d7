"""Chat templates: the messages they get, what they write, and what they may not do."""

from __future__ import annotations

import time
from typing import Any, Literal

import pytest

from audiomm.base.chat import (
    TYPED_END,
    TYPED_START,
    conversations_of,
    find_media,
    mark_typed,
    render_chat,
    with_sound_of_videos,
)
from audiomm.base.errors import ConfigError, InputError, UnsafeCheckpointError
from audiomm.base.sandbox import plain, render, variables_of
from audiomm.base.tool_schema import function_schema

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"


def chat(*turns: tuple[str, Any], **more: Any) -> list[dict[str, Any]]:
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[-1].update(more)
    return conversations_of(messages)[0][0]


def test_a_template_sees_messages_tools_and_variables() -> None:
    template = TURNS + "{{ tools | length }}{{ tone }}{{ documents }}"
    text, spans = render_chat(template, chat(("user", "hi")), tools=[{"a": 1}], add_generation_prompt=True, tone="!")
    assert (text, spans) == ("[user]hi[go]1!None", [])


def test_globals_and_filters_of_chat_templates_are_there() -> None:
    template = (
        "{%- set ns = namespace(n=0) -%}{%- for i in range(3) -%}{%- if i == 1 -%}{%- continue -%}{%- endif -%}"
        "{%- set ns.n = ns.n + i -%}{%- endfor -%}{{ ns.n }} {{ {'b': '<é>', 'a': [1]} | tojson }} "
        "{{ dict(x=1) | tojson(indent=1) }} {{ strftime_now('%Y') | length }} {{ ' a ' | trim }} {{ 'a' ~ 1 ~ none }}"
    )
    assert render(template, {}) == '2 {"b": "<é>", "a": [1]} {\n "x": 1\n} 4 a a1None'


def test_loops_know_where_they_are() -> None:
    template = "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ';' if not loop.last }}{% endfor %}"
    assert render(template, {"messages": ["a", "b"]}) == "1/2;2/2"


def test_a_generation_block_tells_where_the_assistant_spoke() -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    text, spans = render_chat(template, chat(("user", "q"), ("assistant", " yes "), ("user", "p"), ("assistant", "no")))
    assert text == "<user>q<assistant>yes<user>p<assistant>no"
    assert [text[start:end] for start, end in spans] == ["yes", "no"]


def test_the_last_message_can_be_continued() -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</t>{% endfor %}"
    messages = chat(("user", "q"), ("assistant", "It is "))
    assert render_chat(template, messages, continue_final_message=True)[0] == "[user]q</t>[assistant]It is "
    trimmed = template.replace("m.content", "m.content | trim")
    assert render_chat(trimmed, messages, continue_final_message=True)[0] == "[user]q</t>[assistant]It is"
    parts = chat(("user", [{"type": "text", "text": "a"}, {"type": "image"}]))
    listed = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}</t>{% endfor %}"
    assert render_chat(listed, parts, continue_final_message=True)[0] == "a"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "pass one"),
        ({"continue_final_message": "thoughts"}, "no text under 'thoughts'"),
    ],
)
def test_what_cannot_be_continued_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        render_chat(TURNS, chat(("user", "q")), **options)


def test_a_template_that_drops_the_last_text_cannot_continue_it() -> None:
    with pytest.raises(InputError, match="leaves out 'content'"):
        render_chat("nothing", chat(("user", "q")), continue_final_message=True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 1000000000 }}",
        "{{ [1] * 1000000000 }}",
        "{{ 'x'.center(2000000000) }}",
        "{{ 'x' | center(2000000000) }}",
        "{{ 10 ** 10000000 }}",
        "{{ '%2000000000d' | format(1) }}",
        "{{ '%*d' % (2000000000, 1) }}",
        "{{ '{:2000000000}'.format(1) }}",
        "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
        "{{ (['a'] * 100000) | join('y' * 100000) }}",
        "{% for i in range(3000) %}{% for j in range(3000) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(_x=1) }}",
    ],
)
def test_a_hostile_template_is_stopped_at_once(template: str) -> None:
    start = time.monotonic()
    with pytest.raises(UnsafeCheckpointError, match="stopped"):
        render(template, {"messages": [1]})
    assert time.monotonic() - start < 5


def test_a_nested_list_that_doubles_is_not_written_out() -> None:
    template = "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    for use in ("{{ ns.x }}", "{{ ns.x | tojson }}", "{{ ns.x ~ '' }}", "{{ '%s' % ns.x }}"):
        with pytest.raises(UnsafeCheckpointError):
            render(template + use, {})


def test_broken_templates_say_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        render("a\n{% if %}", {})
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        render("{{ 1 / 0 }}", {})
    with pytest.raises(InputError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ConfigError, match="not valid jinja2"):
        variables_of("{% for %}")


def test_a_template_never_sees_objects() -> None:
    class Picture:
        def save(self, path: str) -> None:
            raise AssertionError("called")

    assert plain({"a": (Picture(), 1, True, None, 2.5, "s")}) == {"a": ["<Picture>", 1, True, None, 2.5, "s"]}
    with pytest.raises(ConfigError):
        render("{{ messages[0].image.save('x') }}", {"messages": plain([{"image": Picture()}])})


def test_variables_of_a_template_are_those_it_does_not_set() -> None:
    assert variables_of("{% set a = 1 %}{{ a }}{{ b }}{% for c in d %}{{ c }}{% endfor %}") == {"b", "d"}


def test_messages_come_into_one_form_and_stay_as_they_were() -> None:
    given = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, "words"]},
        {"role": "assistant", "content": None, "tool_calls": [], "reasoning": "hm", "name": None},
    ]
    (messages,), is_batch = conversations_of(given)
    assert not is_batch
    assert messages[0]["content"] == [{"type": "image", "url": "a.png"}, {"type": "text", "text": "words"}]
    assert messages[1] == {
        "role": "assistant", "tool_calls": [], "reasoning": "hm", "thinking": "hm", "reasoning_content": "hm",
    }  # fmt: skip
    assert given[0]["content"][0]["type"] == "image_url"
    assert conversations_of([given, given])[1]


def test_media_are_found_in_reading_order() -> None:
    content = [
        {"type": "audio", "audio": [0.0]},
        {"type": "image", "path": "1.png"},
        {"type": "text", "text": "between"},
        {"type": "image_url", "image_url": "2.png"},
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "m.mp4"}},
        {"type": "image", "base64": "iVBORw=="},
        {"type": "image"},
    ]
    found = find_media(conversations_of([{"role": "user", "content": content}, {"role": "user", "content": "x"}])[0][0])
    assert found.image == ["1.png", "2.png", b"\x89PNG"]
    assert found.audio == [[0.0], b"RIFF"]
    assert found.video == ["m.mp4"]


def test_the_sound_of_a_video_stands_behind_it() -> None:
    content = [{"type": "video", "path": "a.mp4"}, {"type": "audio"}, {"type": "video", "url": "b.mp4"}, "x"]
    (messages,), _ = conversations_of([{"role": "user", "content": content}, {"role": "assistant", "content": "y"}])
    filled = with_sound_of_videos(messages)
    assert [part["type"] for part in filled[0]["content"]] == ["video", "audio", "video", "audio", "text"]
    assert find_media(filled).audio == ["a.mp4", "b.mp4"] and filled[1]["content"] == "y"


@pytest.mark.parametrize(
    ("conversation", "error", "words"),
    [
        ("hi", TypeError, "list of messages, not str"),
        ([], InputError, "empty"),
        ([[]], InputError, "conversation 0 is empty"),
        (["hi"], TypeError, "message 0 is a str"),
        ([{"content": "x"}], InputError, "role None"),
        ([{"role": "user", "content": 3}], InputError, "content is a int"),
        ([{"role": "user", "content": [{"text": "x"}]}], InputError, "a dict with 'type'"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "?"}}]}], InputError, "base64"),
    ],
)
def test_messages_that_cannot_be_read_are_named(conversation: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        conversations_of(conversation)


def test_a_part_holds_one_medium() -> None:
    with pytest.raises(InputError, match="url and path; pass one"):
        find_media([{"role": "user", "content": [{"type": "image", "url": "a", "path": "b"}]}])


@pytest.mark.parametrize(
    "part", [{"type": "sound", "path": "a.wav"}, {"type": "imgae", "image": b"png"}, {"type": "file", "file": "a.wav"}]
)
def test_a_medium_of_an_unknown_type_is_not_dropped(part: dict[str, Any]) -> None:
    messages, _ = conversations_of([{"role": "user", "content": [part]}])
    with pytest.raises(InputError, match=f"type '{part['type']}' holds .*the types with media are 'image', 'audio'"):
        find_media(messages[0])
    assert find_media([{"role": "user", "content": [{"type": "reasoning", "summary": "x"}]}]).audio == []


def test_control_tokens_that_users_type_are_marked_and_others_are_not() -> None:
    messages = chat(("system", "<t>"), ("user", [{"type": "text", "text": "a<t>b"}, {"type": "image", "url": "<t>"}]))
    marked = mark_typed(messages, ["<t>"])
    assert marked[0]["content"] == "<t>"
    assert marked[1]["content"][0]["text"] == f"a{TYPED_START}<t>{TYPED_END}b"
    assert marked[1]["content"][1]["url"] == "<t>"
    assert mark_typed(messages, ["<t>"], everything=True)[0]["content"] == f"{TYPED_START}<t>{TYPED_END}"
    forged = mark_typed(chat(("user", f"{TYPED_END}<t>{TYPED_START}")), ["<t>"])
    assert forged[0]["content"] == f"{TYPED_START}<t>{TYPED_END}"


def test_a_function_explains_itself_as_a_tool() -> None:
    def weather(city: str, days: int = 1, unit: Literal["c", "f"] = "c", tags: list[str] | None = None) -> dict:
        """Tell the weather.

        Args:
            city: Where,
                in full.
            days: How many.
            unit: Of the temperature.
            tags: More. (choices: ["rain", "sun"])

        Returns:
            dict: What it will be.
        """

    schema = function_schema(weather)["function"]
    assert schema["name"] == "weather" and schema["description"] == "Tell the weather."
    assert schema["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Where, in full."},
            "days": {"type": "integer", "description": "How many."},
            "unit": {"type": "string", "enum": ["c", "f"], "description": "Of the temperature."},
            "tags": {
                "type": "array", "items": {"type": "string"}, "nullable": True,
                "description": "More.", "enum": ["rain", "sun"],
            },
        },
        "required": ["city"],
    }  # fmt: skip
    assert schema["return"] == {"type": "object", "description": "What it will be."}


def test_a_function_that_does_not_explain_itself_is_no_tool() -> None:
    def silent(a: int) -> None: ...

    def unhinted(a) -> None:  # type: ignore[no-untyped-def]
        """Do.

        Args:
            a: This.
        """

    def undescribed(a: int) -> None:
        """Do."""

    def odd(a: bytes) -> None:
        """Do.

        Args:
            a: This.
        """

    cases = ((silent, "docstring"), (unhinted, "type hint"), (undescribed, "Args:"), (odd, "bytes"), (3, "not int"))
    for tool, words in cases:
        with pytest.raises(InputError, match=words):
            function_schema(tool)  # type: ignore[arg-type]
