"""Overrides on the command line: a wrong one ends the program in one message that says what exists."""

import os
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf

_SWEEPS_OF_OTHERS = (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP)  # their values aren't in the text
# Keys that take more than their default's type.
_ANY = {"trainer.devices", "trainer.strategy", "trainer.deterministic", "pretrained"}
# Keys that take a number, which their default, a whole number or null, doesn't show.
_NUMBER = {"scheduler.warmup_epochs", "trainer.gradient_clip_val", "optimizer.layer_decay", "crop_pct", "test_size"}
_NUMBER |= {f"callbacks.resize.{key}" for key in ("min_size", "max_size", "start_epoch", "end_epoch")}
_NOT_NULL = {"epochs"}


def check_overrides(configs: Path, config_name: str, arguments: Sequence[str] | None = None) -> None:
    """End the program with one message if the command line's overrides don't fit ``configs/<config_name>.yaml``.

    The message names the override and what is accepted in its place: the keys of its node or the options of its group,
    with the likeliest one, or the type of the key's default. A sweep's keys are checked in its first job, its values in
    all. Hydra composes again afterwards and has the last word; with ``HYDRA_FULL_ERROR=1`` it has the only one.

    Args:
        arguments: of the program; None takes ``sys.argv[1:]``.
    """
    given = get_args_parser().parse_args(arguments)
    elsewhere = given.config_path or given.config_dir or given.experimental_rerun
    if elsewhere or given.shell_completion or given.hydra_help or os.environ.get("HYDRA_FULL_ERROR") == "1":
        return
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(configs.resolve())):
            _check(given.config_name or config_name, given.overrides)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _check(config_name: str, lines: Sequence[str]) -> None:
    overrides = [_parse(line) for line in lines]
    overrides = [override for override in overrides if override.value_type not in _SWEEPS_OF_OTHERS]
    loader = GlobalHydra.instance().config_loader()
    grouped = [bool(loader.get_group_options(override.key_or_group)) for override in overrides]
    chosen = [override for override, is_group in zip(overrides, grouped, strict=True) if is_group]
    changed = [override for override, is_group in zip(overrides, grouped, strict=True) if not is_group]
    base = _compose(config_name, chosen)
    try:
        _compose(config_name, overrides)
    except ValueError as error:
        raise ValueError(_explain(base, changed) or str(error)) from error
    for override in changed:
        if not override.is_delete() and not override.key_or_group.startswith("hydra."):
            _check_type(base, override)


def _parse(line: str) -> Override:
    try:
        return OverridesParser.create().parse_override(line)
    except HydraException as error:
        reason = ", ".join(t for t in str(error).splitlines() if not t.startswith(("Error parsing override", "See ")))
        raise ValueError(
            f"{line!r} can't be read: {reason}; accepted: key=value, group=option, +key=value, ++key=value, ~key"
        ) from error


def _compose(config_name: str, overrides: Sequence[Override]) -> DictConfig:
    """The configuration of these overrides' first job, with Hydra's own.

    Raises:
        ValueError: there is none.
    """
    try:
        return compose(config_name, [_first(override) for override in overrides], return_hydra_config=True)
    except MissingConfigException as error:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = GlobalHydra.instance().config_loader().get_group_options(group) if group else []
        if not options:
            raise ValueError(_one_line(error)) from error
        raise ValueError(
            f"{group}={option}: {group} has no option {option!r}{_did_you_mean(option, options)}; "
            f"it has {', '.join(options)}"
        ) from error
    except HydraException as error:
        raise ValueError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(part) for part in (error, error.__cause__) if part is not None)
    return " ".join(text.split("Config search path:")[0].split())


def _first(override: Override) -> str:
    if not override.is_sweep_override():
        return override.input_line
    return f"{override.get_key_element()}={next(iter(override.sweep_string_iterator()))}"


def _explain(base: DictConfig, overrides: Sequence[Override]) -> str | None:
    """What the first override of a key that isn't there should know; None if all are there."""
    added = tuple(override.key_or_group for override in overrides if override.is_add() or override.is_force_add())
    for override in overrides:
        if not override.key_or_group.startswith(added) and (unknown := _unknown(base, override.key_or_group)):
            return f"{override.input_line}: {unknown}"
    return None


def _unknown(base: DictConfig, key: str) -> str | None:
    """What exists where `key` leaves the configuration, None if it doesn't."""
    parts = key.split(".")
    for depth, part in enumerate(parts):
        path = ".".join(parts[:depth])
        node = _select(base, path) if path else base
        if isinstance(node, ListConfig):
            return None
        if not isinstance(node, DictConfig):
            return f"{path} is {node} and has no keys"
        names = {str(name) for name in node}
        if not path:
            names = (names | {group for group in base.hydra.runtime.choices if "/" not in group}) - {"hydra"}
        if part not in node and part not in names:
            names = sorted(names)
            advice = _did_you_mean(part, names, path) or _did_you_mean(part, _leaves(base))
            return f"{path or 'the configuration'} has no key {part!r}{advice}; it has {', '.join(names) or 'none'}"
    return None


def _select(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, key, throw_on_missing=False, throw_on_resolution_failure=False)


def _did_you_mean(name: str, known: Sequence[str], path: str = "") -> str:
    """Advice of the key in `known` whose last part is closest to `name`, behind `path`; "" if none is close."""
    by_end = {key.rpartition(".")[2]: key for key in reversed(known)}
    close = get_close_matches(name, by_end, n=1)
    return f" (did you mean {path + '.' if path else ''}{by_end[close[0]]}?)" if close else ""


def _leaves(config: DictConfig) -> list[str]:
    """Dotted keys of all values but Hydra's."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for name, value in node.items():
            yield f"{prefix}{name}"
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{name}.")

    plain = OmegaConf.to_container(config, resolve=False)
    plain.pop("hydra", None)
    return list(walk(plain, ""))


def _check_type(base: DictConfig, override: Override) -> None:
    """Raise ValueError if a value is of another type than the key's default; null is left to who reads it."""
    key = override.key_or_group
    wanted = None if key in _ANY else _accepted(0.0 if key in _NUMBER else _select(base, key))
    if wanted is None:
        return
    what, types = wanted
    sweep = override.is_sweep_override()
    for value in override.sweep_iterator() if sweep else [override.value()]:
        value = getattr(value, "text", value)
        refused = key in _NOT_NULL if value is None else not _is_a(value, types)
        if refused:
            line = f"{key}={value}" if sweep else override.input_line
            raise ValueError(f"{line} must be {what}")


def _accepted(default: Any) -> tuple[str, tuple[type, ...]] | None:
    """In words and as types what a key with this default takes, None if it takes anything."""
    if isinstance(default, bool):
        return "true or false", (bool,)
    if isinstance(default, int):
        return "a whole number", (int,)
    if isinstance(default, float):
        return "a number", (int, float)
    if isinstance(default, ListConfig):
        return "a list, e.g. [a,b]", (list,)
    if isinstance(default, DictConfig):
        return f"null, or a node with the keys {', '.join(map(str, default))}", (dict,)
    return None


def _is_a(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, str) and value.startswith("${"):
        return True
    return isinstance(value, types) and (isinstance(value, bool) is (bool in types))
