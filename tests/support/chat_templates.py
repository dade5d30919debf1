"""Chat templates in the manner of well-known ones, each with something that only a faithful renderer gets right."""

from __future__ import annotations

CHATML = """\
{%- if messages[0].role == 'system' %}
    {{- '<s>system\\n' + messages[0].content + '</s>\\n' }}
{%- else %}
    {{- '<s>system\\nYou help.</s>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ['user', 'assistant'] or (message.role == 'system' and not loop.first) %}
        {{- '<s>' + message.role + '\\n' + message.content + '</s>' + '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<s>tool ' + message | tojson + '</s>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}{%- endif %}
"""

LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" ~ "Today: " ~ date_string ~ "\\n\\n" ~ system_message ~ eos_token }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n'+ message['content'] | trim + eos_token }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
        {{- message.tool_calls[0].function.arguments | tojson(indent=2) }}{{- "}" }}
    {%- else %}
        {{- message.content | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<turn>' + role + '
' + message['content'] | trim + '<end>
' }}{% endfor %}
{% if add_generation_prompt %}{{'<turn>model
'}}{% endif %}"""

MISTRAL = """\
{%- set ns = namespace(index=0, last=-1) -%}
{%- macro show(content) -%}
    {%- if content is string -%}{{ content }}{%- else -%}
        {%- for block in content -%}
            {%- if block.type == 'text' -%}{{ block['text'] }}{%- else -%}[IMG]{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages[::-1] | list | reverse -%}
    {%- if message.role == 'system' %}{%- continue %}{%- endif -%}
    {%- if loop.index > 40 %}{%- break %}{%- endif -%}
    {%- if message.role == 'user' -%}
        [INST] {{ show(message.content) }} [/INST]
        {%- if loop.index0 == ns.last %} (last of {{ loop.length }}){% endif %}
    {%- else -%}
        {% generation %}
            {{- ' ' + show(message.content).split('</think>')[-1].lstrip('\\n') + eos_token }}
        {% endgeneration %}
    {%- endif -%}
    {%- set ns.index = ns.index + 1 -%}
{%- endfor -%}
{{- "" if ns.index else "empty" }} {{ ns.index * 2 }} {{ "%02d" % ns.index }}
{{ messages | map(attribute='role') | join(',') }}
"""

THINKING = """\
{%- for m in messages recursive %}
{{ m.role|upper }}:{% if m.reasoning_content is defined %} ({{ m.reasoning_content }}){% endif %} {{ m.content }}
{%- endfor %}
{% set d = dict(a=1, b=[1, 2.5, none, true]) %}{{ d | tojson }} {{ d.items() | list }} {{ 'x' * 3 }}
{% for k, v in d.items() if v is number %}{{ k }}={{ v }}{% else %}none{% endfor %} {{ tools is none }}
{{ documents }} {{ enable_thinking is defined }}
"""

KEEPING = """\
{%- set ns = namespace(all=[], text='', last=messages|length - 1) %}
{%- macro show(a, b, names={}) %}{{ names.get(a, a) }}: {{ b }}{% endmacro %}
{%- for m in messages %}
    {%- set ns.all = ns.all + [m] %}{%- set ns.text = ns.text ~ m.role ~ ' ' %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
        {%- set content = thought + content.rsplit('</think>', 1)[1] %}
    {%- endif %}
    {{- show(m.role, content, names={'assistant': 'model'}) }}
    {%- for call in m.tool_calls or [] if call.function %}
        {{- '<call>{"name": "%s", "arguments": %s}' % (call.function.name, call.function.arguments | tojson) }}
    {%- endfor %}
    {%- for later in messages[loop.index:loop.index + 2] %} {{ later.role }}{%- endfor %}
{%- endfor %}
{{ ns.all | selectattr('role', 'equalto', 'user') | list | length }} {{ ns.all | map(attribute='role') | join('+') }}
{{ '{:>6}|{}: {}'.format(ns.last, 'a', messages[0].role) }} {{ '%5.1f' % 2.25 }}
{{ 2.25 | round(1) }} {{ ns.text|title }}
{% set d = {'b': [1, {'c': none}], 'a': messages[0]} %}{{ d | tojson(indent=4) }} {{ d | dictsort | length }}
{% set x %}one
two {{ messages | length }}{% endset %}{{ x | indent(4) }} {{ x | replace('o', '0') }}
{{ d.keys() | sort | join(", ") }}
{% for k, v in d | items %}{{ k }}{% endfor %} {{ messages | map(attribute='role') | unique | list }}
{{ [3, 1] | min }}
"""

TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "thinking": THINKING,
    "keeping": KEEPING,
}
