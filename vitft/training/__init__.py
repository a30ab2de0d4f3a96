"""Training: a model, images and a plan in; a trained model and its metrics out."""
