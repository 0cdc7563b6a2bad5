# SPDX-License-Identifier: Apache-2.0
"""Writes a conversation template as the Jinja chat template with which transformers, vLLM and others render messages.

Messages have transformers' form. `content` is a text, in which `<image>` stands for an image as in a record, or a list
of parts; an image part is followed by a newline unless it is the last part, as in LLaVA's records.
"""

from __future__ import annotations

import json
import re

from megatron_smar.data.conversations import IMAGE_TAG, ConversationTemplate
from megatron_smar.data.tokens import EOS, IMAGE_CONTEXT

_TOKENS = re.compile(r"(\{eos\}|\{\[/?\w+\]\}|\{text\}|\{system_text\}|\{system\})")


def chat_template(template: ConversationTemplate, puts_space: bool) -> str:
    """Writes a conversation template in Jinja.

    Args:
        template: The conversation template.
        puts_space: Whether the tokenizer puts a space in front of a text. It puts none after a special token, so the
            Jinja template writes the space itself.
    """
    with_images = template.default_system_with_images
    default = _quoted(template.default_system)
    if with_images is not None:
        default = f"({_quoted(with_images)} if ns.pictures else {default})"
    specials = [IMAGE_CONTEXT, *template.special_tokens]
    begins_with_special = " or ".join(
        [
            *(f"ns.out.startswith({_quoted(token)})" for token in specials),
            "(eos_token and ns.out.startswith(eos_token))",
        ]
    )
    front = f"{{{{ '' if not ns.out or {begins_with_special} else ' ' }}}}" if puts_space else ""
    space_before_answer = template.assistant.startswith(" ")
    answer = _expression(template.assistant.removeprefix(" "), text="text")
    lines = [
        "{%- macro text_of(content) -%}",
        "{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}",
        f"{{%- if part.type == 'text' -%}}{{{{ part.text }}}}{{%- else -%}}{{{{ {_quoted(IMAGE_TAG)} }}}}",
        "{%- if not loop.last -%}{{ '\\n' }}{%- endif -%}{%- endif -%}{%- endfor -%}{%- endif -%}",
        "{%- endmacro -%}",
        "{%- set ns = namespace(out='', system='', pictures=false, asked=-1, shown=-1) -%}",
        "{%- for message in messages -%}",
        "{%- if message.role not in ['system', 'user', 'assistant'] -%}",
        "{{ raise_exception('The roles are system, user and assistant.') }}{%- endif -%}",
        f"{{%- if {_quoted(IMAGE_TAG)} in text_of(message.content) -%}}{{%- set ns.pictures = true -%}}{{%- endif -%}}",
        "{%- if message.role == 'user' -%}",
        "{%- set ns.asked = loop.index0 -%}"
        if template.system_in_last
        else "{%- if ns.asked < 0 -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}",
        "{%- endif -%}{%- endfor -%}",
        f"{{%- set ns.system = text_of(messages[0].content) if messages[0].role == 'system' else {default} -%}}",
        "{%- for message in messages -%}",
        "{%- set text = text_of(message.content) -%}",
        "{%- if message.role == 'user' -%}",
        "{%- set with_system = loop.index0 == ns.asked and ns.system.strip() != '' -%}",
        *_user_text(template),
        f"{{%- set system = {_expression(template.system, system_text='ns.system')} if with_system else '' -%}}",
        f"{{%- if ns.out -%}}{{%- set ns.out = ns.out ~ {_expression(template.between)} -%}}{{%- endif -%}}",
        f"{{%- set ns.out = ns.out ~ {_expression(template.user, text='ns.shown', system='system')} -%}}",
        "{%- elif message.role == 'assistant' -%}",
        "{%- set text = text.rstrip(' ') -%}" if template.strips_answers else "",
        "{%- if ns.out -%}{%- set ns.out = ns.out ~ ' ' -%}{%- endif -%}" if space_before_answer else "",
        f"{{%- set ns.out = ns.out ~ {answer} -%}}",
        "{%- endif -%}{%- endfor -%}",
        f"{{{{ bos_token if bos_token else '' }}}}{front}{{{{ ns.out }}}}",
    ]
    return "\n".join(line for line in lines if line)


def _user_text(template: ConversationTemplate) -> list[str]:
    """Returns lines that write a user's text into `ns.shown`, with images as the placeholder the processor expects."""
    tag, picture = _quoted(IMAGE_TAG), _quoted(IMAGE_CONTEXT)
    if not template.keeps_user_text:
        return [f"{{%- set ns.shown = {picture} * (text.split({tag}) | length - 1) -%}}"]
    lines = [f"{{%- set runs = text.split({tag}) -%}}"]
    if template.image_first:
        lines.append(
            "{%- if runs | length == 2 and runs[1] == '' -%}{%- set runs = [runs[1], runs[0]] -%}{%- endif -%}"
        )
    front = _quoted(template.front)
    if template.front and not template.system_apart:
        front = f"('' if with_system and runs | length == 1 else {front})"
    return [
        *lines,
        "{%- set ns.shown = '' -%}{%- for run in runs -%}",
        f"{{%- set ns.shown = ns.shown ~ ('' if loop.first else {picture}) ~ ({front} ~ run if run else '') -%}}",
        "{%- endfor -%}",
    ]


def _expression(pattern: str, **names: str) -> str:
    """Returns a template's pattern as a Jinja expression, with a variable for each text in it."""
    parts = []
    for part in _TOKENS.split(pattern):
        if part == EOS:
            parts.append("eos_token")
        elif part[1:-1] in names and part.startswith("{"):
            parts.append(names[part[1:-1]])
        elif part:
            parts.append(_quoted(part[1:-1] if part.startswith("{[") else part))
    return " ~ ".join(parts) or "''"


def _quoted(text: str) -> str:
    """Returns a text as a Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)
