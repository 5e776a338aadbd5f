"""Write generated texts to standard output: as text while it grows, or as one JSON record per text."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from inference.generation import Delta


@dataclass(slots=True)
class Row:
    """The state of one text: sample `sample` of prompt `prompt`. Stores its tokens only for records or `keep`."""

    prompt: int
    sample: int
    ended: bool = False
    waiting: str = ""  # generated and not written yet
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class Transcript:
    """Writes rows in order: the current row as it grows, each later row once all rows before it have ended."""

    def __init__(self, prompts: Sequence[str], *, n_samples: int = 1, records: bool = False, keep: bool = False):
        """records: write JSON instead of text; keep: store the tokens of each row (always true with records)."""
        self.prompts, self.n_samples, self._records, self._keep = prompts, n_samples, records, keep or records
        self.rows = [Row(*divmod(i, n_samples)) for i in range(len(prompts) * n_samples)]
        self._front = 0  # the row that is being written
        if not records:
            self._write(self._heading())

    def add(self, delta: Delta) -> None:
        """Take the next delta of the generation, and write what can be written."""
        row = self.rows[delta.row]
        if self._keep and delta.token is not None:
            row.tokens.append(delta.token)
        if delta.logprob is not None:
            row.logprobs.append(delta.logprob)
        row.ended = delta.finish is not None
        if not self._records:
            row.waiting += delta.text
            self._write_front()
            return
        row.text += delta.text
        if row.ended:
            self._write(json.dumps(self._record(row, delta), ensure_ascii=False) + "\n")

    def _write_front(self) -> None:
        while self._front < len(self.rows):
            row = self.rows[self._front]
            self._write(row.waiting)
            row.waiting = ""
            if not row.ended:
                return
            self._front += 1
            self._write("\n" + (self._heading() if self._front < len(self.rows) else ""))

    def _heading(self) -> str:
        """The current row's prompt, below a title if there are several rows."""
        row = self.rows[self._front]
        names = [("prompt", row.prompt, len(self.prompts)), ("sample", row.sample, self.n_samples)]
        title = ", ".join(f"{name} {i + 1} of {n}" for name, i, n in names if n > 1)
        return (f"--- {title} ---\n" if title else "") + self.prompts[row.prompt]

    def _record(self, row: Row, last: Delta) -> dict[str, object]:
        stop = {"stop": last.stop} if last.stop is not None else {}
        return {
            "prompt": self.prompts[row.prompt],
            "prompt_index": row.prompt,
            "sample": row.sample,
            "text": row.text,
            "finish": last.finish,
            **stop,
            "tokens": row.tokens,
            "logprobs": row.logprobs,
        }

    @staticmethod
    def _write(text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
