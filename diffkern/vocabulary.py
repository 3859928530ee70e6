"""Words and their numbers: texts as integers of a fixed length, for images with captions and networks that read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffkern import records
from diffkern.checks import meant

__all__ = ["FIRST", "LONGEST", "PAD", "START", "Vocabulary", "check_tokens", "words_of"]

PAD, START, FIRST = 0, 1, 2
"""What fills a text up, what every text begins with, and the number of the first word."""
LONGEST = 4096
"""Tokens of a text, at most."""


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; each mark of punctuation is a word: "Seven, thick" -> seven | , | thick."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words that texts may have, and how long texts are.

    words    each once, in lower case, as `words_of` cuts them
    length   L, tokens of every text: one that marks its start, its words, and padding

    Token 0 is padding, 1 the start, 2 + i word i. ValueError, naming field, rule and value, for other words.
    """

    words: tuple[str, ...]
    length: int

    def __post_init__(self) -> None:
        records.check_fields(self, "Vocabulary.")
        for word in self.words:
            if words_of(word) != [word]:
                raise ValueError(f"Vocabulary.words must be single words in lower case, got {records.shown(word)}")
        if len(set(self.words)) != len(self.words):
            twice = next(word for word in self.words if self.words.count(word) > 1)
            raise ValueError(f"Vocabulary.words must be different from each other, got {records.shown(twice)} twice")
        if not 1 <= self.length <= LONGEST:
            raise ValueError(f"Vocabulary.length must lie in 1..{LONGEST}, got {records.shown(self.length)}")

    @staticmethod
    def of(texts: Iterable[str], length: int | None = None) -> Vocabulary:
        """The words of these texts in the order of the alphabet; ``length``: as the longest needs it if None."""
        cut = [words_of(text) for text in texts]
        most = max(map(len, cut), default=0) + 1
        return Vocabulary(tuple(sorted({word for words in cut for word in words})), most if length is None else length)

    @property
    def size(self) -> int:
        """The number of tokens there are."""
        return FIRST + len(self.words)

    @property
    def null(self) -> Tensor:
        """int64 [L]: the empty text, the condition that means none."""
        return self.tokens([""])[0]

    def tokens(self, texts: str | Sequence[str]) -> Tensor:
        """int64 [B, L], on the CPU.

        ValueError for a word that is none of these, with the nearest that is, and for a text that is too long.
        """
        texts = _listed(texts)
        numbers = {word: FIRST + i for i, word in enumerate(self.words)}
        found = torch.full((len(texts), self.length), PAD, dtype=torch.int64, device="cpu")
        for row, text in enumerate(texts):
            words = words_of(text)
            for word in words:
                if word not in numbers:
                    near = meant(word, self.words)
                    hint = "" if near is None else f": did you mean {near!r}?"
                    raise ValueError(
                        f"text must be of the {len(self.words)} words of the vocabulary, got {records.shown(word)} in "
                        f"{records.shown(text)}{hint}"
                    )
            if len(words) >= self.length:
                raise ValueError(
                    f"text must have at most {self.length - 1} words, got {len(words)} in {records.shown(text)}"
                )
            found[row, : len(words) + 1] = torch.tensor([START, *(numbers[word] for word in words)], device="cpu")
        return found

    def texts(self, tokens: Tensor) -> list[str]:
        """The words of tokens int64 [B, any], a space between them; none before a comma, a full stop and the like."""
        check_tokens(tokens, self.size)
        found = []
        for row in tokens.tolist():
            text = " ".join(self.words[token - FIRST] for token in row if token >= FIRST)
            found.append(re.sub(r" ([,.;:!?])", r"\1", text))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        return {"words": list(self.words), "length": self.length}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Vocabulary:
        """A vocabulary from `to_dict` or from its JSON; ValueError for an unknown name and for another type."""
        return records.record(Vocabulary, values, "Vocabulary.")


def _listed(texts: Any) -> list[str]:
    given = [texts] if isinstance(texts, str) else texts
    if not isinstance(given, Sequence) or not all(isinstance(text, str) for text in given):
        raise ValueError(f"texts must be a text or a list of them, got {records.shown(texts)}")
    return list(given)


def check_tokens(tokens: Any, size: int | None) -> None:
    """ValueError unless ``tokens`` are int64 [B, L] in 0 .. size - 1; None: values are not looked at."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.dim() != 2:
        got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be int64 [B, L], got {got}")
    if size is None:
        return
    wrong = tokens[(tokens < 0) | (tokens >= size)]
    if wrong.numel():
        raise ValueError(f"tokens must lie in 0..{size - 1}, got {int(wrong[0])}")
