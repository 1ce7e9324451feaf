"""Writes testing/golden/chat.json: chat templates of our own, in the styles that models use, and what transformers makes
of them.

Needs: pip install transformers jinja2
"""

import json
import pathlib

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

OUTPUT = pathlib.Path(__file__).parent.parent / "chat.json"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "tags": """{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}""",
    "first message": """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{%- if system_message %}
    {{- '[system]' ~ system_message ~ '\n\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- if loop.first %}
        {{- '>>' }}
    {%- endif %}
    {{- '[' + message.role + ' ' + loop.index | string + '/' + loop.length | string + '] ' }}
    {{- message.content.strip() + (eos_token if message.role == 'assistant' else '') }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '[assistant]' }}
{%- endif %}
""",
    "thinking": """{%- set ns = namespace(last=-1, multi=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and not (message.content.startswith('<tool>') and \
message.content.endswith('</tool>')) %}
        {%- set ns.multi = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '<assistant>\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<assistant>\n' + content }}
        {%- endif %}
    {%- else %}
        {{- '<' + message.role + '>\n' + content }}
    {%- endif %}
    {{- '</turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<assistant>\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}""",
    "tools and json": """{%- if tools is not none and tools %}tools!{% endif %}
{%- if documents %}documents!{% endif %}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- macro header(role) %}{{ '<' ~ role | upper ~ '>' }}{% endmacro %}
Date: {{ date_string }}
{% for message in messages %}
    {% if message.role not in ['user', 'assistant', 'system'] %}
        {{ raise_exception('Unknown role: ' + message.role) }}
    {% endif %}
    {% if message.content == 'skip' %}{% continue %}{% endif %}
    {% if message.content == 'stop' %}{% break %}{% endif %}
{{ header(message.role) }}{{ message | tojson }}
{{ {'a': [1, true, none], 'b': message.content} | tojson(indent=2) }}
    {%- for key, value in message.items() %} {{ key }}={{ value | length }}{% endfor %}

{% endfor %}
{# a comment #}
{%- generation -%} {{ pad_token }}{{ unknown_name }} end {%- endgeneration -%}
""",
}

CHATS = {
    "one": [("user", "Hello")],
    "system": [("system", "  Be brief.\n"), ("user", " What is <b> & \"c\"? "), ("assistant", "An é 🙂."), ("user", "Why?\n")],
    "thinking": [("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c"),
                 ("assistant", "<think>\nso\n</think>\n\nd")],
    "skips": [("user", "x"), ("assistant", "skip"), ("user", "y"), ("assistant", "stop"), ("user", "z")],
    "bad order": [("assistant", "first"), ("user", "second")],
    "unknown role": [("tool", "1")],
    "empty": [("user", "")],
}


def main():
    cases = []
    for template_name, template in TEMPLATES.items():
        compiled = _compile_jinja_template(template)
        for chat_name, chat in CHATS.items():
            messages = [{"role": role, "content": content} for role, content in chat]
            for generation in [False, True]:
                case = {"template": template_name, "chat": chat_name, "add_generation_prompt": generation}
                try:
                    case["text"] = compiled.render(
                        messages=messages, tools=None, documents=None, add_generation_prompt=generation, **TOKENS)
                except jinja2.exceptions.TemplateError as error:
                    case["refused"] = str(error)
                cases.append(case)
    chats = {name: [{"role": role, "content": content} for role, content in chat] for name, chat in CHATS.items()}
    document = {"tokens": TOKENS, "templates": TEMPLATES, "chats": chats, "cases": cases}
    OUTPUT.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
