"""Use of a saved model: predictions for image files, evaluation, export."""
