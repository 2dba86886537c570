"""Why a model fails on a domain: gradients, curvature and loss landscapes of its domains, side by side."""

from fishr.analysis.analyze import Analysis, ModelAnalysis, analyze

__all__ = ["Analysis", "ModelAnalysis", "analyze"]
