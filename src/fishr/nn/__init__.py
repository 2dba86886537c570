"""Modules with state around the functions of :mod:`fishr.functional`."""

from fishr.nn.gradient_balance import GradientBalance
from fishr.nn.moving_average import MovingAverage
from fishr.nn.network_penalty import NetworkFishrPenalty
from fishr.nn.penalty import FishrPenalty

__all__ = ["FishrPenalty", "GradientBalance", "MovingAverage", "NetworkFishrPenalty"]
