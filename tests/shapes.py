"""The shapes and dtypes that a head is tested at, and why each of them is there."""

import torch

SHAPES = [  # N, H, V
    (1, 1, 1),  # a vocabulary of one: log-prob 0, no gradient
    (3, 5, 2),  # the smallest softmax
    (17, 8, 129),  # one past a block of 128 columns
    (130, 16, 257),  # two blocks and one column; more rows than a GPU's tile has
]
DTYPES = [
    torch.float64,  # sums and statistics are exact, so blocks must not show
    torch.float32,
    torch.bfloat16,  # products of their own where the CPU has them, else through float32 panels
    torch.float16,  # panels on every CPU
]
ONE_COLUMN_LEFT = [129, 257, 385]  # vocabularies whose last block of columns is one wide
