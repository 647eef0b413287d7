"""Gemma3nProcessor: text, pictures and clips to what Gemma 3n reads.

Every picture costs 256 tokens and every clip 188, however large or long, and stands between two blank lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from ...base.chat import TYPED_START
from ...base.errors import ConfigError
from ...feature_extraction.image import SiglipImageProcessor
from ...feature_extraction.multimodal import MultimodalProcessor
from ...feature_extraction.usm import Gemma3nAudioFeatureExtractor
from .tokenizer import GemmaTokenizer

#: For checkpoints that bring no template: turns that alternate, the system's text in front of the first.
_TEMPLATE = """\
{{ bos_token }}
{%- set first = messages[0] -%}
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if first.role in ['system', 'developer'] -%}
  {%- set turns = messages[1:] -%}
  {%- set said = first.content if first.content is string else first.content | selectattr('type', 'equalto', 'text')
      | map(attribute='text') | join('\\n') -%}
  {%- set system = said ~ '\\n\\n' -%}
{%- endif -%}
{%- for turn in turns -%}
  {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('roles must alternate: user, assistant, user, ...') }}
  {%- endif -%}
  {{ '<start_of_turn>' ~ ('model' if turn.role == 'assistant' else turn.role) ~ '\\n' }}
  {{- system if loop.first else '' }}
  {%- if turn.content is string -%}
    {{ turn.content | trim }}
  {%- else -%}
    {%- for part in turn.content -%}
      {{ {'image': '<image_soft_token>', 'audio': '<audio_soft_token>'}.get(part.type, '') }}
      {{- part.text | trim if part.type == 'text' else '' }}
    {%- endfor -%}
  {%- endif -%}
  {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{{ '<start_of_turn>model\\n' if add_generation_prompt else '' }}"""


class Gemma3nProcessor(MultimodalProcessor):
    """Text with media to inputs of Gemma 3n; the call and the chats are `MultimodalProcessor`'s.

    A mark is `<image_soft_token>` or `<audio_soft_token>`; a lonely `<start_of_image>` or `<start_of_audio>`, which
    other libraries write, counts as one too.

    Args:
        feature_extractor: A Gemma3nAudioFeatureExtractor.
        image_processor: A SiglipImageProcessor.
        tokenizer: A GemmaTokenizer.
        chat_template: jinja2 text; None is the tokenizer's.
        audio_seq_length: Tokens of a clip.
        image_seq_length: Tokens of a picture.

    Raises:
        TypeError: A part is missing or of another class.
        ConfigError: The vocabulary lacks a token that stands for media.
    """

    attributes: ClassVar[tuple[str, ...]] = ("feature_extractor", "image_processor", "tokenizer")
    settings: ClassVar[dict[str, Any]] = {"audio_seq_length": 188, "image_seq_length": 256}
    feature_extractor_class: ClassVar[type[Gemma3nAudioFeatureExtractor]] = Gemma3nAudioFeatureExtractor
    image_processor_class: ClassVar[type[SiglipImageProcessor]] = SiglipImageProcessor
    tokenizer_class: ClassVar[type[GemmaTokenizer]] = GemmaTokenizer
    type_ids_name: ClassVar[str] = "token_type_ids"
    fallback_template: ClassVar[str] = _TEMPLATE

    feature_extractor: Gemma3nAudioFeatureExtractor
    tokenizer: GemmaTokenizer
    audio_seq_length: int
    image_seq_length: int

    def __init__(
        self,
        feature_extractor: Gemma3nAudioFeatureExtractor,
        image_processor: SiglipImageProcessor,
        tokenizer: GemmaTokenizer,
        chat_template: str | None = None,
        audio_seq_length: int = 188,
        image_seq_length: int = 256,
    ) -> None:
        super().__init__(
            feature_extractor,
            image_processor,
            tokenizer,
            chat_template=chat_template,
            audio_seq_length=audio_seq_length,
            image_seq_length=image_seq_length,
        )
        missing = [name for name in GemmaTokenizer.media_tokens if getattr(tokenizer, name, None) is None]
        if missing:
            raise ConfigError(f"the tokenizer has no {', '.join(missing)}; is it that of another model?")
        # Told apart from the marks inside an expanded block, which follow their beginning at once.
        self._lonely = {
            re.compile(f"(?<!{TYPED_START}){re.escape(begin)}(?!{re.escape(mark)})"): mark
            for begin, mark in (
                (tokenizer.boi_token, tokenizer.image_token),
                (tokenizer.boa_token, tokenizer.audio_token),
            )
        }

    @property
    def boi_token(self) -> str:
        """What begins a picture."""
        return str(self.tokenizer.boi_token)

    @property
    def boa_token(self) -> str:
        """What begins a clip."""
        return str(self.tokenizer.boa_token)

    @property
    def full_image_sequence(self) -> str:
        """What takes the place of a picture's mark."""
        tokens = self.tokenizer.image_token * self.image_seq_length
        return f"\n\n{self.boi_token}{tokens}{self.tokenizer.eoi_token}\n\n"

    @property
    def full_audio_sequence(self) -> str:
        """What takes the place of a clip's mark."""
        tokens = self.tokenizer.audio_token * self.audio_seq_length
        return f"\n\n{self.boa_token}{tokens}{self.tokenizer.eoa_token}\n\n"

    def image_text(self, features: Mapping[str, Any], index: int) -> str:
        """What takes the place of the mark of image `index`: the same for all."""
        return self.full_image_sequence

    def audio_text(self, features: Mapping[str, Any], index: int) -> str:
        """What takes the place of the mark of clip `index`: the same for all."""
        return self.full_audio_sequence

    def _with_marks(self, text: str) -> str:
        for pattern, mark in self._lonely.items():
            text = pattern.sub(mark, text)
        return text
