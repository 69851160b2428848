"""Tiny models, a tokenizer and texts in a folder, and ways to run the program on them."""

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 120
FAMILIES = {
    "llama": dict(model_type="llama"),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3", head_dim=16),
    "gemma2": dict(model_type="gemma2", head_dim=16),
    "gemma3": dict(model_type="gemma3_text", head_dim=16),
    "phi3": dict(model_type="phi3", pad_token_id=0),
}
_GPT2_NAMES = dict(n_embd=32, n_inner=52, n_layer=3, n_head=2, n_positions=256)
UNGATED_FAMILIES = {
    "opt": dict(model_type="opt", ffn_dim=52, word_embed_proj_dim=32),
    "gpt2": dict(model_type="gpt2", **_GPT2_NAMES),
    "gpt_neox": dict(model_type="gpt_neox"),
    "phi": dict(model_type="phi"),
    "falcon": dict(model_type="falcon", ffn_hidden_size=52, new_decoder_architecture=False),
    "starcoder2": dict(model_type="starcoder2"),
    "bloom": dict(model_type="bloom", n_layer=3, n_head=2),
    "nemotron": dict(model_type="nemotron"),
    "arcee": dict(model_type="arcee"),
    "apertus": dict(model_type="apertus"),
}

_DEEPSEEK = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=52,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    num_key_value_heads=2,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
)
EXPERT_FAMILIES = {
    "mixtral": dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": dict(
        model_type="qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=52,
        shared_expert_intermediate_size=24,
    ),
    "qwen3_moe": dict(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=52, head_dim=16
    ),
    "olmoe": dict(model_type="olmoe", num_experts=4, num_experts_per_tok=2),
    "deepseek_v2": dict(model_type="deepseek_v2", **_DEEPSEEK),
    "deepseek_v3": dict(model_type="deepseek_v3", **_DEEPSEEK),
    "gpt_oss": dict(model_type="gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "granitemoe": dict(model_type="granitemoe", num_local_experts=4, num_experts_per_tok=2),
}
EVERY_FAMILY = FAMILIES | UNGATED_FAMILIES | EXPERT_FAMILIES


def make_text(path: Path, words: int = 3000, seed: int = 0) -> Path:
    """A text from a random Markov chain, so that tokens are predictable."""
    generator = torch.Generator().manual_seed(99)
    steps = torch.rand(VOCABULARY, VOCABULARY, generator=generator).pow(12)
    walk = torch.Generator().manual_seed(seed)
    word, text = 0, []
    for _ in range(words):
        word = int(torch.multinomial(steps[word], 1, generator=walk))
        text.append(f"w{word}")
    path.write_text(" ".join(text))
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY)} | {"[UNK]": VOCABULARY}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]", eos_token="[UNK]")


def make_model(family: str = "llama", width: int = 52, layers: int = 3, **options):
    """A random causal language model: hidden size 32, FFN width 52 (not a multiple of 8)."""
    settings = dict(
        hidden_size=32,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY + 1,
        max_position_embeddings=256,
        bos_token_id=VOCABULARY,
        eos_token_id=VOCABULARY,
        pad_token_id=VOCABULARY,
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(settings | EVERY_FAMILY[family] | options)))
    with torch.no_grad():  # larger than the usual initial weights, so that masks change the output
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embed" not in name:
                parameter.mul_(6)
    return model.eval()


def save_model(folder: Path, family: str = "llama", **options) -> Path:
    make_model(family, **options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def tiny_overrides(folder: Path, **changes) -> list[str]:
    """Overrides for a run that takes seconds and keeps all files in `folder`, which has the model and texts."""
    values = {
        "model.path": folder / "model",
        "model.device": "cpu",
        "data.fit": folder / "fit.txt",
        "data.score": folder / "score.txt",
        "data.seq_len": 32,
        "data.fit_windows": 21,
        "data.score_windows": 4,
        "collect.dir": folder / "stores",
        "collect.batch_tokens": 128,
        "collect.calibration_windows": 4,
        "cluster.k": 6,
        "cluster.max_epochs": 6,
        "predictor.bottleneck": 16,
        "predictor.max_epochs": 2,
        "predictor.batch_tokens": 32,
        "run.dir": folder / "runs",
        "run.name": "run",
        "tracking.wandb": "disabled",
        "trainer.progress": "false",
    }
    return [f"{key}={value}" for key, value in (values | changes).items()]


def make_workplace(folder: Path, family: str = "llama") -> Path:
    """A folder with a model and two texts without overlap."""
    save_model(folder / "model", family)
    make_text(folder / "fit.txt", seed=1)
    make_text(folder / "score.txt", words=600, seed=2)
    return folder


class Killed(Exception):
    """Raised in `killed_after`."""


@contextmanager
def killed_after(steps: int, module: type):
    """A training of `module` inside the block dies after so many steps; the block fails if it does not."""
    step, count = module.training_step, 0

    def dying_step(self, batch, index):
        nonlocal count
        count += 1
        if count > steps:
            raise Killed
        return step(self, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "training_step", dying_step)
        with pytest.raises(Killed):
            yield


@contextmanager
def reports(written: bool):
    """Runs in the block draw plots and write a page, or write an empty page only.

    Plots and page take four fifths of the time of a small run.
    """
    from apc.evaluate import figures
    from apc.report.page import run_page
    from apc.run import score

    no_figures = SimpleNamespace(save_figures=lambda *_: {}, speed_figure=lambda *_: False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "figures", figures if written else no_figures)
        patch.setattr(score, "run_page", run_page if written else lambda *_: "")
        yield


def run_ranks(ranks: int, words: list[str]) -> None:
    """Runs `train.py` with these overrides in so many processes. Fails if one of them does."""
    in_ranks(ranks, _train, words)


def in_ranks(ranks: int, function: Callable, *arguments) -> None:
    """Runs function(*arguments) in so many processes with torchrun's environment. Fails if one of them does.

    The processes are forked from one that has imported everything.
    """
    context = _forkserver()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": port,
    }
    processes = [
        context.Process(target=_rank, args=(environment | {"RANK": rank, "LOCAL_RANK": rank}, function, arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * ranks, f"exit codes {codes}; the ranks' output is above"


def start(words: list[str], stderr: Path | None = None) -> multiprocessing.Process:
    """Starts `train.py` with these words, forked from a process that has imported everything. The caller ends it.

    stderr: the file that takes what it and its ranks write there.
    """
    process = _forkserver().Process(target=_program, args=(words, stderr))
    process.start()
    return process


def _program(words: list[str], stderr: Path | None) -> None:
    import train
    from apc.run import cli

    if stderr is not None:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    sys.argv = [str(ROOT / "train.py"), *words]
    cli.main(train.__doc__, train.train)


def _forkserver() -> multiprocessing.context.BaseContext:
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    return context


def _rank(environment: dict, function: Callable, arguments: tuple) -> None:
    os.environ |= {key: str(value) for key, value in environment.items()}
    torch.set_num_threads(1)
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    torch.distributed.destroy_process_group()


def _train(words: list[str]) -> None:
    import train
    from apc.config.load import load_config

    with reports(written=False):
        train.train(load_config(None, [*words, f"trainer.devices={os.environ['WORLD_SIZE']}"]))


def command(*words: str, largest_file: int | None = None, timeout: float = 200) -> subprocess.CompletedProcess:
    """Runs a program of the project as from a shell, forked from a process that has imported everything.

    largest_file: bytes after which writing a file fails, as on a full disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("stdout", "stderr")]
        process = _forkserver().Process(target=_command, args=(words, paths, largest_file))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in paths))


def _command(words: tuple[str, ...], paths: list[Path], largest_file: int | None) -> None:
    for number, path in enumerate(paths, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing then fails with an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")
