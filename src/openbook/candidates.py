"""What may stand in the place of a word when a run augments its task: a masked model's words, or near neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from openbook.data.sources import locate_model
from openbook.models.encoder import load_pretrained
from openbook.models.masked import MaskedWords
from openbook.retrieval.augment import Candidates, NearestWords, count_words, replaceable_words
from openbook.retrieval.bank import Bank
from openbook.retrieval.controls import texts_of
from openbook.workspace import Run


def candidates_for(run: Run, bank: Bank) -> Candidates:
    """The masked model's words if the recipe names one; else, and where it has none, neighbours by embeddings."""
    settings = run.recipe.corpus.augment
    nearest = nearest_words(run, bank)
    if settings.masked_model is None:
        return nearest
    return MaskedWords.load(locate_model(settings.masked_model), settings, nearest)


def nearest_words(run: Run, bank: Bank) -> NearestWords:
    counts: Counter[str] = count_words(passage.text for passage in bank.prefix())
    counts.update(count_words(text for row in run.task.train for text in texts_of(row)))

    def pieces_of(words: Sequence[str]) -> list[list[int]]:
        unknown = [run.teacher_tokenizer.unk_token_id]
        pieces = run.teacher_tokenizer(list(words), add_special_tokens=False)["input_ids"]
        return [[] if ids == unknown else ids for ids in pieces]

    teacher = load_pretrained(run.teacher_location, run.head, run.recipe.teacher.revision)
    embeddings = teacher.words().weight.detach().numpy()
    return NearestWords.of(counts, replaceable_words(run.task.train), pieces_of, embeddings, run.recipe.corpus.augment)
