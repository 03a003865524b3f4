"""The model on a CPU: cells for operators that have no kernel there or a slow one, layers for answering, and the training
step with its optimizer."""
