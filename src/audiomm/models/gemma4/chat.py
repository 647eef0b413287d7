"""A chat template for Gemma 4 checkpoints that bring none: turns, media, thoughts, tools and their results.

It writes what the published templates write, from a description of their output; a checkpoint's own comes first.
"""

from __future__ import annotations

_MACROS = r"""
{%- macro quoted(text) -%}<|"|>{{ text }}<|"|>{%- endmacro -%}
{%- macro value_of(value, quote_keys) -%}
  {%- if value is string -%}{{ quoted(value) }}
  {%- elif value is boolean -%}{{ 'true' if value else 'false' }}
  {%- elif value is mapping -%}{{ '{' }}{{ pairs_of(value, quote_keys) }}{{ '}' }}
  {%- elif value is sequence -%}[{% for item in value %}{{ value_of(item, quote_keys) }}
      {{- ',' if not loop.last else '' }}{% endfor %}]
  {%- else -%}{{ value }}
  {%- endif -%}
{%- endmacro -%}
{%- macro pairs_of(values, quote_keys) -%}
  {%- for key, value in values | dictsort -%}
    {{ quoted(key) if quote_keys else key }}:{{ value_of(value, quote_keys) }}{{ ',' if not loop.last else '' }}
  {%- endfor -%}
{%- endmacro -%}
{%- macro names_of(names) -%}[{% for name in names %}{{ quoted(name) }}{{ ',' if not loop.last else '' }}
{%- endfor %}]{%- endmacro -%}
{%- macro kind_of(schema) -%}
  {%- set kind = schema.type if schema.type is string else schema.type | first -%}
  type:{{ quoted(kind | upper) }}
{%- endmacro -%}
{%- macro fields_of(properties) -%}
  {%- set skipped = ['description', 'type', 'properties', 'required', 'nullable'] -%}
  {%- set kept = properties | dictsort | rejectattr(0, 'in', skipped) | list -%}
  {%- for name, schema in kept -%}
    {{ name }}:{{ '{' }}
    {%- set parts = namespace(some=false) -%}
    {%- if schema.description -%}description:{{ quoted(schema.description) }}{% set parts.some = true %}{%- endif -%}
    {%- if schema.nullable -%}{{ ',' if parts.some else '' }}nullable:true{% set parts.some = true %}{%- endif -%}
    {%- set kind = (schema.type if schema.type is string else schema.type | first) | upper -%}
    {%- if kind == 'STRING' and schema.enum -%}
      {{ ',' if parts.some else '' }}enum:{{ value_of(schema.enum, true) }}{% set parts.some = true %}
    {%- elif kind == 'OBJECT' -%}
      ,properties:{{ '{' }}{{ fields_of(schema.properties if schema.properties is mapping else schema) }}{{ '}' }}
      {{- ',required:' ~ names_of(schema.required) if schema.required else '' }}
    {%- elif kind == 'ARRAY' and schema['items'] is mapping and schema['items'] -%}
      ,items:{{ '{' }}{{ items_of(schema['items']) }}{{ '}' }}
    {%- endif -%}
    {{ ',' if parts.some else '' }}{{ kind_of(schema) }}{{ '}' }}
    {{- ',' if not loop.last else '' }}
  {%- endfor -%}
{%- endmacro -%}
{%- macro items_of(schema) -%}
  {%- for key, value in schema | dictsort | rejectattr(1, 'none') -%}
    {{ key }}:
    {%- if key == 'properties' -%}{{ '{' }}{{ fields_of(value) if value is mapping else '' }}{{ '}' }}
    {%- elif key == 'required' -%}{{ names_of(value) }}
    {%- elif key == 'type' -%}{{ value_of(value | upper if value is string else value | map('upper') | list, true) }}
    {%- else -%}{{ value_of(value, true) }}
    {%- endif -%}
    {{ ',' if not loop.last else '' }}
  {%- endfor -%}
{%- endmacro -%}
{%- macro declaration_of(function) -%}
  declaration:{{ function.name }}{{ '{' }}description:{{ quoted(function.description) }}
  {%- set parameters = function.parameters -%}
  {%- if parameters -%}
    ,parameters:{{ '{' }}
    {{- 'properties:{' ~ fields_of(parameters.properties) ~ '},' if parameters.properties else '' }}
    {{- 'required:' ~ names_of(parameters.required) ~ ',' if parameters.required else '' }}
    {{- 'type:' ~ quoted(parameters.type | upper) ~ '}' if parameters.type else '' }}
  {%- endif -%}
  {{ '}' }}
{%- endmacro -%}
{%- macro answer_of(text) -%}
  {%- set kept = namespace(text='') -%}
  {%- for piece in text.split('<channel|>') -%}
    {%- set kept.text = kept.text ~ piece.split('<|channel>')[0] -%}
  {%- endfor -%}
  {{ kept.text | trim }}
{%- endmacro -%}
{%- macro words_of(message, is_model) -%}
  {%- if message.content is string -%}
    {{ answer_of(message.content) if is_model else message.content | trim }}
  {%- else -%}
    {%- for part in message.content or [] -%}
      {%- if part.type == 'text' -%}{{ answer_of(part.text) if is_model else part.text | trim }}
      {%- elif part.type == 'audio' -%}<|audio|>
      {%- elif part.type in ['image', 'video'] -%}{{ '\n\n<|' ~ part.type ~ '|>\n\n' }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro result_of(name, result) -%}
  <|tool_response>response:{{ name }}{{ '{' }}
  {{- pairs_of(result, false) if result is mapping else 'value:' ~ value_of(result, false) }}
  {{- '}' }}<tool_response|>
{%- endmacro -%}
"""

_CHAT = r"""
{{- bos_token }}
{%- set thinks = enable_thinking is defined and enable_thinking -%}
{%- set has_system = messages[0].role in ['system', 'developer'] -%}
{%- if thinks or tools or has_system -%}
  {{ '<|turn>system\n' }}{{ '<|think|>\n' if thinks else '' }}
  {{- words_of(messages[0], false) if has_system else '' }}
  {%- for tool in tools or [] -%}<|tool>{{ declaration_of(tool.function) | trim }}<tool|>{%- endfor -%}
  {{ '<turn|>\n' }}
{%- endif -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- set seen = namespace(user=-1, open=false, calls=[]) -%}
{%- for message in turns -%}
  {%- if message.role == 'user' -%}{%- set seen.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in turns -%}
  {%- if message.role == 'tool' -%}
    {%- set name = namespace(text=message.name or 'unknown') -%}
    {%- for call in seen.calls if call.id and call.id == message.tool_call_id -%}
      {%- set name.text = call.function.name -%}
    {%- endfor -%}
    {{ result_of(name.text, message.content) }}
    {%- set seen.open = true -%}
  {%- else -%}
    {%- set is_model = message.role in ['assistant', 'model'] -%}
    {%- if seen.open and not is_model -%}{{ '<turn|>\n' }}{%- endif -%}
    {%- if not (seen.open and is_model) -%}{{ '<|turn>' ~ ('model' if is_model else message.role) ~ '\n' }}{%- endif -%}
    {%- set seen.open = false -%}
    {%- if message.reasoning_content and message.tool_calls and loop.index0 > seen.user -%}
      {{ '<|channel>thought\n' ~ message.reasoning_content ~ '<channel|>' }}
    {%- endif -%}
    {%- set seen.calls = message.tool_calls or [] -%}
    {%- for call in seen.calls -%}
      {%- set arguments = call.function.arguments -%}
      <|tool_call>call:{{ call.function.name }}{{ '{' }}
      {{- pairs_of(arguments, false) if arguments is mapping else arguments or '' }}{{ '}' }}<tool_call|>
    {%- endfor -%}
    {%- for response in message.tool_responses or [] -%}
      {{ result_of(response.name or 'unknown', response.response) }}
    {%- endfor -%}
    {{ words_of(message, is_model) }}
    {%- set waits = message.tool_calls and loop.nextitem is defined and loop.nextitem.role == 'tool' -%}
    {%- if waits or (message.tool_responses and not message.content) -%}
      {%- set seen.open = true -%}
    {%- else -%}{{ '<turn|>\n' }}
    {%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{ '' if seen.open else '<|turn>model\n' }}
  {{- '' if thinks else '<|channel>thought\n<channel|>' }}
{%- endif -%}
"""

CHAT_TEMPLATE = (_MACROS + _CHAT).strip("\n")
