"""Client updates as points: read block by block, measured by their inner products, combined by weights.

`sources` reads updates whatever holds them, `gram_matrix` and `product_space` measure them, `distances` follow from
the inner products, and `gram_matrix.combine` and `recombination` make one update of many.
"""

from fedeat.geometry.gram_matrix import Geometry, combine, fill, gram, measure, refine, require_finite

__all__ = ["Geometry", "combine", "fill", "gram", "measure", "refine", "require_finite"]
