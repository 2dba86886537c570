"""Two interleaved half circles, elsewhere in each domain."""

import math
from pathlib import Path

import torch

from fishr.data import MultiDomainDataset, Samples

DOMAINS = ("left", "middle", "right")
SIZE = 400
SHIFT = 0.5
NOISE = 0.1


def two_moons(root: Path | None = None, seed: int = 0, subset: int | None = None) -> MultiDomainDataset:
    """Two classes of points in the plane, the same moons in each domain but for a shift.

    At an angle a, drawn uniformly from [0, π], the upper moon is (cos a, sin a) and the lower one (1 − cos a,
    1/2 − sin a), to which normal noise of standard deviation 0.1 is added. From domain to domain they move by 1/2 along
    the first axis. Customarily held out: "right".

    Args:
        root: Data root, which is not needed.
        seed: Seed of the points.
        subset: Keep the first samples of each domain, as many as this; None keeps all 400.

    Returns:
        Inputs float32 ``[sample, 2]``, targets 0 (upper) or 1 (lower), for a single logit.
    """
    generator = torch.Generator().manual_seed(seed)
    domains = {}
    for index, name in enumerate(DOMAINS):
        lower = torch.randint(2, (SIZE,), generator=generator)
        angles = math.pi * torch.rand(SIZE, generator=generator)
        upper_moon = torch.stack([angles.cos(), angles.sin()], dim=1)
        lower_moon = torch.tensor([1.0, 0.5]) - upper_moon
        points = torch.where(lower.bool().unsqueeze(1), lower_moon, upper_moon)
        points += torch.tensor([SHIFT * index, 0.0]) + NOISE * torch.randn(SIZE, 2, generator=generator)
        domains[name] = Samples(points[:subset], lower[:subset])
    return MultiDomainDataset("two-moons", "vectors", domains, ("upper", "lower"), test_domain="right", binary=True)
