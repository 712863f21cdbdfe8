"""Is an evaluation sentence in a corpus? Looks for itself: shares no code with openbook, reads only the files.

    python benchmarks/check_leaks.py runs/NAME/corpus/passages.parquet $OPENBOOK_DATA/tasks/{sst2,mrpc}/{dev,test}.jsonl

Prints how many texts were compared; exits with 1 if a passage equals an evaluation text but for case, punctuation and
white space, or shares eight consecutive words with one.
"""

import json
import re
import sys
import unicodedata

import pyarrow.parquet as pq

RUN = 8


def words(text):
    return tuple(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def main(corpus, files):
    whole, runs, rows = set(), {}, 0
    for name in files:
        with open(name, encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                for text in filter(None, (row.get("text_a"), row.get("text_b"))):
                    rows += 1
                    found = words(text)
                    whole.add(found)
                    for start in range(len(found) - RUN + 1):
                        runs.setdefault(found[start : start + RUN], text)
    table = pq.read_table(corpus, columns=["text"])
    leaks = []
    for text in table["text"].to_pylist():
        found = words(text)
        shared = [found[i : i + RUN] for i in range(len(found) - RUN + 1) if found[i : i + RUN] in runs]
        if found in whole or shared:
            leaks.append((text, runs[shared[0]] if shared else text))
    print(f"{table.num_rows} passages against {rows} evaluation texts of {len(files)} files: {len(leaks)} leaks")
    for passage, text in leaks[:10]:
        print(f"  {passage!r}\n  has of {text!r}")
    return 1 if leaks else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
