"""Writes docs/cli.md and the pages of both kinds of recipe from the code (`python docs/regenerate.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from openbook.agnostic import AgnosticRecipe
from openbook.cli import app
from openbook.config import Recipe, Settings

DOCS = Path(__file__).parent
BOUNDS = {"exclusiveMinimum": "> {}", "minimum": "≥ {}", "exclusiveMaximum": "< {}", "maximum": "≤ {}"}
WORDS = {"string": "text", "boolean": "true or false", "integer": "integer", "number": "number"}

CLI_INTRO = """\
# Commands

Written from the program by `python docs/regenerate.py`; a test compares.

- Every command that takes a recipe runs what it needs first and skips what is up to date, so `openbook run` is the
  others in their order. `--dry-run` shows what would run, and why.
- `--set` lays a key over the recipe: `openbook run recipes/quickstart.yaml --set student.layers=2 --set 'seeds=[0]'`.
- Exit status: 0 done, 1 the run failed, 2 something to mend in the recipe, the files or the command line. Errors go to
  standard error.
"""

RECIPE_INTRO = """\
# The recipe

Written from `src/openbook/config.py` by `python docs/regenerate.py`; a test compares.

A recipe is one YAML file. `name`, `task`, `teacher` and `corpus` have to be there, all else has a default.
A key that is not in these tables is an error which names the nearest valid one, and so is a key that is written twice.
A block of which one key is set keeps the defaults of that place for the others. Only `terms` is taken as it is written:
a term it does not name weighs 0.
The recipe with every default written out is kept as `run.yaml` in the folder of the run.
"""


AGNOSTIC_INTRO = """\
# The task-agnostic recipe

Written from `src/openbook/agnostic.py` by `python docs/regenerate.py`; a test compares.

A recipe that names `students` teaches encoders that are fine-tuned later, for any task: a teacher learns many tasks at
once (or none), students imitate its attention relations on general text, and all are fine-tuned and judged.
`name`, `teacher`, `text` and `students` have to be there, all else has a default.
"""


def cli_page() -> str:
    commands: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    named = [leaf for name, command in commands.items() for leaf in leaves(name, command)]
    blocks = [f"## {name}\n\n```text\n{help_of(name, command)}\n```\n" for name, command in named]
    return "\n".join([CLI_INTRO, *blocks])


def leaves(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """A command, or those below it."""
    below = getattr(command, "commands", None)
    if below is None:
        yield name, command
    for word, one in (below or {}).items():
        yield from leaves(f"{name} {word}", one)


def help_of(name: str, command: Any) -> str:
    """The help text without boxes and colours, at a fixed width."""
    command.rich_markup_mode = None
    context = command.context_class(command, info_name=f"openbook {name}", terminal_width=110, max_content_width=110)
    return str(command.get_help(context)).rstrip()


@dataclass
class Block:
    """A settings model, and where in a recipe it may stand: place -> its defaults there."""

    schema: dict[str, Any]
    places: dict[str, dict[str, Any]] = field(default_factory=dict)


def recipe_page(model: type[Settings], intro: str) -> str:
    schema = model.model_json_schema()
    blocks: dict[str, Block] = {"Recipe": Block(schema, {"": {}})}
    collect(schema, "", {}, schema["$defs"], blocks)
    return "\n".join([intro, *(section(block) for block in blocks.values())])


def collect(
    model: dict[str, Any], place: str, default: dict[str, Any], models: dict[str, Any], blocks: dict[str, Block]
) -> None:
    """All blocks below one, in the order a recipe has them, each once."""
    for key, about in model["properties"].items():
        here = f"{place}.{key}" if place else key
        given = default.get(key, about.get("default"))
        for name in references(about):
            block = blocks.setdefault(name, Block(models[name]))
            block.places[here] = given if isinstance(given, dict) else {}
            collect(models[name], here, block.places[here], models, blocks)


def references(about: Any) -> Iterator[str]:
    if isinstance(about, dict):
        if "$ref" in about:
            yield about["$ref"].rpartition("/")[2]
        for name, part in about.items():
            if name != "default":
                yield from references(part)
    elif isinstance(about, list):
        for part in about:
            yield from references(part)


def section(block: Block) -> str:
    required = block.schema.get("required", ())
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key, about in block.schema["properties"].items():
        default = "required" if key in required else shown(about)
        rows.append(f"| `{key}` | {kind(about)} | {default} | {about.get('description', '')} |")
    return "\n".join([heading(block), "", block.schema["description"], "", *rows, *defaults(block), ""])


def heading(block: Block) -> str:
    places = ", ".join(f"`{place}`" for place in block.places if place)
    one_of = block.schema["properties"].get("kind", {}).get("const")
    return f"## {places or 'Top level'}" + (f" of kind `{one_of}`" if one_of else "")


def defaults(block: Block) -> list[str]:
    """The defaults of each place, where they differ from those in the table."""
    usual = {key: about.get("default") for key, about in block.schema["properties"].items()}
    lines = []
    for place, given in block.places.items():
        own = [f"`{key}: {written(given[key])}`" for key in usual if given.get(key, usual[key]) != usual[key]]
        if own and not any(isinstance(value, dict) for value in given.values()):
            lines.append(f"- Defaults of `{place}`: {', '.join(own)}.")
    return ["", *lines] if lines else []


def kind(about: Mapping[str, Any]) -> str:
    """A JSON schema type in words."""
    if "$ref" in about:
        return "block"
    if "const" in about:
        return f"`{about['const']}`"
    if "enum" in about:
        return ", ".join(f"`{choice}`" for choice in about["enum"])
    if "anyOf" in about or "oneOf" in about:
        parts = [kind(part) for part in about.get("anyOf", about.get("oneOf")) if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if about["type"] == "array":
        return f"list of {kind(about['items'])}"
    bounds = [form.format(f"{about[name]:g}") for name, form in BOUNDS.items() if name in about]
    return ", ".join([WORDS[about["type"]], *bounds])


def shown(about: Mapping[str, Any]) -> str:
    default = about.get("default")
    if default is None or isinstance(default, dict):
        return "none" if default is None else "see there"
    return f"`{written(default)}`"


def written(value: Any) -> str:
    """A value as a recipe has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


PAGES = {
    "cli.md": cli_page,
    "recipe.md": lambda: recipe_page(Recipe, RECIPE_INTRO),
    "task-agnostic-recipe.md": lambda: recipe_page(AgnosticRecipe, AGNOSTIC_INTRO),
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
