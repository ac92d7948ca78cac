"""A folder that `transformers` loads: weights, plain PyTorch code of its own, tokenizer and model card.

The files `*_ultramem.py` here are what is copied: they import nothing of this package, so that the folder works where
`ultramem` is not installed.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ultramem.export.extras import require
from ultramem.export.huggingface.card import model_card
from ultramem.export.huggingface.names import hugging_face_fields, hugging_face_state
from ultramem.export.huggingface.run_facts import RunFacts
from ultramem.export.huggingface.tokenizer_files import write_tokenizer
from ultramem.export.parity import Run
from ultramem.graph.transformer import Transformer

CODE_FILES = (
    "cache_ultramem.py",
    "configuration_ultramem.py",
    "memory_ultramem.py",
    "modeling_ultramem.py",
    "selection_ultramem.py",
)
WEIGHTS_FILE = "model.safetensors"
HOW_TO_LOAD = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)  # DIR: this folder",
    "tokenizer = AutoTokenizer.from_pretrained(DIR)  # where the export was made from a run",
    "logits = model(**tokenizer(text, return_tensors='pt')).logits",
)
AUTO_CLASSES = {
    "AutoConfig": "configuration_ultramem.UltraMemConfig",
    "AutoModel": "modeling_ultramem.UltraMemModel",
    "AutoModelForCausalLM": "modeling_ultramem.UltraMemForCausalLM",
}


def export_huggingface(model: Transformer, run: RunFacts | None, folder: Path) -> None:
    """Write the folder.

    Args:
        model: in eval mode, all weights of one floating dtype.
        run: what the model card and the tokenizer files are made from; None leaves the tokenizer out.
        folder: exists and is empty.

    Raises:
        ValueError: the weights have several dtypes, or the model's vocabulary is not the tokenizer's.
        ImportError: transformers is not installed.
    """
    require("transformers", "hf")
    from safetensors.torch import save_file

    from ultramem.export.huggingface.configuration_ultramem import UltraMemConfig

    dtype = _one_dtype(model)
    if run is not None and run.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the model's vocab_size must be the {run.vocab_size} of the run's tokenizer, got {model.config.vocab_size}"
        )
    end_of_text = None if run is None else run.end_of_text
    config = UltraMemConfig(
        **hugging_face_fields(model.config),
        architectures=["UltraMemForCausalLM"],
        auto_map=AUTO_CLASSES,
        dtype=dtype,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    config.save_pretrained(folder)
    for name in CODE_FILES:
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    weights = {name: tensor.cpu().contiguous() for name, tensor in hugging_face_state(model).items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / WEIGHTS_FILE)  # it comes readable to its owner alone
    if run is not None:
        write_tokenizer(run, folder, max_positions=model.config.max_positions)
    (folder / "README.md").write_text(model_card(model.config, run), encoding="utf-8")


def _one_dtype(model: Transformer) -> torch.dtype:
    dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    if len(dtypes) != 1:
        raise ValueError(f"all weights must have one dtype to be exported, got {', '.join(sorted(dtypes))}")
    return next(model.parameters()).dtype


def load_huggingface(folder: Path) -> Run:
    """The model as a function of the inputs that the manifest lists.

    It runs this package's own copy of the code, never the folder's, and reads weights from safetensors alone.

    Raises:
        ValueError: the code in the folder is not this version's.
        ImportError: transformers is not installed.
    """
    require("transformers", "hf")
    from ultramem.export.huggingface.cache_ultramem import UltraMemCache
    from ultramem.export.huggingface.modeling_ultramem import UltraMemForCausalLM

    for name in CODE_FILES:
        if (folder / name).read_bytes() != Path(__file__).with_name(name).read_bytes():
            raise ValueError(
                f"{folder / name} is not this version's: export again, or load the folder with transformers itself"
            )
    with quiet_loading():
        model = UltraMemForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    sources = [source - 1 for source, _ in model.config.parsed_insertions] if any(model.config.conv_lengths) else []
    layers = model.config.num_hidden_layers

    def run(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        input_ids, attention_mask, position_ids, *state = inputs
        cache = UltraMemCache(model.config)
        for index, layer in enumerate(cache.layers):
            layer.update(state[2 * index], state[2 * index + 1])
        for source, conv_BDW in zip(sources, state[2 * layers :], strict=True):
            cache.layers[source].inputs_BSD = conv_BDW.transpose(1, 2)
        with torch.inference_mode():
            output = model(input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache)
        pairs = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        convs = [cache.layers[source].inputs_BSD.transpose(1, 2).contiguous() for source in sources]
        return output.logits, *pairs, *convs

    return run


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the library's progress bar."""
    logging = require("transformers.utils.logging", "hf")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


__all__ = ["CODE_FILES", "HOW_TO_LOAD", "RunFacts", "export_huggingface", "load_huggingface"]
