"""The corpus that the bundled models are trained on, in which each language has a chosen share; and its tokenizer."""

from __future__ import annotations

import lzma
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

# Share of the training chapters that each language contributes (corpus code -> BCP-47 tag, share).
MIXTURE: dict[str, tuple[str, float]] = {
    "eng": ("en", 1.00),
    "deu": ("de", 0.40),
    "fra": ("fr", 0.30),
    "spa": ("es", 0.20),
    "rus": ("ru", 0.10),
    "heb": ("he", 0.10),
    "arb": ("ar", 0.05),
    "zho": ("zh", 0.10),
    "jpn": ("ja", 0.05),
    "kor": ("ko", 0.03),
    "vie": ("vi", 0.05),
    "fin": ("fi", 0.05),
}
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
POSITIONS = 512
# A document is a run of at most this many verses, so that a lone sentence after <|endoftext|> is in domain.
MAX_VERSES_PER_DOCUMENT = 6


Chapters = dict[str, list[str]]


def read_chapters(data: Path, language: str, split: str) -> Chapters:
    """Chapter id -> its verses in order, for one split of one language."""
    wanted = {
        line.split("\t")[0]
        for line in (data / "splits.tsv").read_text(encoding="utf-8").splitlines()[1:]
        if line.split("\t")[1] == split
    }
    chapters: Chapters = {}
    with lzma.open(data / "bible" / f"{language}.tsv.xz", "rt", encoding="utf-8") as lines:
        for line in lines:
            verse_id, _, text = line.rstrip("\n").partition("\t")
            if verse_id in wanted and text.strip():
                chapters.setdefault(verse_id.rsplit(".", 1)[0], []).append(text.strip())
    return chapters


def sample_mixture(data: Path, seed: int) -> dict[str, Chapters]:
    """The training chapters of each language, cut to its share by a seeded draw of whole chapters."""
    mixture = {}
    for code, (tag, share) in MIXTURE.items():
        chapters = read_chapters(data, code, "train")
        names = sorted(chapters)
        random.Random(f"{seed}-{tag}").shuffle(names)
        mixture[tag] = {name: chapters[name] for name in names[: round(share * len(names))]}
    return mixture


def train_tokenizer(mixture: dict[str, Chapters]) -> PreTrainedTokenizerFast:
    """Byte-level BPE fitted on the mixture itself, so that rare languages are also split more finely."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    verses = (v for chapters in mixture.values() for verses in chapters.values() for v in verses)
    tokenizer.train_from_iterator(verses, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=POSITIONS
    )


def documents(chapters: Chapters, draw: random.Random) -> Iterator[str]:
    """Runs of one to six verses, cut anew from the chapters in each epoch."""
    names = sorted(chapters)
    draw.shuffle(names)
    for name in names:
        verses, start = chapters[name], 0
        while start < len(verses):
            length = draw.randint(1, MAX_VERSES_PER_DOCUMENT)
            yield "\n".join(verses[start : start + length])
            start += length


def epoch_windows(
    mixture: dict[str, Chapters], tokenizer: PreTrainedTokenizerFast, window: int, seed: int, epoch: int
) -> Tensor:
    """All windows of one epoch, `[windows, window]`, shuffled over all languages."""
    rows = []
    for tag, chapters in mixture.items():
        draw = random.Random(f"{seed}-{epoch}-{tag}")
        texts = [END_OF_TEXT + text for text in documents(chapters, draw)]
        stream = [token for ids in tokenizer(texts)["input_ids"] for token in ids]
        rows += [stream[i : i + window] for i in range(0, len(stream) - window + 1, window)]
    random.Random(f"{seed}-{epoch}").shuffle(rows)
    return torch.tensor(rows, dtype=torch.long)


def held_out_verses(data: Path, split: str) -> dict[str, list[str]]:
    return {
        tag: [v for verses in read_chapters(data, code, split).values() for v in verses]
        for code, (tag, _) in MIXTURE.items()
    }
