"""WhisperForConditionalGeneration: Whisper with its head and generate().

Arguments and return values are those of transformers' generate(); the loop behind them is in `transcription.py`.
Source: arXiv:2212.04356.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...base.errors import GenerationError, NumericalError
from ...base.hub import Source
from ...base.outputs import ModelOutput
from ...generation import GenerationConfig, GenerationMixin
from ...generation.mixin import eval_mode
from ...generation.regions import recording
from .call import begin
from .face import OpenAIFace
from .heads import WhisperSeq2Seq
from .modeling import as_encoder_output
from .options import (
    language_ids,
    start_tokens,
)
from .protocol import NoSpeechProbe, fit_window
from .published import complete
from .segments import FRAME_PRECISION, TIME_PRECISION, rescale
from .transcription import More, Transcription

#: Arguments of `generate` that say in which form its result is; a stream of segments has one form.
_FORMS = ("return_dict_in_generate", "force_unique_generate_call")


class WhisperForConditionalGeneration(OpenAIFace, GenerationMixin, WhisperSeq2Seq):
    """Whisper with its head: transcribes, translates, detects languages, and trains."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.generation_config = GenerationConfig.from_model_config(config)

    def load_side_files(self, source: Source) -> None:
        """Read generation_config.json, and bring what an older checkpoint left to today's form."""
        super().load_side_files(source)
        complete(self.generation_config, self.config)

    def prefill(  # type: ignore[override]
        self, input_ids: Tensor, cache: Any, *, probe: NoSpeechProbe | None = None, **inputs: Any
    ) -> ModelOutput:
        """As `WhisperSeq2Seq.prefill`, and the no-speech probability where a probe asks for it."""
        if probe is None:
            return super().prefill(input_ids, cache, **inputs)
        output = super().prefill(input_ids, cache, **inputs, logits_to_keep=probe.places_from_end)
        probe.probability = output["logits"][:, 0].float().softmax(dim=-1)[:, probe.token]
        return output

    # ------------------------------------------------------------------ the call

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_features: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[Any] | None = None,
        stopping_criteria: Iterable[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
        synced_gpus: bool = False,
        return_timestamps: bool | None = None,
        task: str | None = None,
        language: str | list[str | None] | None = None,
        is_multilingual: bool | None = None,
        prompt_ids: Tensor | None = None,
        prompt_condition_type: str | None = None,
        condition_on_prev_tokens: bool | None = None,
        temperature: float | Sequence[float] | None = None,
        compression_ratio_threshold: float | None = None,
        logprob_threshold: float | None = None,
        no_speech_threshold: float | None = None,
        num_segment_frames: int | None = None,
        attention_mask: Tensor | None = None,
        return_segments: bool = False,
        return_token_timestamps: bool | None = None,
        num_frames: int | Sequence[int] | Tensor | None = None,
        word_timestamps: bool = False,
        tokenizer: Any = None,
        return_dict_in_generate: bool | None = None,
        force_unique_generate_call: bool | None = None,
        monitor_progress: Callable[[Tensor], None] | None = None,
        encoder_outputs: Any = None,
        assistant_model: Any = None,
        streamer: Any = None,
        generator: Any = None,
        batch_size: int | None = None,
        prefix_ids: Tensor | Sequence[int] | None = None,
        best_of: int | None = None,
        multilingual: bool = False,
        language_detection_segments: int | None = None,
        language_detection_threshold: float | None = None,
        token_probabilities: bool = False,
        hallucination_silence_threshold: float | None = None,
        break_loops: bool = False,
        time_precision: float = TIME_PRECISION,
        time_precision_features: float = FRAME_PRECISION,
        **kwargs: Any,
    ) -> Tensor | dict[str, Any] | ModelOutput:
        """Transcribe or translate log-mel features of any length.

        Args:
            input_features: (batch, mel bins, frames). Up to one window (3,000 frames) is short form; more is long
                form, which goes through the audio window by window and needs timestamps to do so.
            generation_config: Options; what it leaves unset comes from the model's own.
            logits_processor, stopping_criteria, prefix_allowed_tokens_fn: As for every model.
            synced_gpus: Accepted for programs that pass it.
            return_timestamps: Predict timestamp tokens. None is the config's choice; long form always does.
            task: "transcribe" or "translate".
            language: Code, name or token, one for all or a list with one an item; None is the generation config's
                choice, and where that has none it is detected.
            is_multilingual: Overrides what the generation config says.
            prompt_ids: (length,) tokens of a prompt, as `get_prompt_ids` gives them.
            prompt_condition_type: The prompt comes before the "first-segment" (default) or "all-segments".
            condition_on_prev_tokens: Give each window the text before it as its prompt.
            temperature: One, or several to fall back to while a threshold is missed.
            compression_ratio_threshold: On the bytes of the token ids, as transformers measures it; 1.35 is common.
            logprob_threshold: On the average log-probability of a window's tokens; -1.0 is common.
            no_speech_threshold: Skips windows that are more likely silent than this; 0.6 is common.
            num_segment_frames: Frames of one window; at most, and by default, the model's 3,000.
            attention_mask: (batch, frames), 0 where there is no audio. Needed for batches of long audio.
            return_segments: Return a dictionary with sequences, segments and languages.
            return_token_timestamps: Also return "token_timestamps" in that dictionary, (batch, length) seconds at which
                tokens end, counted from the start of their window and padded with the last one; and in each segment
                "token_timestamps" of its tokens in seconds of the whole audio. The scheme is that of transformers.
            num_frames: Frames of audio of each item, where no token or word is later; what attention_mask says
                otherwise.
            word_timestamps: Give each segment "words": {"word", "start", "end" (seconds), "probability"}, and let it
                start and end with them. The scheme is OpenAI's, but that a pause does not belong to the word after it.
                Needs tokenizer; implies return_segments. Text and windows are the same without.
            tokenizer: Of this model, to tell words apart.
            return_dict_in_generate: Return a GenerateOutput whose sequences hold prompt and end token, in short form
                without timestamps; else as above.
            force_unique_generate_call: One pass over the first window, prompt and end token kept.
            monitor_progress: Called before each window with (batch, 2) frames done and frames in all.
            encoder_outputs: Of one window, instead of features.
            assistant_model: A smaller Whisper, or the decoder of one (WhisperForCausalLM) that reads this model's
                encoder, which drafts tokens; the result is the same without. For greedy decoding and sampling.
            streamer: Takes tokens as they come, window after window; batches of one only.
            generator: Source of random numbers.
            batch_size: Items that go through the model together; when one is done, the next takes its place. None has
                them all. What an item gives does not depend on it.
            prefix_ids: (length,) tokens that the text of each item's first window starts with.
            best_of: Texts to draw for each window at a temperature above 0; the likeliest per token stands.
            multilingual: Detect the language of every window, and not of every item.
            language_detection_segments: Windows to listen to for an item's language; 1 unless given. The first that
                is sure of it settles it, else the language that most of them name.
            language_detection_threshold: Probability from which on a window is sure; 0.5 unless given.
            token_probabilities: Give each segment "token_probabilities", (length,) of its tokens.
            hallucination_silence_threshold: Leave out words that look imagined where at least this many seconds of
                silence are around them; needs word_timestamps.
            break_loops: Decode windows whose text repeats itself again at the next temperature, and cut off the
                repetitions in the end.
            time_precision: Seconds between two timestamp tokens, for the times of segments.
            time_precision_features: Seconds between two frames, for segments that no timestamp ends.
            **kwargs: Fields of GenerationConfig.

        Returns:
            (batch, length) token ids without prompt and end token, padded at the right; or what the switches above
            ask for. A segment is {"start", "end" (seconds), "tokens", "temperature", "avg_logprob",
            "compression_ratio", "no_speech_prob"}.

        Raises:
            GenerationError: Options that do not exist, do not fit together, or do not fit this model.
            ShapeError: Features of the wrong shape.
        """
        unique = bool(force_unique_generate_call)
        is_rescaled = (time_precision, time_precision_features) != (TIME_PRECISION, FRAME_PRECISION)
        if is_rescaled and (word_timestamps or min(time_precision, time_precision_features) <= 0):
            raise GenerationError(
                f"time_precision={time_precision} and time_precision_features={time_precision_features} are seconds, "
                f"above 0; with word_timestamps they are {TIME_PRECISION} and {FRAME_PRECISION}."
            )
        with eval_mode(self):
            run, config = begin(
                self,
                input_features,
                generation_config,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                return_timestamps=return_timestamps,
                task=task,
                language=language,
                is_multilingual=is_multilingual,
                prompt_ids=prompt_ids,
                prompt_condition_type=prompt_condition_type,
                condition_on_prev_tokens=condition_on_prev_tokens,
                temperature=temperature,
                compression_ratio_threshold=compression_ratio_threshold,
                logprob_threshold=logprob_threshold,
                no_speech_threshold=no_speech_threshold,
                num_segment_frames=num_segment_frames,
                attention_mask=attention_mask,
                return_token_timestamps=return_token_timestamps,
                num_frames=num_frames,
                word_timestamps=word_timestamps,
                tokenizer=tokenizer,
                return_dict_in_generate=return_dict_in_generate,
                encoder_outputs=encoder_outputs,
                assistant_model=assistant_model,
                streamer=streamer,
                generator=generator,
                batch_size=batch_size,
                prefix_ids=prefix_ids,
                best_of=best_of,
                multilingual=multilingual,
                language_detection_segments=language_detection_segments,
                language_detection_threshold=language_detection_threshold,
                token_probabilities=token_probabilities,
                hallucination_silence_threshold=hallucination_silence_threshold,
                break_loops=break_loops,
                **kwargs,
            )
            several = (config.num_return_sequences or 1) > 1
            if word_timestamps and (unique or several):
                what = "force_unique_generate_call" if unique else "num_return_sequences"
                raise GenerationError(
                    f"word_timestamps=True puts words into segments, and {what}={kwargs.get(what, True)} gives none: "
                    "leave one of them out."
                )
            as_output = bool(config.return_dict_in_generate)
            as_model_output = as_output and not (run.options.timestamps or word_timestamps)
            with run.stream(), recording(self, config):
                if unique or as_model_output or several:
                    with_segments = return_segments and several and not unique
                    return run.single_pass(unique, as_output and not with_segments, with_segments)
                run.run(monitor_progress)
        if is_rescaled:
            for one in run.recordings:
                rescale(one.segments, time_precision, time_precision_features, has_times=run.options.timestamps)
        return run.result(
            as_dict=return_segments or word_timestamps or run.options.return_token_timestamps or as_output
        )

    def stream_segments(
        self,
        input_features: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        monitor_progress: Callable[[Tensor], None] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Transcribe as `generate(..., return_segments=True)` does, and hand out segments as they are decided.

        Options are checked at once; windows are heard as the iterator is asked for more. What comes out is final.

        Args:
            input_features: (batch, mel bins, frames), of any length.
            generation_config: As for `generate`.
            monitor_progress: As for `generate`.
            **options: As for `generate`, those left out that say in which form its result is.

        Returns:
            An iterator of (row of the batch, segments that the next window of it added), windows of a row in order;
            the list is empty where a window holds no speech. All lists of a row joined are the row's segments in the
            result of `generate`.

        Raises:
            GenerationError: As `generate`, and for options that it does not share.
            ShapeError: As `generate`.
        """
        return self._events(self._stream(input_features, generation_config, options), monitor_progress)

    def stream_recordings(
        self,
        input_features: Any,
        generation_config: GenerationConfig | None = None,
        monitor_progress: Callable[[Tensor], None] | None = None,
        more: More | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Transcribe as `generate(..., return_segments=True)` does, and hand out each recording as soon as it is done.

        There is no end to how many there can be: at most `batch_size` are under way, and where one is done and no
        other row of the features waits, `more` is asked for the next.

        Args:
            input_features: (batch, mel bins, frames), of any length; what `more` adds must be found in it, too.
            generation_config: As for `generate`.
            monitor_progress: As for `generate`.
            more: Returns the frames and the language (None for that of this call) of one more recording, which is the
                next row of input_features; or None where there is none for now.
            **options: As for `stream_segments`.

        Returns:
            An iterator of (row, {"segments", "language"}), in the order in which recordings are done.

        Raises:
            GenerationError: As `stream_segments`.
            ShapeError: As `generate`.
        """
        run = self._stream(input_features, generation_config, options)
        return self._done(run, self._events(run, monitor_progress, more))

    def _stream(
        self, input_features: Any, generation_config: GenerationConfig | None, options: dict[str, Any]
    ) -> Transcription:
        """The transcription that a stream goes through, its options checked."""
        options.pop("return_segments", None)
        unused = [name for name in _FORMS if options.pop(name, None)]
        run, config = begin(self, input_features, generation_config, **options)
        if (config.num_return_sequences or 1) > 1:
            unused.append("num_return_sequences")
        if unused:
            raise GenerationError(
                f"{unused[0]} has no meaning for a stream of segments; leave it out, or call generate()."
            )
        return run

    @staticmethod
    def _done(run: Transcription, events: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each recording of a run when it is done; those with nothing to hear are at once."""
        for one in run.recordings:
            if one.is_done:
                yield one.row, {"segments": [], "language": one.language}
        for row, _ in events:
            one = run.recordings[row]
            if one.is_done:
                yield row, {"segments": one.segments, "language": one.language}

    def _events(
        self, run: Transcription, monitor: Callable[[Tensor], None] | None, more: More | None = None
    ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The events of a run; between them the model is in the mode its owner left it in."""
        events = run.events(monitor, more)
        with run.stream():
            while True:
                with torch.no_grad(), eval_mode(self), recording(self, run.config):
                    event = next(events, None)
                if event is None:
                    return
                yield event

    @torch.no_grad()
    def detect_language(
        self,
        input_features: Tensor | None = None,
        encoder_outputs: Any = None,
        generation_config: GenerationConfig | None = None,
        num_segment_frames: int | None = None,
        return_probabilities: bool = False,
    ) -> Any:
        """The language of each item, from its first window.

        Args:
            input_features: (batch, mel bins, frames); or encoder_outputs.
            return_probabilities: Also return the probability of every language.

        Returns:
            (batch,) token ids; with `return_probabilities` a pair of them and a list of {code: probability}.

        Raises:
            GenerationError: The model knows no languages.
            NumericalError: The model gave NaN.
        """
        config = (generation_config or self.generation_config).filled()
        ids = language_ids(config)
        if encoder_outputs is None:
            if input_features is None:
                raise GenerationError("pass input_features (batch, mel bins, frames) or encoder_outputs: both are None")
            windows = fit_window(input_features[:, :, : num_segment_frames or None], self.config.window_frames)
            encoder_outputs = self.get_encoder()(windows.to(self.device))
        hidden = as_encoder_output(encoder_outputs)[0]
        start = start_tokens(config, None, None, True, False)
        prompt = torch.tensor([start] * len(hidden), device=hidden.device)
        output = self.prefill(prompt, self.make_cache(len(prompt)), encoder_outputs=hidden)
        table = torch.tensor(sorted(ids.values()), device=prompt.device)
        scores = output["logits"][:, -1].float().index_select(-1, table)
        if bool(scores.isnan().any()):
            raise NumericalError(
                "the scores of the languages hold NaN, so none can be chosen. Check the features for NaN or infinity, "
                "and the dtype for overflow."
            )
        best = table[scores.argmax(dim=-1)]
        if not return_probabilities:
            return best
        codes = {index: code for code, index in ids.items()}
        names = [codes[index] for index in table.tolist()]
        rows = scores.softmax(dim=-1).tolist()
        return best, [dict(zip(names, row, strict=True)) for row in rows]
