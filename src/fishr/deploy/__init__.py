"""Use of a saved model: evaluate it, predict with it, export it."""

from fishr.deploy.evaluate import evaluate_model, load_data_for
from fishr.deploy.export import export_onnx
from fishr.deploy.mistakes import keep_mistakes
from fishr.deploy.predict import find_images, predict_images

__all__ = ["evaluate_model", "export_onnx", "find_images", "keep_mistakes", "load_data_for", "predict_images"]
