"""A page for each algorithm, made of what its class says of itself, and a table of them all."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files

from fishr.algorithms import ALGORITHMS
from fishr.algorithms.base import NOTATION, AlgorithmConfig
from fishr.algorithms.describe import Description, Hyperparameter, by_kind, describe
from repository_paths import generated

INDEX = "algorithms/index.md"

SHARED = frozenset(item.name for item in fields(AlgorithmConfig))
"""Hyperparameters that every algorithm has."""


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages to the site and to its navigation."""
    (section,) = (entry["Algorithms"] for entry in config.nav or () if "Algorithms" in entry)
    for address, text in pages().items():
        files.append(generated(config, address, text))
        if address != INDEX:
            section.append(f"docs/{address}")


def pages() -> dict[str, str]:
    """The address of each page and its text."""
    described = [describe(name) for name in ALGORITHMS]
    return {INDEX: index(described)} | {f"algorithms/{each.name}.md": page(each) for each in described}


def index(described: Sequence[Description]) -> str:
    """The table of all algorithms."""
    rows = "\n".join(f"| [{each.title}]({each.name}.md) | {each.year} | {each.idea} |" for each in described)
    return f"""# Algorithms

| algorithm | year | idea |
|:--|--:|:--|
{rows}

The same on the command line:

```bash
fishr algorithms list
fishr algorithms show coral
```

How they do on Colored Digits, tuned on the training domains alone, and what a step of each costs, was
[measured](../../benchmarks/results/algorithms.md). One of your own is a class in a file:
[Contributing](../../CONTRIBUTING.md#add-an-algorithm).
"""


def page(described: Description) -> str:
    """The page of one algorithm."""
    objective, _, remarks = described.text.partition("\n\n")
    own = [each for each in described.hyperparameters if each.name not in SHARED]
    shared = [each for each in described.hyperparameters if each.name in SHARED]
    of_all = "And those that all algorithms have:" if own else "It has those alone that all algorithms have:"
    cls = ALGORITHMS[described.name]
    reference = re.sub(r"arXiv (\S+)$", r"[arXiv \1](https://arxiv.org/abs/\1)", described.reference)
    return f"""# {described.title}

{described.idea}

``` {{ .text .formula }}
{objective}
```

{remarks}

{NOTATION}

## Train it

```bash
fishr train --data colored-digits --algorithm {described.name} --steps 500
```

Instead of `colored-digits` name a folder of [your own images](../your-images.md), a manifest or a benchmark.

## Hyperparameters

`--set NAME=VALUE` changes them on the command line, `hparams={{"NAME": VALUE}}` in Python. What is searched are the
distributions that sweeps and comparisons draw from.

{definitions(own)}

{of_all}

{definitions(shared)}
{cost(described)}
## In Python

By its name, `RunConfig.for_dataset(dataset, "{described.name}", ...)`, or as an
[`Algorithm`][fishr.algorithms.Algorithm], whose config is a `{cls.Config.__module__}.{cls.Config.__name__}`:

::: fishr.algorithms.{cls.__name__}
    options:
      heading_level: 3
      members: false
      show_docstring_description: false

## Reference

{reference}
"""


def definitions(hyperparameters: Iterable[Hyperparameter]) -> str:
    """What each hyperparameter is, and its values."""
    return "\n\n".join(f"`{each.name}`\n:   {' '.join(_sentences(each))}" for each in hyperparameters)


def _sentences(each: Hyperparameter) -> Iterator[str]:
    yield f"{each.meaning} Default: {by_kind(each.defaults)}."
    if each.recommended != each.defaults:
        yield f"On data of your own: {by_kind(each.recommended)}."
    if each.spaces:
        yield f"Searched: {by_kind(each.spaces)}."


def cost(described: Description) -> str:
    """How long a step takes; nothing where that was not measured."""
    if not described.step_costs:
        return ""
    rows = "\n".join(f"| {case} | {times:.1f} |" for case, times in described.step_costs.items())
    return f"""
## Cost of a step

| time of a step, as a multiple of ERM's | |
|:--|--:|
{rows}
"""
