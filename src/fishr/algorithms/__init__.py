"""Algorithms by name. Import a class directly, or look it up here."""

from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses
from fishr.algorithms.erm import ERM
from fishr.algorithms.fishr import Fishr
from fishr.algorithms.irm import IRM
from fishr.algorithms.vrex import VREx
from fishr.registry import Registry

ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm")
ALGORITHMS.register("erm", ERM)
ALGORITHMS.register("irm", IRM)
ALGORITHMS.register("vrex", VREx)
ALGORITHMS.register("fishr", Fishr)

__all__ = ["ALGORITHMS", "ERM", "IRM", "Algorithm", "AlgorithmConfig", "Fishr", "Losses", "VREx"]
