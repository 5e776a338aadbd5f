"""Tokens to text as they are made: whole characters, and nothing from a stop string on."""

import codecs
from collections.abc import Sequence
from typing import Literal

from data.tokenizer import Tokenizer

End = Literal["end", "stop", "length", "interrupted"]  # the model's own end-of-text, a stop string, enough tokens


class Speller:
    """Spells one text. What could still become a stop string is held back until it cannot."""

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), stop_at_end: bool = True):
        """Stop strings are found wherever their characters come from, one token or several."""
        self._tokenizer, self._stop, self._stop_at_end = tokenizer, stop, stop_at_end
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._held = ""
        self.ended: End | None = None
        self.stop_string: str | None = None  # the one that ended it

    def add(self, token: int) -> str:
        """The text that this token makes sure of."""
        if token == self._tokenizer.eot and self._stop_at_end:
            return self.finish("end")
        return self._sure(self._decode(self._tokenizer.decode_bytes([token])))

    def finish(self, why: End) -> str:
        """The text that was held back, where no token follows; half a character becomes the replacement one."""
        shown = self._sure(self._decode(b"", final=True))
        if self.ended is None:
            self.ended, shown, self._held = why, shown + self._held, ""
        return shown

    def _sure(self, text: str) -> str:
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            _, n, self.stop_string = min(found)  # the one complete first, however the tokens cut the text
            self.ended = "stop"
        else:
            n = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[:n], self._held[n:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
