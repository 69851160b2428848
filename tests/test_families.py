"""Every causal language model of the installed transformers: accepted and masked rightly, or refused in one line.

tests/data/families.txt is the committed list, and docs/families.md shows it. `python tests/test_families.py` writes
both again.
"""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import families
from apc.data.ffn import Expert, check_calls, find_ffns, has_experts
from apc.data.hooks import FFNHooks
from apc.utils.errors import UserError

LIST = Path(__file__).parent / "data" / "families.txt"
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
LISTED = dict(line.split(": ", 1) for line in LIST.read_text().splitlines()) if LIST.is_file() else {}
IDS = torch.arange(3, 11)[None]


class Keep:
    """Sets the values at `neuron` to zero outside the masks, bool [D] of each FFN."""

    route = None

    def __init__(self, masks):
        self.masks = masks

    def enter(self, layer, hidden):
        pass

    def visit(self, layer, site, values):
        return values.masked_fill(~self.masks[layer], 0)


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS, use_cache=False).logits


def verdict(model_type: str) -> str:
    """`accepted, gated` or `accepted, no gate` (and `experts`), or why the model is refused or could not be built."""
    try:
        model = families.build(model_type)
    except Exception as error:
        return f"not built: {families.REASONS.get(model_type, type(error).__name__)}"
    try:
        ffns = find_ffns(model)
        check_calls(model, ffns)
    except UserError as error:
        assert "\n" not in str(error)
        return f"refused: {str(error).partition(': ')[2]}"
    check_masked(model, ffns)
    words = ["gated" if ffns[0].gated else "no gate", *["experts"] * has_experts(ffns)]
    return f"accepted, {', '.join(words)}"


def columns_of(ffn) -> torch.Tensor:
    """The weights of the down projection, [E, D]."""
    if isinstance(ffn, Expert):
        weight = ffn.module.down_proj[ffn.index]
        return weight.T if ffn.module.is_transposed else weight
    return ffn.down.weight if isinstance(ffn.down, torch.nn.Linear) else ffn.down.weight.T


def check_masked(model, ffns) -> None:
    """The masked forward equals that of a model whose down projections have zeros in place of the dropped neurons."""
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(ffn.width, generator=generator) < 0.5 for ffn in ffns]
    dense = logits(model)
    hooks = FFNHooks(ffns, ["neuron"], Keep(masks))
    masked = logits(model)
    hooks.remove()
    with torch.no_grad():
        for ffn, mask in zip(ffns, masks, strict=True):
            columns_of(ffn).mul_(mask)
    expected = logits(model)
    assert float((masked - expected).norm()) < 1e-4 * float((expected - dense).norm())


@pytest.mark.parametrize("model_type", families.NAMES)
def test_a_family_is_masked_rightly_or_refused_by_name(model_type):
    found = verdict(model_type)
    if model_type not in LISTED:
        warnings.warn(f"{model_type} is not in {LIST.name}: {found}", stacklevel=1)
    elif transformers.__version__ == LISTED["transformers"]:
        assert found == LISTED[model_type]
    elif found != LISTED[model_type]:
        warnings.warn(f"{model_type} was {LISTED[model_type]}, is {found}", stacklevel=1)


def page(listed: dict[str, str]) -> str:
    """The list as a page: the families by verdict."""
    by_verdict: dict[str, list[str]] = {}
    for name, found in listed.items():
        short = re.sub(r"^refused: \S+ \((\w+)\):", r"refused: \1:", found)
        by_verdict.setdefault(short, []).append(name)
    version = listed["transformers"]
    del by_verdict[version]
    lines = [
        "# Model families",
        "",
        f"All causal language models of transformers {version}, each tested as a tiny model with random weights.",
        "Accepted: a forward pass under masks gives the same as zeros in the down projections for the dropped neurons.",
        "Refused: an error names the reason. Not built: no tiny model runs on tokens alone, so nothing is known.",
        "",
        "| verdict | families |",
        "| --- | --- |",
    ]
    for found in sorted(by_verdict, key=lambda found: (found.partition(" ")[0].rstrip(",:"), -len(by_verdict[found]))):
        lines.append(f"| {found} ({len(by_verdict[found])}) | {', '.join(by_verdict[found])} |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_the_list():
    assert PAGE.read_text() == page(LISTED)


if __name__ == "__main__":
    lines = [f"transformers: {transformers.__version__}", *(f"{name}: {verdict(name)}" for name in families.NAMES)]
    LIST.write_text("\n".join(lines) + "\n")
    PAGE.write_text(page(dict(line.split(": ", 1) for line in lines)))
    print(f"{len(lines) - 1} families in {LIST}", file=sys.stderr)
