"""Reads a serialised tf.train.Example without TensorFlow: the form of most published ArrayRecord text.

The wire format is protocol buffers': https://protobuf.dev/programming-guides/encoding. Of the messages

    Example { Features features = 1 }    Features { map<string, Feature> feature = 1 }
    Feature { BytesList bytes_list = 1 | FloatList float_list = 2 | Int64List int64_list = 3 }    BytesList { bytes value = 1 }

every field is length-delimited down to the value.
"""

from collections.abc import Iterator


def parse(record: bytes) -> dict[str, bytes | None] | None:
    """The first value of each bytes feature by name, None for features of other types; None when this is no Example."""
    try:
        features = {}
        for _, example in _fields(record, {1}):
            for _, entry in _fields(example, {1}):
                parts = dict(_fields(entry, {1, 2}))
                features[parts[1].decode("utf-8")] = _first_bytes(parts.get(2, b""))
        return features or None
    except (ValueError, IndexError, KeyError):
        return None


def _first_bytes(feature: bytes) -> bytes | None:
    values = dict(_fields(feature, {1, 2, 3}))
    if 1 not in values:
        return None
    return next((value for _, value in _fields(values[1], {1})), None)


def _fields(message: bytes, allowed: set[int]) -> Iterator[tuple[int, bytes]]:
    """(number, content) of each field. Raises ValueError for one that is not length-delimited, allowed and whole."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        length, at = _varint(message, at)
        if key & 7 != 2 or key >> 3 not in allowed or at + length > len(message):
            raise ValueError
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
