"""A recipe from its YAML file: overrides laid over it, mistakes named by key, value and fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from openbook.agnostic import AgnosticRecipe
from openbook.config import Recipe, Settings, UsageError

Model = TypeVar("Model", bound=Settings)

MERGE = "tag:yaml.org,2002:merge"  # `<<`, which lays another block below this one


class StrictLoader(yaml.SafeLoader):
    """YAML without its best known trap: a key that is written twice is an error, not a silent overwrite."""


def no_duplicates(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == MERGE:
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be one word", key_node.start_mark)
        key = loader.construct_object(key_node)
        if key in seen:
            line = key_node.start_mark.line + 1
            raise UsageError(f"{key!r} is set twice in one block (line {line}); remove one")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, no_duplicates)


def parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, StrictLoader)  # noqa: S506  a SafeLoader
    except UsageError as error:
        raise UsageError(f"{origin}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise UsageError(f"{origin} is not valid YAML: {error}") from error


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Any:
    """The recipe in a YAML file, with `key=value` overrides laid over it: task-agnostic if it names `students`.

    Raises UsageError for a missing file, bad YAML, unknown keys (naming the nearest valid one) and bad values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        shipped = ", ".join(str(p) for p in sorted(Path("recipes").glob("*.yaml"))) or "none in ./recipes"
        raise UsageError(f"no recipe at {path}; `openbook init --data FILE` writes one (here: {shipped})") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); name a YAML file") from error
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise UsageError(f"{path} holds {type(raw).__name__}, not a recipe of `key: value` lines")
    for override in overrides:
        apply_override(raw, override)
    return validate_as(AgnosticRecipe if "students" in raw else Recipe, raw, str(path))


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Lay `student.layers=4` over a raw recipe. The value is read as YAML, like the recipe itself."""
    dotted, equals, value = override.partition("=")
    if not equals or not dotted:
        raise UsageError(f"--set {override!r} is not of the form key=value, such as student.layers=4")
    lay(raw, dotted.strip(), parse_yaml(value, f"--set {dotted}"), f"--set {dotted}")


def lay(raw: dict[str, Any], dotted: str, value: Any, origin: str) -> None:
    """Set one dotted key of a raw recipe."""
    *parents, last = dotted.split(".")
    place = raw
    for parent in parents:
        below = place.get(parent)
        if below is None:
            below = place[parent] = {}
        if not isinstance(below, dict):
            raise UsageError(f"{origin}: {parent!r} is {below!r} in the recipe, so nothing can be set below it")
        place = below
    place[last] = value


def validate_recipe(raw: dict[str, Any], origin: str) -> Recipe:
    return validate_as(Recipe, raw, origin)


def validate_as(model: type[Model], raw: dict[str, Any], origin: str) -> Model:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = "\n".join(f"  {problem}" for problem in explain(error, model))
        raise UsageError(f"{origin}:\n{problems}") from None


def explain(error: ValidationError, model: type[BaseModel] = Recipe) -> Iterator[str]:
    """One line a problem: the dotted key, the value, and what would be right."""
    places = [problem["loc"] for problem in error.errors()]
    for problem in error.errors():
        if is_echo(problem, places):
            continue
        key = dotted_key(problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"{key}: unknown key; {nearest_key(problem['loc'], model)}"
        elif problem["type"] == "missing":
            yield f"{key}: missing; add it to the recipe"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = problem["input"]
            shown = "" if isinstance(given, dict | BaseModel) else f"{given!r}: "
            yield f"{key + ': ' if key else ''}{shown}{message}{yaml_hint(given)}"


def is_echo(problem: Any, places: Sequence[tuple[int | str, ...]]) -> bool:
    """Whether a problem only repeats another: a list that is short for a bad item, the branch of a union not meant."""
    place = problem["loc"]
    short = problem["type"] == "too_short" and any(p[: len(place)] == place and p != place for p in places)
    return short or (place[-1:] == ("str",) and isinstance(problem["input"], dict))


def yaml_hint(value: Any) -> str:
    if isinstance(value, bool):
        return "; YAML reads an unquoted yes, no, on, off, true or false as a truth value: quote it if it is a word"
    return ""


def dotted_key(location: tuple[int | str, ...]) -> str:
    """The key as the user wrote it: the tags of unions, which pydantic adds to the path, are left out."""
    *above, last = map(str, location or ("",))
    kept = [part for part in above if part not in ("file", "package", "hub")] + [last]
    return ".".join(part for part in kept if part not in ("str", "PackagedModel") and "[" not in part)


def nearest_key(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """The valid keys beside an unknown one, the most similar first."""
    model = model_at(location[:-1], root)
    if model is None:
        return "remove it"
    valid = list(model.model_fields)
    near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid keys here: {', '.join(valid)}"


def model_at(location: Sequence[int | str], root: type[BaseModel]) -> type[BaseModel] | None:
    """The settings model that a path of keys (and union tags) leads to."""
    found: tuple[type[BaseModel], ...] = (root,)
    for part in location:
        if isinstance(part, str) and len(found) > 1:  # the tag of a union, which may be the name of a key too
            found = tuple(m for m in found if part == default_kind(m))
            continue
        below = [m.model_fields[part].annotation for m in found if isinstance(part, str) and part in m.model_fields]
        if below:
            found = tuple(models_in(below[0]))
        elif isinstance(part, str):
            found = tuple(m for m in found if part in (m.__name__, default_kind(m))) or found
    return found[0] if found else None


def default_kind(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation)[0] if kind is not None and get_args(kind.annotation) else None


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def dump_recipe(recipe: Settings) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
