"""A module imports what stands below it, never above; light rooms start without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import fishr
import house

ROOMS = house.rooms()


def upward_imports(path: Path, room: str) -> list[str]:
    return [
        name for name, other in house.imported_rooms(path) if other in ROOMS and ROOMS.index(other) < ROOMS.index(room)
    ]


@pytest.mark.parametrize("path", house.modules(), ids=lambda path: str(path.relative_to(house.SOURCE)))
def test_imports_lead_downwards(path):
    room = house.room_of(path)
    assert room in ROOMS, f"{path} stands in no room of the house"
    assert not upward_imports(path, room)


def test_every_room_has_modules():
    assert {house.room_of(path) for path in house.modules()} == set(ROOMS)


def test_an_upward_import_is_found(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("def late():\n    from fishr.training import train\n")
    assert upward_imports(module, "algorithms") == ["fishr.training", "fishr.training.train"]
    module.write_text("from fishr import FishrPenalty, train\n")
    assert upward_imports(module, "algorithms") == ["fishr.train"]


def test_the_picture_leaves_out_arrows_that_follow_from_others():
    direct = house.direct({"cli": {"training", "errors"}, "training": {"errors"}, "errors": set()})
    assert direct == {"cli": {"training"}, "training": {"errors"}, "errors": set()}
    drawn = house.picture(direct)
    assert [room for room in ROOMS if f">{room}</text>" in drawn] == ["cli", "training", "errors"]
    assert drawn.count("C") == 2  # one curve from floor to floor for each arrow


def test_in_the_picture_arrows_lead_down_and_nothing_lies_on_something_else():
    arrows = house.direct(house.arrows())
    floors = house.floors_of(arrows)
    assert all(floors[room] < floors[other] for room in arrows for other in arrows[room])
    columns = house.columns_of(arrows, floors, house.routes(arrows, floors))
    places = [(house.floor_of(node, floors), column) for node, column in columns.items()]
    assert len(set(places)) == len(places) >= len(ROOMS)


def test_light_rooms_start_without_torch():
    script = (
        "import sys, fishr, fishr.cli, fishr.records, fishr.reports.tables, fishr.space, fishr.registry, fishr.errors;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_rooms_are_reached_from_the_package():
    script = "import fishr; assert fishr.training.train is fishr.train"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_public_names_exist():
    for name in fishr.__all__:
        assert getattr(fishr, name) is not None
    with pytest.raises(AttributeError, match="module 'fishr' has no attribute 'nothing'"):
        fishr.nothing  # noqa: B018
