"""The model card of a shared result: what it is, what it costs and gains, and how to load it."""

from huggingface_hub import ModelCard, ModelCardData

from apc.evaluate.tables import DASH, condition_items

LIBRARY = "apc-llm"
TAGS = ["activation-sparsity", "ffn-sparsity", "pruning"]
PAPER = "Activation Pattern Clustering, Euro-Par 2025"


def model_card(facts: dict) -> ModelCard:
    """The card for a result's facts, as `apc.share.result` writes them to config.json."""
    base, policy = facts["base_model"], facts["policy"]
    data = ModelCardData(
        library_name=LIBRARY,
        base_model=base["path"] if "/" in (base["path"] or "") else None,
        license=facts["license"],
        tags=TAGS,
        pipeline_tag="text-generation",
    )
    licence = facts["license"] or "not stated"
    needs_model = "" if base["path"] else ", model=MODEL"
    anywhere = {*facts["kernels"]} == {"cpu", "cuda"}
    kernel = "" if anywhere else ", kernel=None"
    places = [name for device, name in (("cuda", "GPUs"), ("cpu", "CPUs")) if device in facts["kernels"]]
    kernels = f"There are kernels for {' and '.join(places) or 'neither GPUs nor CPUs'}"
    kernels += ".\n" if anywhere else "; elsewhere `kernel=None` masks a dense forward pass.\n"
    sections = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {base['name']}, sparse by `{policy}`\n",
        f"Which FFN neurons of {base['name']} a token needs, known before they are computed: a codebook of activation "
        f"patterns and, where the policy needs one, a predictor, made with {LIBRARY}. The weights of {base['name']} "
        "are not in here.\n",
        "## Load it\n",
        f"`pip install {LIBRARY}`, then\n",
        f'```python\nimport apc\n\nmodel = apc.load("FOLDER_OR_HUB_ID"{needs_model}{kernel})\n```\n',
        kernels,
        _base_line(facts),
        "## What it costs\n",
        _table(facts),
        *(f"- {line}" for line in condition_items({"conditions": facts["conditions"]})),
        f"\n## Licence\n\nOf this codebook and predictor: {licence}. The base model has its own.\n",
        f"## Paper\n\n{PAPER}.",
    ]
    return ModelCard("\n".join(sections) + "\n")


def _base_line(facts: dict) -> str:
    base = facts["base_model"]
    where = f"`{base['path']}`" if base["path"] else "a folder that only its author has; give the loaded model"
    revision = f", revision {base['revision']}" if base["revision"] else ""
    weights = f", weights {base['weights'][:12]}" if base["weights"] else ""
    return f"The base model: {where}{revision}{weights}. Another model's weights are refused.\n"


def _table(facts: dict) -> str:
    """A Markdown table of the dense model and the policy."""
    rows = [
        "| | FFN bytes read per token, % | perplexity | against dense × (95 %) |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, record in (("dense", facts["dense"]), (facts["policy"], facts["sparse"])):
        if record is None:
            rows.append(f"| {name} | {DASH} | {DASH} | {DASH} |")
            continue
        low, high = record.get("ratio_low"), record.get("ratio_high")
        half = f" ± {(high - low) / 2:.3f}" if low and high and name != "dense" else ""
        share = DASH if record.get("bytes_share") is None else f"{100 * record['bytes_share']:.1f}"
        rows.append(f"| {name} | {share} | {record['perplexity']:.2f} | {record['ratio']:.3f}{half} |")
    return "\n".join(rows) + "\n"
