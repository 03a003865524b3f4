"""From tokens to text as they come: whole characters only, and never a part of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llavanext_cli.processing.tokenizer import Tokenizer


class TextStreamer:
    """Collects the text of one answer and passes it on in pieces.

    Args:
        tokenizer: of the checkpoint.
        stop: strings that end the answer and are not part of it.
        on_text: called with each piece; together they are what `close` returns.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), on_text: Callable[[str], None] | None = None):
        self._decoder = tokenizer.stream()
        self._stop = tuple(stop)
        self._on_text = on_text
        self._written, self._held = "", ""
        self._stopped = False

    def push(self, token: int) -> bool:
        """Add a token; True when a stop string is complete."""
        self._held += self._decoder.push(token)
        places = [place for place in map(self._held.find, self._stop) if place >= 0]
        if places:
            self._write(min(places))
            self._held, self._stopped = "", True
        else:
            self._write(len(self._held) - self._stop_prefix_length())
        return self._stopped

    def close(self) -> str:
        """The whole text. What was held back is passed on first, unless a stop string ended the answer."""
        if not self._stopped:
            self._held += self._decoder.flush()
            self._write(len(self._held))
        return self._written

    def _stop_prefix_length(self) -> int:
        """How many characters at the end of the held text may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0

    def _write(self, count: int) -> None:
        text, self._held = self._held[:count], self._held[count:]
        if text:
            self._written += text
            if self._on_text:
                self._on_text(text)
