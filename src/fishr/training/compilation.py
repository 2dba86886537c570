"""The featurizer compiled by ``torch.compile``: fewer and larger kernels, for a minute or more when training starts.

torch's compiler is imported where it is used, not with this module: that takes seconds.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from fishr.algorithms.base import Algorithm
from fishr.errors import ConfigError
from fishr.models.batch_context import MeanEmbedding

LONGEST_REASON = 300
"""Characters that are shown of what the compiler says."""


def compile_featurizer(algorithm: Algorithm) -> None:
    """Compile the featurizer where it stands: names of weights, and what is saved, stay as they are.

    Of a :class:`fishr.models.batch_context.MeanEmbedding` it is the featurizer inside, which is what MTL trains on.
    Compilation itself happens at the first step.

    Raises:
        ConfigError: the algorithm differentiates its featurizer more than once.
    """
    if not algorithm.compiles:
        raise ConfigError(
            f"{algorithm.title} takes more than one gradient through a pass of the featurizer, which a compiled one "
            "does not allow: leave compilation out (--compile), or take another algorithm"
        )
    featurizer = algorithm.featurizer
    trained_on = featurizer.inner if isinstance(featurizer, MeanEmbedding) else featurizer
    trained_on.compile(dynamic=False)


def uncompiled() -> AbstractContextManager[object]:
    """Inside, compiled networks run as they are written: batches of other sizes would be compiled anew."""
    context: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return context


@contextmanager
def compiler_errors_explained() -> Iterator[None]:
    """Raises ConfigError for what torch's compiler raises inside."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).partition("\n\n")[0].split())[:LONGEST_REASON]
        raise ConfigError(
            f"the network cannot be compiled here ({reason}): leave compilation out (--compile); for a CPU it "
            "needs a C++ compiler such as g++"
        ) from error
