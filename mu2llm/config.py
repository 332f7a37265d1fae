"""One experiment: data + model + stages + judge + evaluation + sweep + serving.

Presets are YAML files that override the defaults of `mu2llm.settings`, `--set a.b=c` overrides a preset, and the
resolved configuration is saved beside every artefact. Unknown keys and wrong values are a UserError of one line.
"""

from __future__ import annotations

import difflib
from importlib.resources import files
from typing import Any, Self

import yaml
from pydantic import ValidationError, model_validator

from mu2llm.errors import UserError
from mu2llm.records import PreprocessSpec
from mu2llm.settings.data import DataConfig
from mu2llm.settings.evaluation import EvaluationConfig
from mu2llm.settings.green import JudgeConfig
from mu2llm.settings.model import ModelConfig
from mu2llm.settings.section import Section, merged
from mu2llm.settings.serving import ServingConfig
from mu2llm.settings.stages import ContrastiveConfig, DpoConfig, PreferencesConfig, SftConfig
from mu2llm.settings.sweeps import SweepConfig
from mu2llm.settings.towers import FIXED, TOWERS, tower_spec


class Experiment(Section):
    """Everything that a run is made of. `name` is the preset's."""

    name: str = "custom"
    seed: int = 0
    data: DataConfig
    model: ModelConfig = ModelConfig()
    contrastive: ContrastiveConfig = ContrastiveConfig()
    sft: SftConfig = SftConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    dpo: DpoConfig = DpoConfig()
    judge: JudgeConfig = JudgeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    sweep: SweepConfig = SweepConfig()
    serving: ServingConfig = ServingConfig()

    @model_validator(mode="before")
    @classmethod
    def _spec_of_the_tower(cls, values: Any) -> Any:
        """A tower of another name than m3d brings its spec, in which `data.spec` of that name may change sizes, and of
        any name the number of series."""
        vision = _within(values, "model", "vision")
        if vision.get("tower", "m3d") not in (*TOWERS, "own") or vision.get("tower", "m3d") == "m3d":
            return values
        tower = tower_spec(vision["tower"], vision.get("own"), vision.get("sizes"))
        given = _within(values, "data", "spec")
        changed = given if given.get("name") == tower.name else {k: v for k, v in given.items() if k == "series"}
        spec = merged(tower.preprocess(), changed)
        return {**values, "data": {**values.get("data", {}), "spec": spec}}

    @model_validator(mode="after")
    def _as_the_tower_takes_it(self) -> Self:
        if self.model.vision.tower == "m3d":
            return self
        tower, spec = PreprocessSpec(**self.model.vision.spec.preprocess()), self.data.spec
        for field in FIXED:
            if getattr(tower, field) != getattr(spec, field):
                raise ValueError(
                    f"tower {tower.name} takes {field} {getattr(tower, field)}, data.spec has {getattr(spec, field)}: "
                    "unset it, or describe another tower as `own`"
                )
        return self

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        _, _, *chunk = self.data.spec.shape
        if any(size % patch for size, patch in zip(chunk, self.model.vision.patch_size, strict=True)):
            raise ValueError(
                f"model.vision.patch_size {self.model.vision.patch_size} does not divide the chunk {tuple(chunk)} "
                "of data.spec (slices, height, width)"
            )
        return self


def _within(values: Any, *keys: str) -> dict[str, Any]:
    """What lies below keys of plain values; nothing where it is not plain."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def presets() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(
        path.name.removesuffix(".yaml")
        for path in (files("mu2llm") / "presets").iterdir()
        if path.name.endswith(".yaml")
    )


def load(preset: str, overrides: list[str] | None = None) -> Experiment:
    """A preset by name or path of a YAML file, with `a.b=c` overrides applied; a UserError names what is wrong."""
    return override(_read_preset(preset), overrides or [])


def override(values: dict[str, Any], overrides: list[str]) -> Experiment:
    """Plain values, such as a checkpoint's own, with `a.b=c` overrides applied; a UserError names what is wrong."""
    for each in overrides:
        key, separator, text = each.partition("=")
        if not separator:
            raise UserError(f"--set {each}: expected KEY=VALUE, such as dpo.beta=0.2")
        _assign(values, key.strip().split("."), yaml.safe_load(text) if text else "")
    return validate(values)


def validate(values: dict[str, Any]) -> Experiment:
    """Plain values → an Experiment; the UserError names the key, what is wrong and the nearest known key."""
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise UserError(_one_line(error)) from None


def _read_preset(preset: str) -> dict[str, Any]:
    if preset.endswith((".yaml", ".yml")):
        try:
            with open(preset) as stream:
                values = yaml.safe_load(stream) or {}
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"preset {preset}: {str(error).splitlines()[0]}") from None
    else:
        path = files("mu2llm") / "presets" / f"{preset}.yaml"
        if not path.is_file():
            raise UserError(
                f"preset {preset!r} is not known; there are {', '.join(presets())}, or a path to a .yaml file"
            )
        values = yaml.safe_load(path.read_text())
    base = values.pop("extends", None)
    values.setdefault("name", preset)
    return merged(_read_preset(base), values) if base else values


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[keys[-1]] = value


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), _known_keys(first["loc"][:-1]), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_known_keys(first['loc'][:-1]))}"
        return f"configuration: {where} is not a key{hint}"
    if first["type"] == "value_error":  # our own, which says what was given
        return f"configuration: {where or 'experiment'}: {first['ctx']['error']}"
    return f"configuration: {where or 'experiment'}: {first['msg']}, given {first['input']!r:.80}"


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    model: Any = Experiment
    for part in path:
        model = model.model_fields[str(part)].annotation
    return list(getattr(model, "model_fields", {}))
