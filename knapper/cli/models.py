"""`knapper models`: what this machine can serve. Imports what it needs."""

from knapper.cli.tables import Json, listing, table


def models(as_json: Json = False) -> None:
    """Models for `knapper up --model` that are known, and whether this machine has the memory for them."""
    from knapper.catalogue.small_models import SMALL_MODELS
    from knapper.engine import host_memory
    from knapper.text.sizes import sized

    available = host_memory.available()
    values = [
        {
            "model": model.name,
            "weights": model.weights,
            "download_bytes": model.download,
            "memory_bytes": {dtype: model.memory(dtype) for dtype in ("float32", "bfloat16")},
            "fits": model.dtypes(available),
            "gated": model.gated,
        }
        for model in SMALL_MODELS
    ]
    rows = []
    for model in SMALL_MODELS:
        fits = " and ".join(model.dtypes(available)) or "no"
        gated = "accept its licence on the hub, and set HF_TOKEN" if model.gated else ""
        sizes = [sized(size) for size in (model.download, model.memory("float32"), model.memory("bfloat16"))]
        rows.append([model.name, *sizes, fits, gated])
    header = ["MODEL", "DOWNLOAD", "FLOAT32", "BFLOAT16", f"FITS {sized(available)}", "NEEDS"]
    listing(values, list(table(header, rows)), "", as_json=as_json)
