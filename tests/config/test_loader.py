"""YAML to dataclasses: includes, overrides, strict keys and types, one-line errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from spear.config import load_config, to_json
from spear.config.loader import load_yaml
from spear.errors import ConfigError
from spear.registry import Registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape(Registry):
    TABLE: ClassVar[dict[str, str]] = {
        "circle": "tests.config.test_loader:Circle",
        "box": "tests.config.test_loader:Box",
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Circle(Shape):
    radius: float = 1.0

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise ConfigError(f"`radius` must be positive, but is {self.radius}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Box(Shape):
    sides: list[int] = field(default_factory=lambda: [1, 2])


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    rate: float = 0.5
    count: int = 3
    mode: Literal["fast", "exact"] = "fast"


@dataclass(frozen=True, kw_only=True, slots=True)
class Root:
    name: str
    inner: Inner = field(default_factory=Inner)
    shapes: dict[str, Shape] = field(default_factory=dict)
    flag: bool = False
    limit: float | None = None


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_load_config_raises_config_error_when_a_key_is_there_twice(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\ninner: {rate: 1.0}\nflag: true\ninner: {count: 5}\n")
    with pytest.raises(ConfigError, match=r"r\.yaml is not valid YAML: the key 'inner' is there twice .*line 4"):
        load_config(Root, path)


def test_load_config_reads_merges_of_a_deeper_anchor(tmp_path: Path) -> None:
    text = "include: base.yaml\nx: &x {k: 0, m: 2}\na:\n  deep: &b\n    <<: *x\n    k: 1\nchild:\n  <<: *b\n  z: 3\n"
    write(tmp_path, "a: {other: 1}\n", "base.yaml")
    found = load_yaml(write(tmp_path, text))
    assert found["child"] == {"k": 1, "m": 2, "z": 3}
    assert found["a"] == {"other": 1, "deep": {"k": 1, "m": 2}}


def test_load_config_raises_config_error_when_an_override_has_a_key_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the key 'rate' is there twice"):
        load_config(Root, write(tmp_path, "name: a\n"), ["inner={rate: 1.0, rate: 2.0}"])


def test_load_config_reads_anchors_and_merges(tmp_path: Path) -> None:
    found = load_config(Root, write(tmp_path, "name: a\nshapes:\n  one: &one {type: circle, radius: 2.0}\n  two: {<<: *one, radius: 3.0}\n"))
    assert [shape.radius for shape in found.shapes.values()] == [2.0, 3.0]  # type: ignore[attr-defined]


def test_load_config_reads_scientific_notation_as_number(tmp_path: Path) -> None:
    config = load_config(Root, write(tmp_path, "{name: a, inner: {rate: 5e-4}, limit: 1e3}"))
    assert config.inner.rate == 5e-4
    assert config.limit == 1000.0


def test_load_config_builds_tagged_variants(tmp_path: Path) -> None:
    config = load_config(Root, write(tmp_path, "{name: a, shapes: {x: {type: circle, radius: 2}, y: {type: box, sides: [4]}}}"))
    assert config.shapes == {"x": Circle(radius=2.0), "y": Box(sides=[4])}


def test_load_config_takes_private_classes_by_dotted_path(tmp_path: Path) -> None:
    config = load_config(Root, write(tmp_path, '{name: a, shapes: {x: {type: "tests.config.test_loader:Circle"}}}'))
    assert config.shapes["x"] == Circle()


def test_to_json_keeps_tags(tmp_path: Path) -> None:
    config = load_config(Root, write(tmp_path, "{name: a, shapes: {x: {type: circle}}}"))
    assert to_json(config)["shapes"]["x"] == {"type": "circle", "radius": 1.0}


def test_overrides_reach_nested_keys(tmp_path: Path) -> None:
    path = write(tmp_path, "{name: a, shapes: {x: {type: circle}}}")
    config = load_config(Root, path, ["inner.count=7", "shapes.x.radius=3", "flag=true", "inner.rate=1e-3"])
    assert (config.inner.count, config.shapes["x"], config.flag, config.inner.rate) == (7, Circle(radius=3.0), True, 1e-3)


def test_override_of_a_type_replaces_the_variant(tmp_path: Path) -> None:
    path = write(tmp_path, "{name: a, shapes: {x: {type: circle, radius: 2}}}")
    assert load_config(Root, path, ["shapes.x={type: box}"]).shapes["x"] == Box()


def test_include_lays_keys_over_the_included_file(tmp_path: Path) -> None:
    write(tmp_path, "{name: base, inner: {rate: 0.1, count: 9}, shapes: {x: {type: circle, radius: 2}}}", "base.yaml")
    config = load_config(Root, write(tmp_path, "include: base.yaml\ninner: {count: 1}\nshapes: {x: {type: box}}\n"))
    assert (config.name, config.inner, config.shapes["x"]) == ("base", Inner(rate=0.1, count=1), Box())


def test_null_takes_a_mapping_of_the_included_file_away(tmp_path: Path) -> None:
    write(tmp_path, "{name: base, limit: 2.0, shapes: {x: {type: circle}, y: {type: box}}}", "base.yaml")
    config = load_config(Root, write(tmp_path, "include: base.yaml\nlimit: null\nshapes: {x: null}\n"))
    assert (config.shapes, config.limit) == ({"y": Box()}, None)


def test_include_raises_config_error_when_circular(tmp_path: Path) -> None:
    path = write(tmp_path, "include: r.yaml")
    with pytest.raises(ConfigError, match="includes itself"):
        load_config(Root, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: a, iner: {}}", r"`iner` is not a known key; did you mean `inner`\?"),
        ("{name: a, inner: {rat: 1}}", r"`inner.rat` is not a known key; did you mean `rate`\?"),
        ("{inner: {}}", "`name` is missing"),
        ("{name: 3}", "`name` must be text, but is 3"),
        ("{name: a, inner: {count: 1.5}}", "`inner.count` must be a whole number, but is 1.5"),
        ("{name: a, inner: {count: true}}", "`inner.count` must be a whole number, but is True"),
        ("{name: a, inner: {rate: abc}}", "`inner.rate` must be a number, but is 'abc'"),
        ("{name: a, inner: {rate: true}}", "`inner.rate` must be a number, but is True"),
        ("{name: a, flag: 1}", "`flag` must be true or false, but is 1"),
        ("{name: a, inner: {mode: fats}}", r"`inner.mode` must be one of fast, exact, but is 'fats'; did you mean `fast`\?"),
        ("{name: a, inner: [1]}", "`inner` must be a mapping"),
        ("{name: a, shapes: {x: {radius: 1}}}", "`shapes.x.type` is missing: one of circle, box"),
        ("{name: a, shapes: {x: {type: circel}}}", r"did you mean `circle`\?.*`shapes.x.type`"),
        ("{name: a, shapes: {x: {type: circle, radius: -1}}}", "`radius` must be positive, but is -1.0.*shapes.x"),
        ("{name: a, shapes: {x: {type: box, sides: [1, b]}}}", "`shapes.x.sides.1` must be a whole number, but is 'b'"),
        ("[1]", "must hold a mapping"),
        ("{a: b: c}", "not valid YAML"),
    ],
)
def test_load_config_raises_config_error_when_a_key_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Root, write(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "r.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [("flag", "must be key=value"), ("inner.rate.x=1", "`inner.rate` is a value"), ("inner.nope=1", "`inner.nope` is not a known key")],
)
def test_load_config_raises_config_error_when_an_override_is_wrong(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Root, write(tmp_path, "{name: a, inner: {rate: 1}}"), [override])


def test_load_config_raises_config_error_when_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml cannot be read"):
        load_config(Root, tmp_path / "nothing.yaml")
