"""DNA -> token ids of an ESM-family encoder: non-overlapping k-mers, single letters where none fits.

The Nucleotide Transformer's tokenizer, without transformers or torch, so that whoever lays out prompts can count
positions. Invariant: the tokens are those of `EsmTokenizer` on the same vocabulary (greedy from the left: a k-mer
where the next k letters are one, else a single letter).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from rlsys.data.dna import ALPHABET, NUCLEOTIDES
from rlsys.errors import CheckpointError, DataError


class KmerTokenizer:
    """Splits DNA into the k-mers of a vocabulary; k is found from the vocabulary."""

    def __init__(self, vocabulary: dict[str, int], k: int) -> None:
        self.vocabulary = vocabulary
        self.k = k

    @classmethod
    def from_file(cls, path: Path) -> KmerTokenizer:
        """Read a vocab.txt: one token a line, the line's number is its id.

        Raises CheckpointError when the file is missing or is no vocabulary of DNA k-mers.
        """
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: the encoder's vocabulary cannot be read ({error})") from error
        vocabulary = {line.strip(): index for index, line in enumerate(lines)}
        k = max((len(token) for token in vocabulary if token and set(token) <= set(NUCLEOTIDES)), default=0)
        expected = ["".join(letters) for letters in product(NUCLEOTIDES, repeat=k)] + list(ALPHABET)
        missing = [token for token in expected if token not in vocabulary]
        has_kmers = k > 1  # a protein vocabulary has A, C, G and T too
        if missing or not has_kmers:
            what = f"lacks {len(missing)} of them, {missing[0]!r} first" if has_kmers else "has no k-mers"
            raise CheckpointError(
                f"{path}: an encoder needs all DNA k-mers and the letters {ALPHABET}; this vocabulary {what}. "
                "Is this a protein model?"
            )
        return cls(vocabulary, k)

    def tokens(self, sequence: str) -> Iterator[str]:
        """Yield the tokens of a sequence. Raises DataError for a letter outside ACGTN."""
        position = 0
        while position < len(sequence):
            kmer = sequence[position : position + self.k]
            token = kmer if kmer in self.vocabulary else kmer[0]
            if token not in self.vocabulary or token[0] not in ALPHABET:
                raise DataError(
                    f"a DNA sequence has {token!r} at position {position} (0-based); the encoder knows {ALPHABET} only"
                )
            yield token
            position += len(token)

    def ids(self, sequence: str) -> list[int]:
        """Token ids of a sequence, without special tokens."""
        return [self.vocabulary[token] for token in self.tokens(sequence)]

    def num_tokens(self, sequence: str) -> int:
        """Tokens of a sequence, without special tokens."""
        return sum(1 for _ in self.tokens(sequence))
