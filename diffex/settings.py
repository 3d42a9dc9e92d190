"""What settings are made of: documented, bounded dataclass fields; strict reading, ``a.b=v``, YAML, digests.

``diffex.config`` (an experiment) and ``diffex.screen`` (an ingest) hold the settings themselves: a frozen dataclass
whose fields are sections, each a frozen dataclass of ``setting(...)`` fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any, TypeVar, Union

import yaml

from diffex.errors import UserError, did_you_mean

S = TypeVar("S")
"""A frozen dataclass of sections."""


HARDWARE = ("device", "workers", "min_workers", "cpus", "gpus", "checkpoint_seconds", "failures")
"""Settings of a section ``run`` that say where things run, not what comes out: they change no digest."""


def setting(default: Any, doc: str, *, low: float | None = None, high: float | None = None,
            choices: tuple[str, ...] | None = None) -> Any:  # fmt: skip
    """A dataclass field with documentation, bounds (inclusive, element by element for tuples) and allowed words."""
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# ----------------------------------------------------------------------------------------------------------------------
# Dictionaries, files, digests


def to_dict(settings: Any) -> dict[str, Any]:
    """Plain nested dictionaries of any settings object: tuples become lists."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(settings))))


def flat(settings: Any) -> dict[str, Any]:
    """Dotted name -> value of every setting of an object made of sections."""
    return {f"{s}.{k}": v for s, section in to_dict(settings).items() for k, v in section.items()}


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    if is_dataclass(value) and not isinstance(value, type):
        value = to_dict(value)
        for name in HARDWARE:
            value.get("run", {}).pop(name, None)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build(kind: type[S], tree: Mapping[str, Any]) -> S:
    """Build settings from nested dictionaries; missing ones keep their defaults.

    Raises:
        UserError: an unknown key (with the nearest valid one), a wrong type, a value out of range.
    """
    sections: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for section, values in tree.items():
        if section not in hints:
            raise UserError(f"unknown section {section!r}: {did_you_mean(str(section), hints)}")
        if not isinstance(values, Mapping):
            raise UserError(f"section {section!r} must hold settings (key: value), got {values!r}")
        part = hints[section]
        types_ = typing.get_type_hints(part)
        for key in values:
            if key not in types_:
                raise UserError(f"unknown setting '{section}.{key}': {_nearest(kind, f'{section}.{key}')}")
        checked = {
            f.name: _check(types_[f.name], values[f.name], f"{section}.{f.name}", f.metadata)
            for f in fields(part)
            if f.name in values
        }
        sections[section] = part(**checked)
    return kind(**sections)


def replaced(old: S, settings: Mapping[str, Any]) -> S:
    """A copy with dotted settings replaced, e.g. ``{"autoencoder.lambda1": 0.1}``.

    Raises:
        UserError: an unknown name (the message names the nearest valid one) or a value out of range.
    """
    tree = to_dict(old)
    for name, value in settings.items():
        section, _, key = name.partition(".")
        if section in tree and not key:
            raise UserError(f"{name!r} is a section; name one of its settings, e.g. {name}.{next(iter(tree[name]))}")
        if section not in tree or key not in tree[section]:
            raise UserError(f"unknown setting {name!r}: {_nearest(type(old), name)}")
        tree[section][key] = value
    return build(type(old), tree)


def read_yaml(text: bytes | str, name: str) -> dict[str, Any]:
    """Sections and settings of a YAML file's text; ``name`` is for messages.

    Raises:
        UserError: not YAML, or not sections.
    """
    try:
        tree = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, Mapping):
        raise UserError(f"{name} must hold sections such as 'autoencoder:', got {type(tree).__name__}")
    return dict(tree)


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Turn ``["a.b=v", ...]`` into dotted settings; v is read as YAML, so ``[1, 2]``, ``null`` and ``true`` work."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--set takes a.b=v, got {pair!r}")
        try:
            settings[name.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # 2020-13-45 looks like a date
            raise UserError(f"--set {name.strip()}: {value!r} is not a YAML value; quote it") from None
    return settings


def describe(settings: Any) -> str:
    """All settings as YAML, each setting with its documentation as a comment."""
    lines = []
    for section in fields(settings):
        part = getattr(settings, section.name)
        lines.append(f"{section.name}:  # {(type(part).__doc__ or '').strip()}")
        for f in fields(part):
            value = yaml.safe_dump(to_dict(part)[f.name], default_flow_style=True, allow_unicode=True, width=10_000)
            text = f"  {f.name}: {value.removesuffix(chr(10)).removesuffix(chr(10) + '...')}"
            choices = f.metadata.get("choices")
            doc = f.metadata["doc"] + (f" ({' | '.join(choices)})" if choices else "")
            lines.append(f"{text:<43} # {doc}")
    return "\n".join(lines) + "\n"


def _nearest(kind: type, name: str) -> str:
    """The nearest full dotted name: first within the section, then anywhere."""
    section, _, key = name.partition(".")
    every = [n for n in flat(kind()) if "." in n]
    sections = {n.split(".")[0] for n in every}
    if section not in sections:  # misspelt, or left out
        same = [n for n in every if not key and n.endswith(f".{section}")]
        near = difflib.get_close_matches(name, every, n=1)
        return f"did you mean {(same or near)[0]!r}?" if same or near else did_you_mean(section, sections)
    here = [n.split(".", 1)[1] for n in every if n.startswith(section + ".")]
    hint = did_you_mean(key, here)
    if hint.startswith("did"):
        return f"did you mean '{section}.{hint.split(chr(39))[1]}'?"
    elsewhere = [n for n in every if n.endswith("." + key)]
    return f"did you mean {elsewhere[0]!r}?" if elsewhere else hint


def _check(kind: Any, value: Any, name: str, rules: Mapping[str, Any]) -> Any:
    """Turn a YAML value into the type of the setting, within its bounds."""

    def wrong(expected: str) -> UserError:
        return UserError(f"{name} must be {expected}, got {value!r}")

    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _check(next(a for a in args if a is not types.NoneType), value, name, rules)
    if origin is tuple:
        if isinstance(value, str) and (args[0] is str or "," in value):  # 'DNA,actin' for ["DNA", "actin"]
            words = [part.strip() for part in value.split(",") if part.strip()]
            value = words if args[0] is str else [yaml.safe_load(word) for word in words]
        if not isinstance(value, list | tuple):
            raise wrong(f"a list, e.g. --set {name}='[{'a, b' if args[0] is str else '1, 2'}]'")
        return tuple(_check(args[0], v, name, rules) for v in value)  # bounds and words hold for every element
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong("a mapping")
        return {str(k): _check(args[1], v, f"{name}.{k}", {}) for k, v in value.items()}
    if kind is bool:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    if kind is str:
        if isinstance(value, int | float) and not isinstance(value, bool):  # a class called 1
            value = str(value)
        if not isinstance(value, str):
            raise wrong("a word")
        if rules.get("choices") and value not in rules["choices"]:
            raise UserError(f"{name} = {value!r}: {did_you_mean(value, rules['choices'])}")
        return value
    if isinstance(value, str):  # YAML reads 1e-4 as a word
        try:
            value = float(value)
        except ValueError:
            raise wrong("a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong("a number")
    if kind is int and float(value) != int(value):
        raise wrong("a whole number")
    value = int(value) if kind is int else float(value)
    low, high = rules.get("low"), rules.get("high")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
        raise wrong(bounds)
    return value
