"""Client updates as points: read block by block, measured by their inner products, combined by weights.

`sources` reads updates whatever holds them, `gram_matrix` and `product_space` measure them, `distances` follow from
the inner products or are measured themselves (`exact_distances`), and `gram_matrix.combine` and `recombination` make
one update of many.
"""

from fedeat.geometry.assembly import Assembly
from fedeat.geometry.gram_matrix import Geometry, combine, gram, measure, refine, require_finite

__all__ = ["Assembly", "Geometry", "combine", "gram", "measure", "refine", "require_finite"]
