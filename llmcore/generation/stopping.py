"""When a sequence is at its end: an end token, or a text that it was told to stop before."""

from collections.abc import Iterable, Sequence

from llmcore.text.tokenizer import Tokenizer


class AnswerText:
    """One answer's text as it grows: what may be shown of it, and whether a stop string ended it.

    The text ends before the stop string that is complete first, wherever the tokens' borders lie.
    What might be the beginning of one is held back, and so is half a character.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        """stops: texts that end the answer and are no part of it."""
        self._stream = tokenizer.stream()
        self._stops = tuple(stops)
        self._held = ""
        self._ready = ""
        self.stopped = False

    def push(self, token: int) -> None:
        """The answer goes on with this token."""
        self._add(self._stream.push(token))

    def finish(self) -> str:
        """The answer is complete: all that has not been taken yet."""
        self._add(self._stream.finish())
        rest, self._held = self.take() + self._held, ""
        return rest

    def take(self) -> str:
        """What is certain and has not been taken yet."""
        ready, self._ready = self._ready, ""
        return ready

    def _add(self, piece: str) -> None:
        if self.stopped:
            return
        text = self._held + piece
        found = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if found:
            # Of those that end together the longest begins first.
            end = min(end for end, _ in found)
            start = end - max(len(stop) for at, stop in found if at == end)
            self._ready, self._held, self.stopped = self._ready + text[:start], "", True
            return
        certain = len(text) - max((_begun(text, stop) for stop in self._stops), default=0)
        self._ready, self._held = self._ready + text[:certain], text[certain:]


class Stopping:
    """Is told each token as it is chosen, and says which sequences it ends.

    `texts` holds the answers' texts, one for each sequence, if a tokenizer was given.
    """

    def __init__(
        self,
        ends: Iterable[int],
        stops: Sequence[str] = (),
        tokenizer: Tokenizer | None = None,
        batch: int = 1,
    ) -> None:
        """ends: token ids that end a sequence; stops: texts that do, for which tokenizer is needed.

        ValueError for stop strings that are empty or have no tokenizer.
        """
        if "" in stops:
            raise ValueError("stop: an empty text would end every answer at once")
        if stops and tokenizer is None:
            raise ValueError(f"stop: to find {stops[0]!r} in the answer, tokenizer= is needed")
        self.ends = tuple(ends)
        self.stops = tuple(stops)
        self.texts: list[AnswerText] | None = None
        if tokenizer is not None:
            self.texts = [AnswerText(tokenizer, stops) for _ in range(batch)]

    def ended(self, rows: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Of each of these sequences whether its new token is its last."""
        ended = [token in self.ends for token in tokens]
        if self.texts is not None:
            for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                if not ended[place]:  # an end token is no part of the text
                    self.texts[row].push(token)
                    ended[place] = self.texts[row].stopped
        return ended


def read_stop(
    stop: int | str | Iterable[int | str] | None, of_model: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """`stop` as token ids and texts.

    Ids stand in the place of the model's own ends, texts beside them; an empty `stop` is no end.
    """
    if stop is None:
        return of_model, ()
    given = (stop,) if isinstance(stop, (int, str)) else tuple(stop)
    ids = tuple(s for s in given if isinstance(s, int))
    texts = tuple(s for s in given if isinstance(s, str))
    if len(ids) + len(texts) < len(given):
        raise TypeError(f"stop takes token ids and texts, got {given!r}")
    return (ids if ids or not given else of_model), texts


def _begun(text: str, stop: str) -> int:
    """The length of the longest beginning of `stop`, not all of it, that `text` ends with."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
