"""Other BM25 engines over the same words: bm25s, tantivy and PISA, each as its documentation says it is fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from openbook.retrieval.bm25 import Index
from openbook.retrieval.passages import lex

# positions and scores of the best hits of every query, best first
Searcher = Callable[[Sequence[str]], tuple[list[list[int]], list[list[float]]]]

K1, B = 1.2, 0.75
THREADS = 2


def texts_of(shards: Sequence[Path]) -> Iterator[str]:
    for shard in shards:
        for batch in pq.ParquetFile(shard).iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()


def open_ours(folder: Path, k: int) -> Searcher:
    index = Index.load(folder, K1, B)

    def search(queries: Sequence[str]) -> tuple[list[list[int]], list[list[float]]]:
        found = index.search(queries, k, threads=THREADS)
        bounds = list(zip(found.offsets[:-1].tolist(), found.offsets[1:].tolist(), strict=True))
        positions, scores = found.positions.tolist(), found.scores.tolist()
        return [positions[a:b] for a, b in bounds], [scores[a:b] for a, b in bounds]

    return search


def build_bm25s(shards: Sequence[Path], folder: Path) -> None:
    import bm25s
    from bm25s.tokenization import Tokenized

    numbers: dict[str, int] = {}
    ids = [[numbers.setdefault(word, len(numbers)) for word in lex(text)] for text in texts_of(shards)]
    retriever = bm25s.BM25(method="lucene", k1=K1, b=B, backend="numba")
    retriever.index(Tokenized(ids=ids, vocab=numbers), show_progress=False)
    retriever.save(str(folder))


def open_bm25s(folder: Path, k: int) -> Searcher:
    import bm25s

    retriever = bm25s.BM25.load(str(folder), load_vocab=True)
    retriever.backend = "numba"
    retriever.activate_numba_scorer()

    def search(queries: Sequence[str]) -> tuple[list[list[int]], list[list[float]]]:
        words = [[word for word in lex(query) if word in retriever.vocab_dict] for query in queries]
        found = retriever.retrieve(words, k=k, n_threads=THREADS, backend_selection="numba", show_progress=False)
        kept = found.scores > 0
        rows = range(len(words))
        return (
            [found.documents[row][kept[row]].tolist() for row in rows],
            [found.scores[row][kept[row]].tolist() for row in rows],
        )

    return search


def build_tantivy(shards: Sequence[Path], folder: Path) -> None:
    import tantivy

    folder.mkdir(parents=True)
    index = tantivy.Index(tantivy_schema(), path=str(folder))
    register(index)
    writer = index.writer(heap_size=500_000_000, num_threads=THREADS)
    for position, text in enumerate(texts_of(shards)):
        writer.add_document(tantivy.Document(text=" ".join(lex(text)), position=position))
    writer.commit()
    writer.wait_merging_threads()


def tantivy_schema() -> Any:
    import tantivy

    builder = tantivy.SchemaBuilder()
    builder.add_text_field("text", stored=False, tokenizer_name="words", index_option="freq")
    builder.add_integer_field("position", stored=False, fast=True)
    return builder.build()


def register(index: Any) -> None:
    import tantivy

    index.register_tokenizer("words", tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.whitespace()).build())


def open_tantivy(folder: Path, k: int) -> Searcher:
    from concurrent.futures import ThreadPoolExecutor

    import tantivy

    index = tantivy.Index.open(str(folder))
    register(index)
    schema, searcher, pool = index.schema, index.searcher(), ThreadPoolExecutor(THREADS)

    def one(query: str) -> tuple[list[int], list[float]]:
        clauses = [(tantivy.Occur.Should, tantivy.Query.term_query(schema, "text", word)) for word in lex(query)]
        hits = searcher.search(tantivy.Query.boolean_query(clauses), limit=k, count=False).hits
        positions = searcher.fast_field_values("position", [address for _, address in hits])
        return [int(position or 0) for position in positions], [score for score, _ in hits]

    def search(queries: Sequence[str]) -> tuple[list[list[int]], list[list[float]]]:
        found = list(pool.map(one, queries))
        return [positions for positions, _ in found], [scores for _, scores in found]

    return search


def build_pisa(shards: Sequence[Path], folder: Path) -> None:
    from pyterrier_pisa import PisaIndex

    index = PisaIndex(str(folder), text_field="text", stemmer="none", stops="none", threads=THREADS)
    index.index({"docno": str(place), "text": " ".join(lex(text))} for place, text in enumerate(texts_of(shards)))


def open_pisa(folder: Path, k: int) -> Searcher:
    import pandas as pd
    from pyterrier_pisa import PisaIndex

    index = PisaIndex(str(folder), stemmer="none", stops="none", threads=THREADS)
    retrieve = index.bm25(k1=K1, b=B, num_results=k, threads=THREADS, precompute_impact=True)

    def search(queries: Sequence[str]) -> tuple[list[list[int]], list[list[float]]]:
        asked = pd.DataFrame(
            {"qid": [str(q) for q in range(len(queries))], "query": [" ".join(lex(q)) for q in queries]}
        )
        found = retrieve(asked)
        rows = found["qid"].astype(int).to_numpy()
        order = np.lexsort((found["rank"].to_numpy(), rows))
        ends = np.cumsum(np.bincount(rows, minlength=len(queries)))
        positions = np.split(found["docno"].astype(int).to_numpy()[order], ends[:-1])
        scores = np.split(found["score"].to_numpy()[order], ends[:-1])
        return [row.tolist() for row in positions], [row.tolist() for row in scores]

    return search


RIVALS = {"bm25s": (build_bm25s, open_bm25s), "tantivy": (build_tantivy, open_tantivy), "pisa": (build_pisa, open_pisa)}
NEEDED = {"bm25s": "bm25s", "tantivy": "tantivy", "pisa": "pyterrier_pisa"}  # module of each


def flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return list(chain.from_iterable(rows))
