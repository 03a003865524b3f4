"""The demo: data it draws itself, a tiny model from random weights, and the product's own commands between them."""
