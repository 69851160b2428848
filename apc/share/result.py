"""A result that people pass on: a folder, or a repository on the Hugging Face hub, and the sparse model that it makes.

FOLDER/config.json             format, policy, base model, digests, figures
       codebook.safetensors    with what calibration left for the policy
       predictor.safetensors   if the policy has one
       README.md               the model card

config.json is written last, so that a folder without it is not whole. Nothing in a result is run as code.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from torch import nn

from apc.cluster.codebook import Codebook
from apc.config.schema import ModelConfig
from apc.data.bundled import find_bundled
from apc.data.loading import library_errors
from apc.data.models import load_model, model_name, resolve_device
from apc.predict.predictor import Predictor
from apc.run.folder import load_run, provenance
from apc.share.card import LIBRARY, TAGS, model_card
from apc.sparse.policies import POLICIES, MaskPolicy, default_policy, make_policy
from apc.sparse.sparse_ffn import KERNEL_ON
from apc.sparse.sparsify import sparsify
from apc.utils import hub
from apc.utils.errors import UserError, first_line
from apc.utils.files import write_atomic
from apc.utils.tensor_files import wrong_field

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KIND, VERSION = "apc-result", 1
CONFIG, CODEBOOK, PREDICTOR = "config.json", "codebook.safetensors", "predictor.safetensors"
_FACTS: dict[str, type | tuple[type, ...]] = {
    "policy": str,
    "seed": int,
    "base_model": dict,
    "files": dict,
    "license": (str, type(None)),
    "kernels": list,
    "conditions": dict,
    "dense": (dict, type(None)),
    "sparse": (dict, type(None)),
    "made": dict,
}
_BASE: dict[str, type | tuple[type, ...]] = {
    "path": (str, type(None)),
    "name": str,
    "revision": (str, type(None)),
    "dtype": str,
    "ffn_bits": (int, type(None)),
    "ffn_group": int,
    "ffn_spared": int,
    "weights": (str, type(None)),
}
_FIGURES = ("perplexity", "ratio", "ratio_low", "ratio_high", "bytes_share", "flops_share", "density", "read", "bits")


class Result(ModelHubMixin, library_name=LIBRARY, tags=TAGS):
    """What a run found for one policy: `sparse_model` makes a model run under it.

    `save_pretrained(folder)`, `push_to_hub(id)` and `from_pretrained(folder_or_id)` are huggingface_hub's.
    """

    def __init__(self, codebook: Codebook, predictor: Predictor | None, facts: dict) -> None:
        self.codebook, self.predictor, self.facts = codebook, predictor, facts
        self._hub_mixin_config = None  # config.json is ours

    @property
    def policy(self) -> str:
        """The policy's name."""
        return self.facts["policy"]

    @classmethod
    def of_run(
        cls,
        run: str | Path,
        policy: str | None = None,
        base_model: str | None = None,
        license: str | None = None,
    ) -> "Result":
        """The result of a finished run.

        policy: None takes the one with the lowest perplexity of those that are no bounds; base_model: the hub id of the
        base model, if the run had it in a folder; license: of codebook and predictor, an id as the hub has them.

        Raises UserError, naming the file, if the run is not finished or damaged, and for a policy that it can't run.
        """
        loaded = load_run(run)
        if loaded.codebook is None or loaded.results is None:
            missing = loaded.folder.codebook if loaded.codebook is None else loaded.folder.results
            raise UserError(f"{missing}: no such file; finish the run first: train.py run.name={Path(run).name}")
        codebook, predictor = loaded.codebook, loaded.predictor
        policy = policy or loaded.best_policy or default_policy(codebook, predictor)
        decider = make_policy(policy, codebook, predictor, loaded.config.seed)
        if decider.is_bound or policy == "dense":
            raise UserError(f"policy {policy}: nothing to share, it reads the token's own activations or all weights")
        own = codebook.calibrated.get(policy)
        slim = codebook.without_calibrated()
        if own is not None:
            slim = slim.with_calibrated(policy, own, codebook.calibration[policy])
        if policy != "soft":
            slim = slim.without_profiles()
        records = {record["policy"]: record for record in loaded.results["policies"] if record.get("ratio")}
        sparse = records.get(policy)
        dense = None
        if sparse is not None:
            dense = {"perplexity": sparse["perplexity"] / sparse["ratio"], "ratio": 1.0, "bytes_share": 1.0}
        facts = {
            "policy": policy,
            "seed": loaded.config.seed,
            "base_model": _base_model(loaded.config.model, codebook, base_model),
            "license": license,
            "kernels": _kernels(decider),
            "conditions": loaded.results["conditions"],
            "dense": dense,
            "sparse": sparse and {name: sparse[name] for name in _FIGURES if name in sparse},
            "made": provenance(),
        }
        return cls(slim, predictor if decider.forms or decider.changes_output else None, facts)

    def sparse_model(
        self,
        model: nn.Module | str | Path | None = None,
        kernel: str | None = "auto",
        device: str = "auto",
        scoring: bool = False,
    ) -> nn.Module:
        """A Hugging Face model whose FFNs run under the policy; `apc.restore` makes it dense again.

        Args:
            model: the base model, or its path or hub id; None: as the result names it.
            kernel, scoring: as for `apc.sparsify`.
            device: auto, cpu, cuda or cuda:N, for a model that is loaded here.

        Raises:
            UserError: the model can't be loaded, or has other weights, or no kernel runs the policy here.
        """
        if model is None or isinstance(model, str | Path):
            model = self.base_model(model, device)[0]
        seed = self.facts["seed"]
        return sparsify(model, self.codebook, self.predictor, self.policy, seed, kernel, scoring=scoring, strict=True)

    def base_model(
        self, path: str | Path | None = None, device: str = "auto"
    ) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
        """The base model, dense, and its tokenizer; arguments and errors as for `sparse_model`."""
        base = self.facts["base_model"]
        source = path or base["path"]
        if source is None:
            raise UserError(f"the base model {base['name']} was a folder; give it: model=FOLDER or a loaded model")
        own = {name: base[name] for name in ("dtype", "ffn_bits", "ffn_group", "ffn_spared")}
        cfg = ModelConfig(path=str(source), device=device, revision=None if path else base["revision"], **own)
        return load_model(cfg, resolve_device(device))

    def _save_pretrained(self, save_directory: Path) -> None:
        """Writes the files; `config.json` comes last."""
        folder = Path(save_directory)
        (folder / CONFIG).unlink(missing_ok=True)
        files = {CODEBOOK: self.codebook} | ({} if self.predictor is None else {PREDICTOR: self.predictor})
        for name, part in files.items():
            part.save(folder / name)
        if self.predictor is None:
            (folder / PREDICTOR).unlink(missing_ok=True)
        write_atomic(folder / "README.md", str(self.generate_model_card()).encode())
        digests = {name: _sha256(folder / name) for name in files}
        facts = {"format": KIND, "version": VERSION, **self.facts, "files": digests}
        write_atomic(folder / CONFIG, (json.dumps(facts, indent=1) + "\n").encode())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "Result":
        """The result in a folder or a repository of the hub; options as huggingface_hub has them (revision, token, …).

        Raises UserError, naming the file, if it is missing, damaged, or of another version; or if the hub can't be
        reached and the result is not in the local cache.
        """
        where = str(pretrained_model_name_or_path)
        folder = Path(where).expanduser()
        if folder.is_dir():
            return cls._read(folder)
        if folder.exists() or folder.is_absolute() or where.startswith((".", "~")) or where.count("/") != 1:
            raise UserError(f"{where}: no such folder, and not a hub id; make one with apc export RUN FOLDER")
        if not options.setdefault("local_files_only", not hub.hub_reachable()):
            note = ""
        else:
            note = " (the hub can't be reached, and the local cache does not have it)"
        patterns = [CONFIG, CODEBOOK, PREDICTOR, "README.md"]
        with library_errors(f"{where}: can't be loaded from the hub{note}"):
            return cls._read(Path(snapshot_download(where, allow_patterns=patterns, **options)))

    @classmethod
    def _read(cls, folder: Path) -> "Result":
        facts = _read_facts(folder / CONFIG)
        for name, digest in facts["files"].items():
            path = folder / name
            if name not in (CODEBOOK, PREDICTOR):
                raise UserError(f"{folder / CONFIG}: damaged (it names the file {name!r}); export the run again")
            if not path.is_file():
                raise UserError(f"{path}: no such file, though {CONFIG} names it; export the run again")
            if _sha256(path) != digest:
                raise UserError(f"{path}: damaged (another checksum than {CONFIG} has); export the run again")
        predictor = Predictor.load(folder / PREDICTOR) if PREDICTOR in facts["files"] else None
        return cls(Codebook.load(folder / CODEBOOK), predictor, facts)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that `save_pretrained` writes to README.md."""
        return model_card(self.facts)


def export(
    run: str | Path,
    folder: str | Path,
    policy: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> Path:
    """Writes what is needed to use a run's result to a folder, which `load` reads; returns the folder.

    policy, base_model, license: as for `Result.of_run`, whose errors it raises. The folder may hold an earlier result,
    but no other files.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file; choose another folder")
    known = {CONFIG, CODEBOOK, PREDICTOR, "README.md"}
    if target.is_dir() and (others := sorted({path.name for path in target.iterdir()} - known)):
        raise UserError(f"{target}: holds other files ({others[0]}); choose another folder")
    result = Result.of_run(run, policy, base_model, license)
    try:
        result.save_pretrained(target)
    except OSError as error:
        raise UserError(f"{target}: can't be written ({error.strerror}); choose another folder") from error
    return target


def load(
    where: str | Path,
    model: nn.Module | str | Path | None = None,
    kernel: str | None = "auto",
    device: str = "auto",
    scoring: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """The sparse model of a result in a folder or on the hub. It works offline, if the local cache has what it needs.

    where: a folder that `export` wrote, or a hub id; revision: of the result on the hub; the others, and errors: as for
    `Result.sparse_model` and `Result.from_pretrained`.
    """
    return Result.from_pretrained(where, revision=revision).sparse_model(model, kernel, device, scoring)


def _base_model(cfg: ModelConfig, codebook: Codebook, path: str | None) -> dict:
    """The entries that find the base model again: a bundled one, or one that the hub's local cache has.

    Any other path may be a folder of this machine, or have been one, and is not named.
    """
    is_known = find_bundled(cfg.path) is not None
    if not is_known and not Path(cfg.path).expanduser().exists() and Path(cfg.path).suffix != ".gguf":
        is_known = (
            not Path(cfg.path).is_absolute() and cfg.path.count("/") < 2 and hub.is_cached(cfg.path, cfg.revision)
        )
    samples = codebook.provenance.get("weights_sample", {})
    return {
        "path": path or (cfg.path if is_known else None),
        "name": model_name(cfg),
        "revision": None if path else cfg.revision,
        "dtype": cfg.dtype,
        "ffn_bits": cfg.ffn_bits,
        "ffn_group": cfg.ffn_group,
        "ffn_spared": cfg.ffn_spared,
        "weights": samples.get(samples.get("dtype")) or codebook.provenance.get("patterns", {}).get("weights"),
    }


def _kernels(policy: MaskPolicy) -> list[str]:
    """The types of device, cpu and cuda, on which kernels run the policy with these parts."""
    codebook = policy.codebook
    if codebook.projections != 3 or codebook.experts or list(codebook.sites) != ["neuron"]:
        return []
    return [
        device
        for device, way in KERNEL_ON.items()
        if policy.has_kernel_on(device) and policy.kernel_by(way) is not None
    ]


def _read_facts(path: Path) -> dict:
    """The facts in a config.json. Raises UserError if it is not that of a result."""
    if not path.is_file():
        raise UserError(f"{path.parent}: no whole result (it lacks {path.name}); make one with apc export RUN FOLDER")
    try:
        facts = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); export the run again") from error
    if not isinstance(facts, dict) or facts.get("format") != KIND:
        raise UserError(f"{path}: not the config.json of a result that apc made")
    if facts.get("version") != VERSION:
        raise UserError(
            f"{path}: version {facts.get('version')}, this program reads {VERSION}; update apc-llm, or export again"
        )
    missing = [name for name in _FACTS if name not in facts]
    wrong = f"it lacks {missing[0]}" if missing else wrong_field(facts, _FACTS)
    if wrong is None:
        missing = [name for name in _BASE if name not in facts["base_model"]]
        wrong = f"its base model lacks {missing[0]}" if missing else wrong_field(facts["base_model"], _BASE)
    if wrong is None and facts["policy"] not in POLICIES:
        wrong = f"there is no policy {facts['policy']}"
    if wrong is None and CODEBOOK not in facts["files"]:
        wrong = "it names no codebook"
    for name in ("dense", "sparse"):
        record = None if wrong else facts[name]
        if record is not None and not all(isinstance(record.get(key), int | float) for key in ("perplexity", "ratio")):
            wrong = f"the figures of {name} lack perplexity or ratio"
    if wrong:
        raise UserError(f"{path}: damaged ({wrong}); export the run again")
    return facts


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
