"""The mathematics of the method, on tensors only: column scales, accumulated change, low-rank products.

Names and shape suffixes, in the whole package:

    L  layers of one shape                      r  adapter rank
    M  out_features                             K  columns of a product in use
    N  in_features                              C  columns that an accumulator has room for (`accumulator_rank`)

A layer's trained change is s left right. The left factor (M x r) is PEFT's lora_B and the paper's A; the right factor
(r x N) is PEFT's lora_A and the paper's B transposed. α scales the columns of left, β the rows of right. `_L2r` joins
both factors of a layer, left first. The accumulated change is U V, with U (M x C) and V (C x N).
"""
