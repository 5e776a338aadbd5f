"""Streaming detokenizer: tokens to text as they are generated, in whole characters, up to a stop string."""

import codecs
from collections.abc import Sequence
from typing import Literal

from data.tokenizer import Tokenizer

Finish = Literal["end", "stop", "length", "interrupted"]  # end-of-text token, stop string, max_new_tokens, cancelled


class StreamingDetokenizer:
    """Decodes one text. Text that could still become a stop string is held back until it cannot."""

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), stop_at_end: bool = True):
        """Stop strings are found even where they begin or end within a token, or span several."""
        self._tokenizer, self._stop, self._stop_at_end = tokenizer, stop, stop_at_end
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._held = ""
        self.finish: Finish | None = None  # why the text has ended
        self.stop_string: str | None = None  # the one that ended it

    def add(self, token: int) -> str:
        """The text that is safe to show after this token."""
        if token == self._tokenizer.eot and self._stop_at_end:
            return self.end("end")
        return self._release(self._decode(self._tokenizer.decode_bytes([token])))

    def end(self, why: Finish) -> str:
        """The text held back so far, since no token follows; half a character becomes U+FFFD."""
        shown = self._release(self._decode(b"", final=True))
        if self.finish is None:
            self.finish, shown, self._held = why, shown + self._held, ""
        return shown

    def _release(self, text: str) -> str:
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            _, n, self.stop_string = min(found)  # the first to be complete, however the tokens cut the text
            self.finish = "stop"
        else:
            n = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[:n], self._held[n:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of the text that are the beginning of the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
