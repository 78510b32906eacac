"""YAML becomes frozen values, or one line that names the key."""

import pickle
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from repro.configuration import accepted, build, plain, twin
from repro.errors import UserError
from repro.settings import Settings


@dataclass(frozen=True)
class Wheel:
    size: float
    spokes: int = 32


@dataclass(frozen=True)
class Bicycle:
    name: str
    front: Wheel
    rear: Wheel | None = None
    gears: tuple[int, ...] = (1, 2)
    range_mm: tuple[float, float] = (0.0, 1.0)
    parts: dict[str, float] = field(default_factory=dict)
    spares: tuple[Wheel, ...] = ()
    brake: Literal["rim", "disc"] = "rim"
    bell: bool = False
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise UserError("name: empty")


FULL = {
    "name": "tourer",
    "front": {"size": 28, "spokes": 36},
    "rear": {"size": 27.5},
    "gears": [3, 4, 5],
    "range_mm": [1, 2],
    "parts": {"chain": 1},
    "spares": [{"size": 20}],
    "brake": "disc",
    "bell": True,
    "notes": {"anything": [1, {"deep": None}]},
}


def test_build_gives_nested_frozen_values_with_tuples_and_floats() -> None:
    bicycle = build(Bicycle, FULL)
    assert bicycle.front == Wheel(28.0, 36)
    assert bicycle.rear == Wheel(27.5, 32)
    assert bicycle.gears == (3, 4, 5)
    assert bicycle.range_mm == (1.0, 2.0)
    assert isinstance(bicycle.front.size, float)
    assert isinstance(bicycle.parts["chain"], float)
    assert bicycle.spares == (Wheel(20.0),)
    assert bicycle.notes == {"anything": [1, {"deep": None}]}


def test_defaults_fill_what_is_not_given_and_null_is_kept() -> None:
    bicycle = build(Bicycle, {"name": "a", "front": {"size": 1}, "rear": None})
    assert bicycle == Bicycle("a", Wheel(1.0))


def test_plain_is_the_inverse_of_build() -> None:
    bicycle = build(Bicycle, FULL)
    assert build(Bicycle, plain(bicycle)) == bicycle


@given(st.floats(allow_nan=False), st.integers(), st.lists(st.integers()))
def test_any_plain_value_survives_the_round_trip(size: float, spokes: int, gears: list[int]) -> None:
    bicycle = Bicycle("a", Wheel(size, spokes), gears=tuple(gears))
    assert build(Bicycle, plain(bicycle)) == bicycle


@pytest.mark.parametrize(
    ("change", "key", "hint"),
    [
        ({"colour": 1}, "colour", "accepted: bell, brake"),
        ({"front": {"size": 1, "rim": 2}}, "front.rim", "accepted: size, spokes"),
        ({"front": {}}, "front.size", "accepted: a number"),
        ({"front": {"size": "abc"}}, "front.size", "'abc' does not fit; accepted: a number"),
        ({"front": {"size": True}}, "front.size", "a number"),
        ({"front": {"size": 1, "spokes": 1.5}}, "front.spokes", "1.5 does not fit; accepted: a whole number"),
        ({"front": 3}, "front", "accepted: keys size, spokes"),
        ({"front": None}, "front", "accepted: keys size, spokes"),
        ({"rear": {"size": None}}, "rear.size", "None does not fit"),
        ({"gears": 3}, "gears", "a list of a whole number"),
        ({"gears": [1, "x"]}, "gears[1]", "'x' does not fit"),
        ({"range_mm": [1]}, "range_mm", "[1] does not fit"),
        ({"parts": [1]}, "parts", "[1] does not fit"),
        ({"parts": {"chain": "x"}}, "parts.chain", "'x' does not fit"),
        ({"spares": [{"size": 1}, {"size": "x"}]}, "spares[1].size", "'x' does not fit"),
        ({"brake": "drum"}, "brake", "'drum' does not fit; accepted: 'rim', 'disc'"),
        ({"bell": 1}, "bell", "accepted: true or false"),
        ({"name": 5}, "name", "accepted: a text"),
        ({"name": ""}, "name", "empty"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_is_accepted(change: dict[str, Any], key: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        build(Bicycle, {**FULL, **change})
    message = str(caught.value)
    assert message.startswith(f"{key}: ")
    assert hint in message
    assert "\n" not in message


def test_a_whole_number_may_be_written_as_a_float() -> None:
    assert build(Wheel, {"size": 1, "spokes": 24.0}).spokes == 24


def test_accepted_describes_a_key_through_lists_dictionaries_and_null() -> None:
    assert accepted(Bicycle, "front.size") == "a number"
    assert accepted(Bicycle, "rear.spokes") == "a whole number"
    assert accepted(Bicycle, "spares[0].size") == "a number"
    assert accepted(Bicycle, "parts.chain") == "a number"
    assert accepted(Bicycle, "brake") == "'rim', 'disc'"
    assert accepted(Bicycle, "rear") == "keys size, spokes or null"
    assert accepted(Bicycle, "notes.deep.down") == "any value"


def test_the_twin_lets_omegaconf_refuse_unknown_keys_and_wrong_types() -> None:
    schema = OmegaConf.structured(twin(Bicycle))
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(schema, {"colour": 1})
    with pytest.raises(ValidationError):
        OmegaConf.merge(schema, {"front": {"size": "abc"}})
    with pytest.raises(ValidationError):
        OmegaConf.merge(schema, {"gears": ["x"]})


def test_values_pass_through_the_twin_unchanged() -> None:
    merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(twin(Bicycle)), FULL))
    assert isinstance(merged, dict)
    assert build(Bicycle, {str(key): value for key, value in merged.items()}) == build(Bicycle, FULL)


def test_a_mandatory_value_stays_missing_in_the_twin() -> None:
    assert OmegaConf.missing_keys(OmegaConf.structured(twin(Wheel))) == {"size"}


def test_two_instances_of_a_twin_share_no_mutable_default() -> None:
    first, second = twin(Bicycle)(), twin(Bicycle)()
    first.gears.append(9)
    assert second.gears == [1, 2]


def test_the_schema_of_the_settings_is_found_by_name_in_another_process() -> None:
    schema = twin(Settings)
    assert pickle.loads(pickle.dumps(schema)) is schema
