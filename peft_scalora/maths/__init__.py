"""The mathematics of the method, on tensors only: column scales, accumulated change, low-rank products."""
