"""``fishr algorithms list``."""

from fishr.cli.console import Json, print_json, print_line, print_notice, print_table
from fishr.errors import ConfigError


def list_algorithms(as_json: bool = Json) -> None:
    """The algorithms: name, year, the idea in a line.

    Examples:

        fishr algorithms list
    """
    from fishr.algorithms import ALGORITHMS
    from fishr.algorithms.describe import describe

    described = []
    for name in ALGORITHMS:
        try:
            described.append(describe(name))
        except ConfigError as error:  # another package's mistake, which is to hide no algorithm but its own
            print_notice(f"warning: {error}")
    if as_json:
        names = ("name", "title", "year", "idea", "reference")
        print_json({"algorithms": [{name: getattr(each, name) for name in names} for each in described]})
        return
    rows = [(each.name, each.title, str(each.year), each.idea) for each in described]
    print_table(("name", "title", "year", "idea"), rows, left=4)
    print_line("More about one: fishr algorithms show NAME")
