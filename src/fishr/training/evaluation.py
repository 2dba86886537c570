"""How well a model does on samples of one domain."""

import torch

from fishr.algorithms.base import Algorithm
from fishr.data.base import Samples, network_input
from fishr.data.images import Images
from fishr.models.batch_context import evaluation_order
from fishr.records import Metrics
from fishr.training.ranks import Ranks

BATCH_SIZE, IMAGE_BATCH_SIZE = 1024, 64


@torch.no_grad()
def evaluate(algorithm: Algorithm, samples: Samples, ranks: Ranks) -> Metrics:
    """Accuracy and mean loss, in ``eval()`` mode, in large batches, which the ranks share out."""
    modes = {module: module.training for module in algorithm.modules()}
    algorithm.eval()
    of_batches = []
    size = IMAGE_BATCH_SIZE if isinstance(samples.inputs, Images) else BATCH_SIZE
    batches = torch.split(evaluation_order(algorithm.featurizer, len(samples.targets)), size)
    for batch in batches[ranks.index :: ranks.number]:
        on_device = samples.targets[batch].to(ranks.device, non_blocking=True)
        logits = algorithm(network_input(samples.inputs[batch], ranks.device))
        predictions = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
        losses = algorithm.sample_losses(logits, on_device)
        of_batches.append(torch.stack([(predictions == on_device).sum(dtype=losses.dtype), losses.sum()]))
    for module, was_training in modes.items():
        module.training = was_training
    correct, loss_sum = 0.0, 0.0
    # Looked at once, at the end: each look makes the host wait for an accelerator.
    for of_batch in torch.stack(of_batches).tolist() if of_batches else []:
        correct, loss_sum = correct + of_batch[0], loss_sum + of_batch[1]
    correct, loss_sum = ranks.sums(correct, loss_sum)
    return Metrics(accuracy=correct / len(samples.targets), loss=loss_sum / len(samples.targets))
