"""What the model of a run gets wrong on the domains that were held out, kept beside it for reports."""

import base64
import io
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from fishr.data import MultiDomainDataset
from fishr.data.base import Samples
from fishr.data.images import Images
from fishr.deploy.evaluate import DomainEvaluation, evaluate_model
from fishr.errors import DataError
from fishr.files import write_text
from fishr.models.saved import load_model
from fishr.records import MISTAKES_FILE, DomainMistakes, Mistake, Mistakes

logger = logging.getLogger(__name__)

MOST_MISTAKES = 24
"""Samples that are kept of a domain."""

LARGEST_PICTURE, LARGEST_EXACT = 160, 64
"""Pixels on a side; up to the latter nothing is lost."""


def keep_mistakes(run: Path, dataset: MultiDomainDataset, *, device: str = "auto") -> None:
    """Write ``mistakes.json`` into the folder of a run that is done: what its model gets wrong where it was held out.

    Nothing is done where the file is there, or the run held out no domain. The run is done by then: what cannot be
    kept is a warning.

    Args:
        run: The run's folder.
        dataset: The data that it was trained on.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    """
    if (run / MISTAKES_FILE).exists():
        return
    model = load_model(run / "model")
    provenance = model.card.provenance
    held_out = {name: dataset.domains[name] for name in provenance["config"]["test_domains"]}
    if not held_out:
        return
    alone = replace(dataset, domains=held_out, test_domain=None, evaluation_only=frozenset(), fixed_out={}, groups={})
    try:
        evaluation = evaluate_model(model, alone, device=device)
        mistakes = Mistakes(
            dataset.classes,
            provenance["train_domains"],
            {
                name: DomainMistakes(domain.confusion.tolist(), _worst(domain, held_out[name], dataset))
                for name, domain in evaluation.domains.items()
            },
        )
        write_text(run / MISTAKES_FILE, mistakes.to_json())
    except (DataError, OSError) as error:
        logger.warning("what the model of %s gets wrong is not kept: %s", run, error)


def _worst(domain: DomainEvaluation, samples: Samples, dataset: MultiDomainDataset) -> list[Mistake]:
    wrong = np.flatnonzero(domain.predictions != samples.targets.numpy())
    surest = wrong[np.argsort(-domain.confidences[wrong], kind="stable")][:MOST_MISTAKES]
    return [
        Mistake(
            _name(samples, index),
            dataset.classes[samples.targets[index]],
            dataset.classes[domain.predictions[index]],
            float(domain.confidences[index]),
            _picture(samples, index, dataset),
        )
        for index in surest.tolist()
    ]


def _name(samples: Samples, index: int) -> str:
    if isinstance(samples.inputs, Images):
        path: Path = samples.inputs.files.paths[samples.inputs.indices[index]]
        return path.name
    return f"sample {index}"


def _picture(samples: Samples, index: int, dataset: MultiDomainDataset) -> str | None:
    """A sample as a data URI; None where samples are no pictures."""
    values = samples.inputs[slice(index, index + 1)][0]
    if dataset.flattened is not None:
        values = values.reshape(dataset.flattened)
    if values.ndim != 3 or not 1 <= len(values) <= 4:
        return None
    pixels = values.permute(1, 2, 0).numpy()
    if pixels.dtype != np.uint8:
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    if pixels.shape[2] == 2:  # red and green
        pixels = np.concatenate([pixels, np.zeros_like(pixels[:, :, :1])], 2)
    picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    kind = "PNG" if picture.width <= LARGEST_EXACT else "JPEG"
    picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE))
    buffer = io.BytesIO()
    (picture if kind == "PNG" else picture.convert("RGB")).save(buffer, kind)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{encoded}"
