"""Expected results of `poolbench which` for the models of make_models.py.

For each: its pools by the name of the layer or operation; the layers that need code; with that code run, the pools
(`trusted`) and what the other layers are (`notes`); the option that it needs; words that the answer holds.
"""

MEAN = "global average pooling"
HEAD = {"head": MEAN}
DEPTH3 = "depthwise max pooling of 3"
ANSWERS = {
    "maxout": {
        "pools": HEAD, "unknown": ["code"],
        "notes": {"code": "none of the shipped ops: channels j, j+4, j+8 compete, not neighbours"},
    },
    "half_softmax": {
        "pools": HEAD, "unknown": ["code"],
        "notes": {"code": "no pooling: each channel changes several of its outputs"},
    },
    "textbook": {"pools": HEAD, "unknown": ["code"], "trusted": {"code": DEPTH3, **HEAD}},
    "half_precision": {"pools": HEAD, "unknown": ["code"], "trusted": {"code": DEPTH3, **HEAD}},
    "normalised": {"pools": {}, "unknown": ["code"], "notes": {"code": "no pooling"}},
    "attention": {
        "pools": HEAD, "unknown": ["mean", "peak"],
        "trusted": {
            "mean": f"{MEAN} over all channels, dimensions kept",
            "peak": "depthwise max pooling of 12, dimensions kept", **HEAD,
        },
    },
    "operation": {"pools": {"mean": MEAN}},
    "operations": {"pools": {"max": DEPTH3, **HEAD}},
    "kept": {"pools": {"pool": f"{MEAN}, dimensions kept"}},
    "two_inputs": {"pools": {"coarse": "max pooling of 8x8", **HEAD}, "input": "48x48x3"},
    "video": {
        "pools": {"frame_pool": MEAN, "time_pool": f"{MEAN} over time"}, "input": "16x32x32x3",
    },
    "frozen": {"pools": {"pool": MEAN}, "said": "no weight of it can be trained"},
    "pixels": {"pools": HEAD},
    "padded": {"pools": {"pool": f"{DEPTH3}, same"}},
    "channels_first": {"pools": {"pool": f"{MEAN}, channels_first"}},
    "fixed_batch": {"pools": HEAD, "said": "The file fixes a batch of 16"},
    "adaptive": {"pools": {"pool": f"{MEAN}, dimensions kept"}},
    "shared": {"pools": {"pool": MEAN}},
    "network": {"pools": {"global_average_pooling2d": MEAN}},
    "counting": {"pools": {"pool": MEAN}, "said": "its outputs are integers"},
}  # fmt: skip
