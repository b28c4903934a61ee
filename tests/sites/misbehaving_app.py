"""The client app of sites that misbehave: ``--node-config 'how="round 1;round 2;..."'`` says how.

Without torch and without a model: what is sent back is what was received, changed.
"""

import json
import os
import time

import numpy as np
import safetensors.numpy

from prelort.federation.client_app import Kind, client_app
from prelort.federation.content import blob_in, content_of, record_of, text_in
from prelort.federation.flower import Array, ArrayRecord, Context, RecordDict


def answer(kind: Kind, content: RecordDict, context: Context) -> RecordDict:
    name, *ways = str(context.node_config["how"]).split(";")
    asked = json.loads(text_in(content) or "{}")
    names = ("protocol", "base", "layers", "scale_rule", "scale", "rank")
    head = {name: asked[name] for name in names}
    if kind != "train":
        head |= {"client": name, "examples": 10, "rank": 4, "max_rank": 4}
        changes = {"other base": {"base": "0123456789abcdef"}, "other layers": {"layers": "none"}}
        return content_of(json.dumps(head | changes.get(name, {})))
    how = ways[asked["round"]] if ways else "well"
    head |= {"dtype": asked["dtype"], "client": name, "round": asked["round"], "examples": 10}
    head |= {"steps": 1, "loss": 1.0, "seconds": "1.0e+00", "change": False}
    blob = blob_in(content) or b""
    tensors = safetensors.numpy.load(blob)
    match how:
        case "raises":
            raise RuntimeError("patient 17 has no text")
        case "exits":
            os._exit(1)
        case "silent":
            time.sleep(300)
        case "other rank":
            head["rank"] = 2
        case "other round":
            head["round"] += 1
        case "other name":
            head["client"] = "honest"
        case "claims much":
            head["examples"] = 10**12
        case "truncated":
            blob = blob[: len(blob) // 2]
        case "pickled":
            pickled = Array(dtype="uint8", shape=(4,), stype="pickle", data=b"\x80\x04N.")
            reply = content_of(json.dumps(head))
            reply["adapter"] = ArrayRecord({"adapter": pickled})
            return reply
        case "pickled inside":
            blob = b"\x80\x04N."
        case "too large":
            first = next(iter(tensors))
            tensors[first] = np.zeros((200_000_000,), dtype=np.uint8)
        case "nan" | "inf" | "1e30":
            first = next(iter(tensors))
            tensors[first] = tensors[first].copy()
            tensors[first].flat[0] = float(how)
    if how in ("too large", "nan", "inf", "1e30"):
        blob = safetensors.numpy.save(tensors)
    reply = content_of(json.dumps(head))
    reply["adapter"] = record_of(blob)
    return reply


app = client_app(answer)
