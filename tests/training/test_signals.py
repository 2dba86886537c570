import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from fishr.training.signals import stop_on_signal

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class ReceivedError(Exception):
    pass


def handler(number: int, frame: FrameType | None) -> None:
    raise ReceivedError(int(number))


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    """Handlers of the application, which the library must give back."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    yield
    for number, previous in before.items():
        signal.signal(number, previous)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


def test_without_a_signal_nothing_is_asked() -> None:
    with stop_on_signal() as request:
        assert request.signal_number is None
        assert handler not in handlers()
    assert request.signal_number is None


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_is_noted(number: int) -> None:
    with stop_on_signal() as request:
        signal.raise_signal(number)
        assert request.signal_number == number


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_acts_as_before(first: int, second: int) -> None:
    with stop_on_signal() as request:
        signal.raise_signal(first)
        with pytest.raises(ReceivedError, match=f"^{int(second)}$"):
            signal.raise_signal(second)
    assert request.signal_number == first


def test_handlers_are_given_back() -> None:
    with stop_on_signal():
        pass
    assert handlers() == [handler, handler]


def test_handlers_are_given_back_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="within"), stop_on_signal():
        raise RuntimeError("within")
    assert handlers() == [handler, handler]


def test_a_signal_that_was_ignored_is_ignored_again() -> None:
    """As under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signal():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_is_left_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        with stop_on_signal() as request:
            seen.extend([handlers(), request.signal_number])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [[handler, handler], None]
