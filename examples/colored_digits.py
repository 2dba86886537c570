"""What the three loops share: samples of Colored Digits, batches that hold all training domains, accuracies.

Color agrees with the label for 80 % and 90 % of the samples of the training domains and misleads in "-90%", which is
held out. Shape alone would tell all labels: none is flipped here, as in Table 5 of the paper.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Sampler, TensorDataset

import fishr
from fishr.data import Samples

TRAINING, HELD_OUT = ("+80%", "+90%"), "-90%"


def domains_of_digits() -> Mapping[str, Samples]:
    return fishr.load_dataset("colored-digits", label_flip=0.0).domains


def training_samples() -> TensorDataset:
    """Inputs ``[sample, 128]``, targets 0 or 1, and the domain of each sample, an index into TRAINING."""
    domains = domains_of_digits()
    inputs, targets = zip(*(domains[name] for name in TRAINING), strict=True)
    sizes = torch.tensor([len(each) for each in targets])
    return TensorDataset(torch.cat(inputs), torch.cat(targets), torch.repeat_interleave(sizes))


class DomainsInTurn(Sampler[int]):
    """Indices of samples, one of each domain in turn: every batch holds all domains, equally often.

    Samples are drawn with replacement, so those of a small domain come round more often. An epoch draws as many as
    there are. Its number decides which, so that a continued run sees what an unbroken one would have seen.

    Args:
        domains: The domain of each sample, int64 ``[sample]``.
    """

    def __init__(self, domains: Tensor) -> None:
        self.samples = [torch.nonzero(domains == domain).flatten() for domain in range(int(domains.max()) + 1)]
        self.length, self.epoch = len(domains), 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next; Lightning and Accelerate say it by themselves."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        rounds = -(-self.length // len(self.samples))
        drawn = [own[torch.randint(len(own), (rounds,), generator=generator)] for own in self.samples]
        yield from torch.stack(drawn, dim=1).flatten()[: self.length].tolist()


@torch.no_grad()
def report(name: str, logits_of: Callable[[Tensor], Tensor]) -> None:
    """Print the accuracy on the training domains and on the held-out one."""
    domains = domains_of_digits()
    accuracies = {
        domain: (logits_of(domains[domain].inputs).argmax(1) == domains[domain].targets).double().mean().item()
        for domain in (*TRAINING, HELD_OUT)
    }
    cells = (f"{domain} {accuracy:6.1%}" for domain, accuracy in accuracies.items())
    Console().print(f"{name:6}", *cells, sep="   ", soft_wrap=True)
