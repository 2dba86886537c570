"""The card of a model: what it takes and returns, and where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fishr.data.image_format import ImageFormat
from fishr.models.batch_context import BatchDependent
from fishr.models.build import FEATURIZERS, ModelConfig


@dataclass(frozen=True)
class ModelCard:
    """What a model takes and returns, and where it comes from.

    Attributes:
        model: Its architecture.
        input_shape: Shape of one input.
        classes: Name of each class.
        binary: Whether two classes are told apart by a single logit.
        provenance: Config of the run, versions, accuracies.
        image_format: What images are brought to before they are inputs; None if inputs are no images to be read.
    """

    model: ModelConfig
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    binary: bool
    provenance: Mapping[str, Any] = field(default_factory=dict)
    image_format: ImageFormat | None = None

    @property
    def num_outputs(self) -> int:
        """Logits of the head."""
        return 1 if self.binary else len(self.classes)

    @property
    def depends_on_batch(self) -> bool:
        """Whether what is predicted for a sample depends on the others in its batch."""
        if self.model.featurizer not in FEATURIZERS:
            return False
        featurizer = FEATURIZERS[self.model.featurizer]
        return isinstance(featurizer, type) and issubclass(featurizer, BatchDependent)


def card_as_markdown(card: ModelCard) -> str:
    """The card for a reader: what the model tells apart, what it was trained on, how well it did, what made it."""
    config = card.provenance["config"] if "train_domains" in card.provenance else {}
    held_out = config.get("test_domains", [])
    lines = [
        "# Model card",
        "",
        f"Tells apart {len(card.classes)} classes: {_line(', '.join(card.classes))}.",
        "",
        "| | |",
        "|:--|:--|",
    ]

    def row(name: str, value: object) -> None:
        lines.append(f"| {name} | {_line(value)} |")

    row("network", _network(card))
    row("input", _input(card))
    if card.depends_on_batch:
        row(
            "prediction",
            "depends on the batch, which is to come from one domain; a sample alone is a domain of its own",
        )
    if config:
        row("data", f"{config['data']} ({_settings(config['data_options'])})")
        row("trained on the domains", ", ".join(card.provenance["train_domains"]))
        expected = card.provenance.get("unseen_domain")
        unknown = "none" if expected else "none: nothing is known about a domain it has not seen"
        row("held out", ", ".join(held_out) or unknown)
        if expected:
            row("expected on an unseen domain", _expectation(expected))
        row("algorithm", f"{config['algorithm']} ({_settings(config['hparams'])})")
        row(
            "updates", f"{card.provenance['step']} of {config['steps']}, seed {config['seed']}, trial {config['trial']}"
        )
        average = config["average"]
        row("averaged weights", f"{average['name']} ({_settings(average['options'])})" if average else "no")
        selected = "best checkpoint by validation on the training domains" if config["select"] else "end of the run"
        row("model kept", selected)
        lines += ["", "Accuracy in %:", "", "| domain | role | split | accuracy |", "|:--|:--|:--|--:|"]
        for domain, splits in card.provenance["accuracy"].items():
            role = "held out" if domain in held_out else "trained on"
            role = role if domain in held_out or domain in card.provenance["train_domains"] else "evaluation only"
            for split, accuracy in splits.items():
                lines.append(f"| {_line(domain)} | {role} | {split} | {accuracy * 100:.1f} |")
        lines += ["", _splits(config)]
    versions = card.provenance.get("versions", {})
    lines += ["", "Made with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."] * bool(
        versions
    )
    return "\n".join(lines) + "\n"


def _expectation(expected: Mapping[str, Any]) -> str:
    return (
        f"{expected['mean']:.0%} accuracy ({expected['low']:.0%} to {expected['high']:.0%} with a probability of 95%), "
        f"by holding out each domain in turn; worst: {expected['worst']:.0%} on {expected['worst_domain']}"
    )


def _splits(config: Mapping[str, Any]) -> str:
    if config["out_fraction"] == 0:
        return "Domains were not split: training domains were trained on as a whole."
    chose = config["select"] or (config["average"] or {}).get("name") == "swad"
    return "Of the training domains, `in` was trained on and `out` was not" + (
        "; `out` chose which weights were kept." if chose else "."
    )


def _line(value: object) -> str:
    """Text that breaks neither a line nor a table's cell, whatever somebody's files are called."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _network(card: ModelCard) -> str:
    model = card.model
    around = ""
    if card.depends_on_batch:
        around = f"{model.featurizer} around "
        model = ModelConfig(model.options["featurizer"], model.options.get("options", {}))
    name = model.options["name"] if model.featurizer == "timm" else model.featurizer
    return f"{around}{name}, {card.model.weights or 'not pre-trained'}"


def _input(card: ModelCard) -> str:
    if card.image_format is None:
        return f"float32 of shape {' x '.join(map(str, card.input_shape))}"
    size, channels = card.image_format.size, card.image_format.channels
    return f"{ {1: 'gray', 3: 'RGB', 4: 'RGBA'}[channels] } images, resized to {size} x {size}"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
