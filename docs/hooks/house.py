"""The rooms of the package and which imports which, and a picture of them.

The table in docs/architecture.md says which rooms there are, from the roof down; the source says what they import.
tests/test_architecture.py checks one against the other.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import TypeAlias

import fishr

SOURCE = Path(fishr.__file__).parent
DOCUMENT = Path(__file__).parents[1] / "architecture.md"

PLACE = "<!-- picture of the house -->"
"""What the picture takes the place of."""

Arrows: TypeAlias = Mapping[str, set[str]]
"""Each room to those that it imports."""


def rooms() -> tuple[str, ...]:
    """The rooms from the roof down."""
    table = re.findall(r"^\| (`.*?) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return tuple(name for row in table for name in re.findall(r"`(\w+)(?:/|\.py)`", row))


def modules() -> list[Path]:
    """All modules of the package but its door."""
    return [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


def room_of(path: Path) -> str:
    """The room that a module stands in."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[str, str]]:
    """What a module imports of the package, and the room that it lies in."""
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "fishr" and len(parts) == 2:  # a public name, such as fishr.train, stands where it is defined
            parts = fishr._HOMES.get(parts[1], name).split(".")
        if parts[0] == "fishr" and len(parts) > 1:
            yield name, parts[1]


def imported_modules(path: Path) -> list[str]:
    """All that a module imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            names += [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def arrows() -> Arrows:
    """Which room imports which."""
    found: dict[str, set[str]] = {room: set() for room in rooms()}
    for path in modules():
        room = room_of(path)
        found[room] |= {other for _, other in imported_rooms(path) if other in found and other != room}
    return found


def direct(found: Arrows) -> Arrows:
    """The arrows that do not follow from others."""
    reached: dict[str, set[str]] = {}
    for room in reversed(list(found)):
        reached[room] = found[room].union(*(reached[other] for other in found[room]))
    return {room: found[room].difference(*(reached[other] for other in found[room])) for room in found}


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put the picture in its place."""
    return markdown.replace(PLACE, picture(direct(arrows()))) if PLACE in markdown else markdown


# The picture. A node is a room, or a place where an arrow passes a floor: (from, to, floor).

Node: TypeAlias = str | tuple[str, str, int]

SWEEPS = 8
COLUMN_WIDTH, FLOOR_HEIGHT = 116, 56
ROOM_WIDTH, ROOM_HEIGHT = 92, 28


def floors_of(found: Arrows) -> dict[str, int]:
    """The floor of each room, 0 below the roof: right below the lowest room that imports it.

    One that no room imports stands right above what it imports.
    """
    floors: dict[str, int] = {}
    importers = {room: [other for other in found if room in found[other]] for room in found}
    top = next(iter(found))
    for room in found:
        floors[room] = max((floors[other] + 1 for other in importers[room]), default=0)
    for room in found:
        if not importers[room] and room != top:
            floors[room] = min(floors[other] for other in found[room]) - 1
    return floors


def floor_of(node: Node, floors: Mapping[str, int]) -> int:
    """The floor of a node."""
    return floors[node] if isinstance(node, str) else node[2]


def routes(found: Arrows, floors: Mapping[str, int]) -> list[list[Node]]:
    """Each arrow as the nodes that it leads through, one for each floor."""
    return [
        [room, *((room, other, floor) for floor in range(floors[room] + 1, floors[other])), other]
        for room in found
        for other in sorted(found[room])
    ]


def columns_of(found: Arrows, floors: Mapping[str, int], through: Sequence[Sequence[Node]]) -> dict[Node, int]:
    """A column for each node, so that arrows are short: floor by floor the best order, up and down."""
    on_floor: dict[int, list[Node]] = {}
    for node in dict.fromkeys([*found, *(node for route in through for node in route)]):
        on_floor.setdefault(floor_of(node, floors), []).append(node)
    beside: dict[Node, list[Node]] = {}
    for route in through:
        for upper, lower in pairwise(route):
            beside.setdefault(upper, []).append(lower)
            beside.setdefault(lower, []).append(upper)
    columns: dict[Node, int] = {}
    width = max(map(len, on_floor.values()))

    def length(nodes: Sequence[Node], at: Sequence[int]) -> float:
        placed = [
            (column - columns[other]) ** 2
            for node, column in zip(nodes, at, strict=True)
            for other in beside.get(node, ())
            if other in columns
        ]
        from_the_middle = sum(abs(column - width // 2) for column in at)
        return sum(placed) + from_the_middle / 100

    for sweep in range(SWEEPS):
        for floor in sorted(on_floor, reverse=sweep % 2 == 1):
            nodes = on_floor[floor]
            best = min(permutations(range(width), len(nodes)), key=lambda at: length(nodes, at))
            columns.update(zip(nodes, best, strict=True))
    return columns


def picture(found: Arrows) -> str:
    """Rooms and arrows as an SVG in the colors of the page."""
    floors = floors_of(found)
    through = routes(found, floors)
    columns = columns_of(found, floors, through)

    def middle(node: Node) -> tuple[int, int]:
        left, top = columns[node] * COLUMN_WIDTH, floor_of(node, floors) * FLOOR_HEIGHT
        return left + COLUMN_WIDTH // 2, top + FLOOR_HEIGHT // 2

    def line(route: Sequence[Node]) -> str:
        (x, y), *others = map(middle, route)
        y += ROOM_HEIGHT // 2
        path = f"M{x} {y}"
        for to_x, to_y in others:
            above, below = to_y - ROOM_HEIGHT // 2, to_y + ROOM_HEIGHT // 2
            path += f"C{x} {(y + 3 * above) // 4} {to_x} {(3 * y + above) // 4} {to_x} {above}"
            if (to_x, to_y) != others[-1]:
                path += f"V{below}"
            x, y = to_x, below
        return f'<path d="{path}"/>'

    def box(room: str) -> str:
        x, y = middle(room)
        corner = f'x="{x - ROOM_WIDTH // 2}" y="{y - ROOM_HEIGHT // 2}"'
        return f'<rect {corner} width="{ROOM_WIDTH}" height="{ROOM_HEIGHT}" rx="4"/><text x="{x}" y="{y}">{room}</text>'

    width, height = (max(columns.values()) + 1) * COLUMN_WIDTH, (max(floors.values()) + 1) * FLOOR_HEIGHT
    return "".join(
        [
            f'<figure><svg class="house" viewBox="0 0 {width} {height}" role="img" aria-label="The house">',
            '<marker id="head" viewBox="0 0 6 6" refX="6" refY="3" markerWidth="6" markerHeight="6" orient="auto">',
            '<path d="M0 0L6 3L0 6z"/></marker>',
            *map(line, through),
            *map(box, found),
            "</svg><figcaption>Each room and those that it imports. What they import in turn it may import too; these "
            "arrows are left out.</figcaption></figure>",
        ]
    )
