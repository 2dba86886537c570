"""Algorithms by name. Import a class directly, or look it up here."""

from fishr.algorithms.andmask import ANDMask
from fishr.algorithms.arm import ARM
from fishr.algorithms.base import Algorithm, AlgorithmConfig, Losses, Reference
from fishr.algorithms.causirl import CausIRLCORAL, CausIRLMMD
from fishr.algorithms.cdann import CDANN
from fishr.algorithms.cma import CMA
from fishr.algorithms.coral import CORAL
from fishr.algorithms.dann import DANN
from fishr.algorithms.eqrm import EQRM
from fishr.algorithms.erm import ERM
from fishr.algorithms.fish import Fish
from fishr.algorithms.fishr import Fishr
from fishr.algorithms.groupdro import GroupDRO
from fishr.algorithms.hessian_alignment import HessianGradientProduct, Hutchinson
from fishr.algorithms.ib_erm import IBERM
from fishr.algorithms.ib_irm import IBIRM
from fishr.algorithms.iga import IGA
from fishr.algorithms.irm import IRM
from fishr.algorithms.mixup import Mixup
from fishr.algorithms.mldg import MLDG
from fishr.algorithms.mmd import MMD
from fishr.algorithms.mtl import MTL
from fishr.algorithms.rsc import RSC
from fishr.algorithms.sagnet import SagNet
from fishr.algorithms.sandmask import SANDMask
from fishr.algorithms.sd import SD
from fishr.algorithms.selfreg import SelfReg
from fishr.algorithms.vrex import VREx
from fishr.registry import Registry

ALGORITHMS: Registry[type[Algorithm]] = Registry(
    "algorithm", "fishr.algorithms", lambda item: isinstance(item, type) and issubclass(item, Algorithm)
)
for _name, _algorithm in {
    "erm": ERM,
    "irm": IRM,
    "vrex": VREx,
    "fishr": Fishr,
    "groupdro": GroupDRO,
    "coral": CORAL,
    "mmd": MMD,
    "sd": SD,
    "andmask": ANDMask,
    "sandmask": SANDMask,
    "iga": IGA,
    "fish": Fish,
    "ib-erm": IBERM,
    "ib-irm": IBIRM,
    "eqrm": EQRM,
    "rsc": RSC,
    "dann": DANN,
    "cdann": CDANN,
    "mixup": Mixup,
    "mldg": MLDG,
    "mtl": MTL,
    "sagnet": SagNet,
    "arm": ARM,
    "selfreg": SelfReg,
    "causirl-coral": CausIRLCORAL,
    "causirl-mmd": CausIRLMMD,
    "hgp": HessianGradientProduct,
    "hutchinson": Hutchinson,
    "cma": CMA,
}.items():
    ALGORITHMS.register(_name, _algorithm)

__all__ = [
    "ALGORITHMS",
    "ARM",
    "CDANN",
    "CMA",
    "CORAL",
    "DANN",
    "EQRM",
    "ERM",
    "IBERM",
    "IBIRM",
    "IGA",
    "IRM",
    "MLDG",
    "MMD",
    "MTL",
    "RSC",
    "SD",
    "ANDMask",
    "Algorithm",
    "AlgorithmConfig",
    "CausIRLCORAL",
    "CausIRLMMD",
    "Fish",
    "Fishr",
    "GroupDRO",
    "HessianGradientProduct",
    "Hutchinson",
    "Losses",
    "Mixup",
    "Reference",
    "SANDMask",
    "SagNet",
    "SelfReg",
    "VREx",
]
