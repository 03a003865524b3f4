"""The model on a CPU: cells for operators without a fast kernel there, layers for answering, and the training step."""
