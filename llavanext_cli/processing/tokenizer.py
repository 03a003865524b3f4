"""Text to ids and back, with the SentencePiece model of a checkpoint folder.

Below sample_layout, which encodes one segment after another. The ids equal those of transformers' `LlamaTokenizer`
(4.57.1) for the same folder, in both of its modes:

    legacy true     each stretch of text between two special tokens gets a space before it
    legacy false    only the first stretch does

Text never becomes a special token: sample_layout places special tokens by id, and text that looks like one (`</s>`,
`<image>`) is encoded character by character.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llavanext_cli.config.model_folder import read_optional
from llavanext_cli.errors import CheckpointError
from llavanext_cli.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
"""The files of a tokenizer in a model folder; which of them exist depends on the model."""

SPACE = "\u2581"
"""A space inside a SentencePiece piece."""

NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""`ModelProto{normalizer_spec{add_dummy_prefix: false}}`. Appended to a model's bytes, it replaces that field."""

MODEL_LIMIT = 64 << 20
"""Maximum size of a tokenizer.model in bytes; known models have 0.5 to 5 MB."""

SPECIAL_DEFAULTS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}


@dataclass(frozen=True)
class Tokenizer:
    """A SentencePiece model and the ids around it.

    Attributes:
        model: the bytes of tokenizer.model.
        legacy: see the module docstring.
        add_prefix_space: whether the first stretch gets its space, if legacy is false.
        add_bos: whether a sequence begins with bos_id.
        bos_id, eos_id: ids of the special tokens that sample_layout places.
        added: tokens added to those of the model, text to id (`<image>`, `<video>`).
        unk_token: text of the unknown token; `_encode_plain` uses it as a guard.
        special_ids: ids that decoding leaves out.
    """

    model: bytes
    legacy: bool
    add_prefix_space: bool
    add_bos: bool
    bos_id: int
    eos_id: int
    added: dict[str, int]
    unk_token: str = "<unk>"
    special_ids: frozenset[int] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        """Pickled for reader processes: without the SentencePiece objects, which are built again there."""
        processors = ("_processor", "_plain", "_guard_length", "_spelled")
        return {key: value for key, value in self.__dict__.items() if key not in processors}

    @cached_property
    def _processor(self) -> Any:
        """The model as it is: it puts a space before each text."""
        return _load_processor(self.model)

    @cached_property
    def _plain(self) -> Any:
        """The model without that space."""
        return _load_processor(self.model + NO_DUMMY_PREFIX)

    @cached_property
    def _guard_length(self) -> int:
        return len(self._plain.encode(self.unk_token))

    @cached_property
    def _spelled(self) -> tuple[str, ...]:
        """Special tokens that the model itself recognises in text (user-defined symbols)."""
        names = [self._processor.id_to_piece(i) for i in self.special_ids if i < len(self._processor)]
        return tuple(
            name for name in [*names, *self.added] if not self.special_ids.isdisjoint(self._plain.encode(name))
        )

    @property
    def size(self) -> int:
        """Number of ids, added ones included."""
        return max([len(self._processor) - 1, *self.added.values()]) + 1

    def encode(self, text: str, first: bool = False) -> list[int]:
        """Ids of text at the start of the sequence (`first`) or right after a special token."""
        if not text:
            return []
        text = _well_formed(text)
        if self.legacy:
            head, tail = self._split_spelled(text)
            ids: list[int] = self._processor.encode(head)
            return ids + self.encode_more(tail)
        text = text.replace(SPACE, " ")
        return self._encode_plain(SPACE + text if first and self.add_prefix_space else text)

    def encode_more(self, text: str) -> list[int]:
        """Ids of text that continues other text: no space is put before it.

        Cut before a space, text has the same ids as uncut, because no piece has a space after another character.
        """
        return self._encode_plain(_well_formed(text).replace(SPACE, " "))

    def _encode_plain(self, text: str) -> list[int]:
        if not text:
            return []
        head, tail = self._split_spelled(text)
        ids: list[int]
        if head.startswith((SPACE, " ")):
            # some models strip leading spaces; after a guard it is not a leading one (as in LlamaTokenizer)
            ids = self._plain.encode(self.unk_token + head)[self._guard_length :]
        else:
            ids = self._plain.encode(head)
        return ids + self._encode_plain(tail)

    def _split_spelled(self, text: str) -> tuple[str, str]:
        """Cut inside the first special token that the model would recognise, so that it is encoded as plain text."""
        found = [place for place in (text.find(name) for name in self._spelled) if place >= 0]
        return (text[: min(found) + 1], text[min(found) + 1 :]) if found else (text, "")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, without special tokens and without the space before the first word."""
        decoder = self.stream()
        return "".join(decoder.push(int(i)) for i in ids) + decoder.flush()

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one by one."""
        return StreamDecoder(self)

    def piece_bytes(self, token: int) -> bytes:
        """UTF-8 of one id; of a byte piece, the byte. Empty for special ids and ids beyond the vocabulary."""
        if token in self.special_ids:
            return b""
        if token in self._added_names:
            return self._added_names[token].encode()
        if not 0 <= token < len(self._processor):
            return b""
        piece: str = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:-1], 16)])  # "<0x0A>"
        return piece.replace(SPACE, " ").encode()

    @cached_property
    def _added_names(self) -> dict[int, str]:
        return {number: name for name, number in self.added.items()}


class StreamDecoder:
    """Turns ids into text as they come. Bytes wait until they form a whole character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._started = False

    def push(self, token: int) -> str:
        """The text that this id completes; often empty."""
        data = self._tokenizer.piece_bytes(token)
        if data and not self._started:
            self._started = True
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """U+FFFD for a character that was never completed; usually empty."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read a tokenizer folder.

    Args:
        folder: contains tokenizer.model; tokenizer_config.json, special_tokens_map.json and added_tokens.json are read
            if they exist (without `legacy`, it is true, as in transformers).

    Raises:
        CheckpointError: tokenizer.model is missing, a file cannot be read, or a special token has no id.
    """
    folder = Path(folder)
    path = folder / "tokenizer.model"
    if not path.is_file():
        hint = "fetch the checkpoint again with its tokenizer.model"
        if (folder / "tokenizer.json").is_file():
            hint = "tokenizer.json alone is not enough: " + hint
        raise CheckpointError(f"{folder}: tokenizer.model is missing", hint)
    if path.stat().st_size > MODEL_LIMIT:
        raise CheckpointError(f"{path}: more than {MODEL_LIMIT} bytes", "fetch the checkpoint again")
    model = path.read_bytes()
    try:
        if not model:
            raise ValueError("empty")  # sentencepiece would accept it
        processor = _load_processor(model)
    except Exception as error:  # RuntimeError, OSError or ValueError, depending on the version
        raise CheckpointError(f"{path}: not a SentencePiece model", "fetch the checkpoint again") from error

    config = read_optional(folder, "tokenizer_config.json")
    names = SPECIAL_DEFAULTS | _special_names(read_optional(folder, "special_tokens_map.json")) | _special_names(config)
    added, added_special = _added_tokens(folder, config)
    for name in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):  # they may be pieces of the model
        if (number := _special_id(name, added, processor)) is not None:
            added[name] = number
    ids: dict[str, int] = {}
    for key, name in names.items():  # unk_token first, pad_token last, as in SPECIAL_DEFAULTS
        number = _special_id(name, added, processor)
        if number is None and key != "pad_token":
            raise CheckpointError(
                f"{folder}: {key} {name!r} is neither in tokenizer.model nor among the added tokens",
                "fetch the tokenizer's files again, all from the same model",
            )
        ids[key] = ids["unk_token"] if number is None else number
    special = {*ids.values(), *added_special}
    special |= {added[name] for name in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER) if name in added}
    return Tokenizer(
        model=model,
        legacy=config.get("legacy") is not False,
        add_prefix_space=config.get("add_prefix_space") is not False,
        add_bos=config.get("add_bos_token") is not False,
        bos_id=ids["bos_token"],
        eos_id=ids["eos_token"],
        added=added,
        unk_token=names["unk_token"],
        special_ids=frozenset(special),
    )


def _load_processor(model: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=model)


def _well_formed(text: str) -> str:
    """Replace lone surrogates, which JSON can contain (`"\\ud83d"`) and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _special_names(data: dict[str, Any]) -> dict[str, str]:
    """The special tokens of a JSON file, each a text or {"content": text}."""
    values = {key: data.get(key) for key in SPECIAL_DEFAULTS}
    values = {key: value.get("content") if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in values.items() if isinstance(value, str) and value}


def _added_tokens(folder: Path, config: dict[str, Any]) -> tuple[dict[str, int], set[int]]:
    """Added tokens, text to id, and the ids of those marked special. tokenizer_config.json overrides
    added_tokens.json.

    Raises:
        CheckpointError: an id is invalid, or an entry has no content.
    """
    try:
        added = {str(name): int(number) for name, number in read_optional(folder, "added_tokens.json").items()}
        special = set()
        for number, entry in (config.get("added_tokens_decoder") or {}).items():
            added[entry["content"]] = int(number)
            if entry.get("special"):
                special.add(int(number))
        if wrong := [number for number in added.values() if not 0 <= number < 1 << 31]:
            raise ValueError(f"{wrong[0]} is not an id")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as fault:
        raise CheckpointError(
            f"{folder}: invalid added tokens ({type(fault).__name__}: {fault})",
            "fetch added_tokens.json and tokenizer_config.json again",
        ) from fault
    return added, special


def _special_id(name: str, added: dict[str, int], processor: Any) -> int | None:
    if name in added:
        return added[name]
    number = processor.piece_to_id(name)
    return number if processor.id_to_piece(number) == name else None
