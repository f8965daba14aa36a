"""The C structures of model.h, field by field, and the signatures of what the library offers."""

import ctypes
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p


class Matrix(Structure):
    """Packed weights; in int8 where they have a scale."""

    _fields_ = [(name, c_void_p) for name in ("packed", "offset", "scale")]


class Layer(Structure):
    """The packed weights of one layer, and pointers into its KV pool."""

    _fields_ = [
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("qkv_bias", "o_bias")),
        *((name, c_void_p) for name in ("input_norm", "attention_norm", "feed_norm", "after_norm", "q_norm", "k_norm")),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
        ("rope", c_int64),
    ]


class Model(Structure):
    """Sizes and flags of a whole model."""

    _fields_ = [
        *(
            (name, c_int64)
            for name in ("hidden", "heads", "kv_heads", "head_dim", "inner", "layers", "vocabulary", "activation", "wide", "int8")
        ),
        *((name, c_float) for name in ("epsilon", "score_scale", "score_cap", "embedding_scale")),
        ("embedding", c_void_p),
        ("head", c_void_p),
        ("final_norm", c_void_p),
        ("layer", POINTER(Layer)),
    ]


class LowRank(Structure):
    """What an adapter adds to one packed matrix."""

    _fields_ = [(name, c_void_p) for name in ("down", "up", "gain")]


ADAPTED = ("qkv", "o", "gate_up", "down")  # packed matrices of a layer, in the order of model.h


class Adapter(Structure):
    """An adapter: `layer` is an array of layers, each of `ADAPTED`."""

    _fields_ = [("rank", c_int64), ("layer", POINTER(LowRank))]


class Step(Structure):
    """One `backend.Batch` as raw pointers."""

    _fields_ = [
        *((name, c_int64) for name in ("count", "sequences", "table_width", "selected")),
        *((name, c_void_p) for name in ("tokens", "slots", "select", "positions", "rows", "lengths", "tables")),
        ("cosines", c_void_p * 2),
        ("sines", c_void_p * 2),
        ("out", c_void_p),
        ("adapters", c_void_p),
        ("adapter", POINTER(Adapter)),
        ("adapter_slots", c_int64),
        ("adapter_rank", c_int64),
    ]


class Screen(Structure):
    """The output matrix in int8."""

    _fields_ = [("matrix", Matrix), ("rest", c_void_p), ("norm", c_void_p)]


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give every function its types: without them ctypes would cut pointers to 32 bits."""
    engine, address = c_void_p, c_void_p
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "argosy_open": (c_void_p, [c_int64]),
        "argosy_close": (None, [engine]),
        "argosy_step": (c_int64, [engine, POINTER(Model), POINTER(Step)]),
        "argosy_logits": (None, [engine, POINTER(Model), address, c_int64, c_float, address]),
        "argosy_pack": (None, [engine, address, address, *[c_int64] * 6]),
        "argosy_quantise": (None, [engine, POINTER(Matrix), *[address] * 3, *[c_int64] * 6]),
        "argosy_candidates": (c_int64, [engine, POINTER(Model), POINTER(Screen), address, c_int64, c_int64, c_float, *[address] * 3]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
