"""FishrError and its kinds.

Every message says what came, what was expected and what to do. The command line shows it in one line.
"""


class FishrError(Exception):
    """Anything that went wrong in a way the caller can mend."""


class InputError(FishrError, ValueError):
    """Tensors or arguments whose shapes or values do not fit together."""


class ConfigError(FishrError, ValueError):
    """A setting that does not exist or cannot take the value it was given."""


class DataError(FishrError):
    """Data that is missing, damaged or cannot be read."""


class UnreadableImageError(DataError):
    """An image file that cannot be decoded; the message is the reason alone, such as "truncated JPEG"."""


class ContractError(FishrError, AssertionError):
    """An algorithm or a dataset that does not do what is expected of all."""


class RunError(FishrError):
    """A run folder that cannot be used: another config, a damaged checkpoint, no space to write."""


class RunBusyError(RunError):
    """Another process works on the run, or has just finished it."""


class TrackingError(FishrError):
    """A tracker that cannot be reached, or does not take a run."""


class NonFiniteLossError(FishrError, ArithmeticError):
    """A loss term became NaN or infinite during training."""


class RunInterruptedError(FishrError):
    """A signal stopped the run after its state was saved; running it again continues it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
