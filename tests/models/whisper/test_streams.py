"""Segments as they are decided, and rows that are filled up from the files that wait."""

from __future__ import annotations

import pytest

from audiomm import GenerationError


def plain(segments):
    return [(float(one["start"]), float(one["end"]), one["tokens"].tolist()) for one in segments]


def test_what_a_stream_hands_out_joined_is_what_generate_returns(talker, heard, lengths):
    features, mask = heard(3, 130), lengths(130, 40, 90)
    options = {"attention_mask": mask, "language": "en", "condition_on_prev_tokens": True}
    expected = talker.generate(features, return_segments=True, return_timestamps=True, **options)["segments"]
    streamed = [[], [], []]
    for row, segments in talker.stream_segments(features, return_timestamps=True, **options):
        streamed[row] += segments
    assert [plain(row) for row in streamed] == [plain(row) for row in expected]


def test_segments_come_before_later_windows_are_heard(talker, heard, encoder_batches):
    stream = talker.stream_segments(heard(1, 200), language="en")
    assert encoder_batches == []
    row, segments = next(stream)
    assert row == 0
    assert all(one["seek"] == 0 for one in segments)
    assert encoder_batches == [1]
    talker.train()
    next(stream)
    assert encoder_batches == [1, 1]
    assert talker.training
    stream.close()


def test_a_window_without_speech_is_an_event_without_segments(talker, heard):
    events = list(talker.stream_segments(heard(1, 100), language="en", no_speech_threshold=0.0))
    assert events == [(0, [])] * 3


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_next_file_takes_the_row_of_one_that_is_done(talker, heard, lengths, encoder_batches, batch_size):
    frames = (150, 40, 90, 130, 33)
    features, mask = heard(5, 150), lengths(*frames)
    options = {"language": "en", "return_segments": True, "return_timestamps": True}
    expected = [
        plain(talker.generate(features[row : row + 1], attention_mask=mask[row : row + 1], **options)["segments"][0])
        for row in range(5)
    ]
    encoder_batches.clear()
    found = talker.generate(features, attention_mask=mask, batch_size=batch_size, **options)["segments"]
    assert [plain(row) for row in found] == expected
    # The batch is full until nothing waits any more.
    assert max(encoder_batches) == batch_size
    assert encoder_batches == sorted(encoder_batches, reverse=True)


def test_files_that_come_later_take_the_rows_of_those_that_are_done(talker, heard, lengths, encoder_batches):
    frames, languages = (150, 40, 90, 130, 60, 70), ["en", "de", None, "fr", "en", "de"]
    features, mask = heard(6, 150), lengths(*frames)
    options = {"return_timestamps": True}
    expected = talker.generate(features, attention_mask=mask, language=languages, return_segments=True, **options)
    encoder_batches.clear()
    later, asked = iter(range(1, 6)), []

    def more():
        asked.append(len(asked))
        # A source may have nothing for a while, and still go on.
        row = None if len(asked) == 2 else next(later, None)
        return None if row is None else (frames[row], languages[row])

    found = dict(
        talker.stream_recordings(
            Grows(features), attention_mask=lengths(150), language=["en"], more=more, batch_size=2, **options
        )
    )
    assert sorted(found) == list(range(6))
    assert [plain(found[row]["segments"]) for row in range(6)] == [plain(one) for one in expected["segments"]]
    assert [found[row]["language"] for row in range(6)] == expected["languages"]
    assert max(encoder_batches) == 2
    # Only the first round, when nothing had come yet, and the last file alone have one row.
    assert encoder_batches.count(2) >= len(encoder_batches) / 2


def test_a_later_file_without_a_language_has_that_of_the_call(talker, heard, lengths):
    later = iter([(60, None), (70, "de")])
    found = dict(
        talker.stream_recordings(
            Grows(heard(3, 70)), attention_mask=lengths(70), language="fr", more=lambda: next(later, None), batch_size=3
        )
    )
    assert [found[row]["language"] for row in range(3)] == ["fr", "fr", "de"]


class Grows:
    """Features of which the call knows only the first row at first."""

    def __init__(self, features):
        self.features, self.shape = features, (1, *features.shape[1:])

    def dim(self):
        return 3

    def __getitem__(self, place):
        return self.features[place]


def test_languages_are_found_when_a_file_gets_its_row(talker, heard, lengths, encoder_batches):
    features, mask = heard(4, 90), lengths(90, 40, 60, 80)
    together = talker.generate(features, attention_mask=mask, return_segments=True)["languages"]
    encoder_batches.clear()
    found = talker.generate(features, attention_mask=mask, return_segments=True, batch_size=1)
    assert found["languages"] == together
    windows = {(row, one["seek"]) for row, segments in enumerate(found["segments"]) for one in segments}
    assert len(encoder_batches) == len(windows)


def test_only_the_forms_of_results_are_refused_by_a_stream(talker, heard):
    with pytest.raises(GenerationError, match="return_dict_in_generate has no meaning for a stream"):
        talker.stream_segments(heard(1, 40), return_dict_in_generate=True)
    with pytest.raises(GenerationError, match="num_return_sequences has no meaning"):
        talker.stream_segments(heard(1, 40), num_beams=2, num_return_sequences=2)
    with pytest.raises(GenerationError, match="batch_size=0: at least 1"):
        talker.stream_segments(heard(1, 40), batch_size=0)
    with pytest.raises(GenerationError, match="num_return_sequences has no meaning"):
        talker.stream_recordings(heard(1, 40), num_beams=2, num_return_sequences=2)
    assert list(talker.stream_segments(heard(1, 40), return_segments=True, language="en"))
