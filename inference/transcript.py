"""The texts of a batch as they are made: on standard output, or as a JSON record each."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from data.tokenizer import Tokenizer
from inference.detokenizer import End, Speller


@dataclass(slots=True)
class Row:
    """One text: sample `sample` of prompt `prompt`."""

    prompt: int
    sample: int
    speller: Speller
    waiting: str = ""  # made, but not shown yet
    text: str = ""  # what follows is kept for records alone, so that an endless text takes no memory
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Transcript:
    """Shows row b * n_samples + s, sample s of prompt b. One text is shown at a time, and that one as it is made."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        *,
        n_samples: int = 1,
        stop: Sequence[str] = (),
        stop_at_end: bool = True,
        records: bool = False,
        keep: bool = False,
    ):
        """records: JSON instead of text; keep: the tokens of each row stay in it, as they do for records."""
        self.prompts, self.n_samples, self._records, self._keep = prompts, n_samples, records, keep or records
        spellers = [Speller(tokenizer, stop=stop, stop_at_end=stop_at_end) for _ in range(len(prompts) * n_samples)]
        self.rows = [Row(*divmod(i, n_samples), speller=speller) for i, speller in enumerate(spellers)]
        self.live = list(range(len(self.rows)))  # of the rows that have not ended
        self._front = 0  # the row that is being shown
        if not records:
            self._write(self._heading())

    def add(self, tokens: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """A token of every row; those of rows that have ended count for nothing."""
        for i in self.live:
            row = self.rows[i]
            if self._keep:
                row.tokens.append(tokens[i])
            if logprobs is not None:
                row.logprobs.append(logprobs[i])
            self._take(row, row.speller.add(tokens[i]))
        self._show()

    def finish(self, why: End) -> None:
        """No token follows: the rows that go on end here."""
        for i in self.live:
            self._take(self.rows[i], self.rows[i].speller.finish(why))
        self._show()

    def _take(self, row: Row, text: str) -> None:
        if self._records:
            row.text += text
        else:
            row.waiting += text

    def _show(self) -> None:
        """Write what the front row has, and, once it has ended, all that the next one has."""
        ended = [i for i in self.live if self.rows[i].speller.ended]
        self.live = [i for i in self.live if not self.rows[i].speller.ended]
        if self._records:
            for i in ended:
                self._write(json.dumps(self._record(self.rows[i]), ensure_ascii=False) + "\n")
            return
        while self._front < len(self.rows):
            row = self.rows[self._front]
            self._write(row.waiting)
            row.waiting = ""
            if not row.speller.ended:
                return
            self._front += 1
            self._write("\n" + (self._heading() if self._front < len(self.rows) else ""))

    def _heading(self) -> str:
        """What stands before the front row's text: its prompt, and where there are several rows which one it is."""
        row = self.rows[self._front]
        names = [("prompt", row.prompt, len(self.prompts)), ("sample", row.sample, self.n_samples)]
        title = ", ".join(f"{name} {i + 1} of {n}" for name, i, n in names if n > 1)
        return (f"--- {title} ---\n" if title else "") + self.prompts[row.prompt]

    def _record(self, row: Row) -> dict[str, object]:
        stop = {"stop": row.speller.stop_string} if row.speller.stop_string is not None else {}
        return {
            "prompt": self.prompts[row.prompt],
            "prompt_index": row.prompt,
            "sample": row.sample,
            "text": row.text,
            "finish": row.speller.ended,
            **stop,
            "tokens": row.tokens,
            "logprobs": row.logprobs,
        }

    @staticmethod
    def _write(text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
