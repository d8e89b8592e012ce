"""The one form in which training data reaches a model, whatever it came from."""

import flax.struct
import numpy as np
from jaxtyping import Array, Float, Int, UInt8


@flax.struct.dataclass
class Batch:
    """Rows of packed documents.

    Attributes:
        tokens: ids to read.
        targets: the id to predict at each place.
        loss_weights: how much each prediction counts; 0 where there is nothing to predict.
        positions: place of each token in its own document, from 0.
        segment_ids: which document of the row a token belongs to, from 1; 0 is padding.
        images: tile slots in reading order, padded; None without pictures.
        source_ids: index of the data source that a token came from; None where it is not tracked.
        document_window: the packer's promise W, or None: a document of at most W tokens lies inside one W-aligned
            window of its row, a longer one starts on a window. With W equal to the attention chunk, no chunk straddles
            a window, which makes chunked attention a plain fold of the row.
    """

    tokens: Int[Array | np.ndarray, "B T"]
    targets: Int[Array | np.ndarray, "B T"]
    loss_weights: Float[Array | np.ndarray, "B T"]
    positions: Int[Array | np.ndarray, "B T"]
    segment_ids: Int[Array | np.ndarray, "B T"]
    images: UInt8[Array | np.ndarray, "B I h w 3"] | Float[Array | np.ndarray, "B I h w 3"] | None = None
    source_ids: Int[Array | np.ndarray, "B T"] | None = None
    document_window: int | None = flax.struct.field(pytree_node=False, default=None)
