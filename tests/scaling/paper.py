"""What the paper prints (arXiv 2402.07871): Table 2 with the bootstrap ranges of Table 6, E = 64."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    active_params: float
    tokens: float
    granularity: float
    flops: float
    loss: float
    tokens_range: tuple[float, float]
    granularity_range: tuple[float, float]


TABLE_2 = (
    Row(100e6, 4.37e9, 8, 2.95e18, 3.133, (2.97e9, 5.98e9), (8, 8)),
    Row(1e9, 28.94e9, 16, 1.93e20, 2.491, (21.17e9, 40.73e9), (16, 16)),
    Row(3e9, 72.90e9, 16, 1.41e21, 2.245, (50.2e9, 105.88e9), (16, 32)),
    Row(7e9, 137.60e9, 32, 6.46e21, 2.076, (101.06e9, 205.4e9), (32, 32)),
    Row(70e9, 941.07e9, 32, 4.16e23, 1.694, (0.638e12, 1.59e12), (32, 64)),
    Row(300e9, 2.96e12, 64, 5.69e24, 1.503, (1.99e12, 5.62e12), (64, 64)),
    Row(1e12, 7.94e12, 64, 4.97e25, 1.367, (5.29e12, 16.87e12), (64, 64)),
)
